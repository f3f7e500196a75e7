"""manifest.json: what a folder of features holds, of which sources, made how; and how finished parts get in.

`Manifest.add` gives the parts of finished sources their numbers, in the order of the sources, and lists them in
index.jsonl and skipped.jsonl. It can be killed anywhere: what it is about to do stands in ``parts/plan.json`` first,
and `roll_forward` does it again. Several processes may do the same at once, for they write the same bytes.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from blip3o_fast import __version__
from blip3o_fast.files import replacing

from .parts import Entry, Parts, Stamp
from .shards import INDEX, META, Row, shard_name, write_text

MANIFEST, SKIPPED = "manifest.json", "skipped.jsonl"
NO_CAPTION = "no caption; its features were taken"
_PLAN = "plan.json"
_VERSION = 1


@dataclass
class Manifest:
    """The content of manifest.json.

    shards: file name -> pictures, bytes and sha256. sources: name -> stamp (see `parts.Stamp`), shards, pictures,
    skipped.
    """

    folder: Path
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a folder, empty where it has none yet. ``ValueError`` naming the file where it is not one."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["manifest_version"] != _VERSION:
                raise ValueError(f"manifest_version {data['manifest_version']!r}; this version reads {_VERSION}")
            return cls(folder, dict(data["shards"]), dict(data["sources"]))
        except FileNotFoundError:
            return cls(folder)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a manifest of this version ({error!r})") from error

    @classmethod
    def continued(cls, folder: Path, parts: Parts) -> Manifest:
        """The same, once an `add` that was interrupted is finished."""
        for last in (False, False, True):
            manifest = cls.read(folder)
            try:
                manifest.roll_forward(parts)
                break
            except (
                FileNotFoundError
            ):  # another process was at it, and has cleared the parts since the manifest was read
                if last:
                    raise
        return manifest

    def __contains__(self, stamp: Any) -> bool:
        """Whether a source is done as the stamp says, with every shard in its place at its full size."""
        source = self.sources.get(stamp.source)
        if source is None or source["stamp"] != asdict(stamp):
            return False
        files = ((self.folder / name, self.shards[name]["bytes"]) for name in source["shards"])
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def stamps(self) -> Iterator[Stamp]:
        return (Stamp(**source["stamp"]) for source in self.sources.values())

    def add(self, sources: list[str], parts: Parts) -> None:
        """Take in the parts of sources that are done."""
        free = itertools.count()
        plan: dict[str, list[str | None]] = {}
        for source in sources:
            names: list[str | None] = []
            for entry in parts.entries(source):
                names.append(next(n for n in map(shard_name, free) if n not in self.shards) if entry.rows else None)
            plan[source] = names
        if plan:
            write_text(parts.folder / _PLAN, json.dumps(plan))
            self._carry_out(plan, parts)

    def roll_forward(self, parts: Parts) -> None:
        """Finish an `add` that was interrupted."""
        try:
            plan = json.loads((parts.folder / _PLAN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if plan.keys() <= self.sources.keys():
            (parts.folder / _PLAN).unlink(missing_ok=True)
            parts.clear(list(plan))
        else:
            self._carry_out(plan, parts)

    def _carry_out(self, plan: dict[str, list[str | None]], parts: Parts) -> None:
        added: dict[str, tuple[str, int]] = {}  # shard -> source and part
        for source, names in plan.items():
            done: dict[str, Any] = {"shards": [name for name in names if name], "pictures": 0, "skipped": 0}
            for entry, name in zip(parts.entries(source), names, strict=True):
                done["stamp"] = asdict(entry.stamp)
                done["pictures"] += len(entry.rows)
                done["skipped"] += len(entry.skipped) + entry.skipped_unnamed
                if name is not None:
                    _move(parts.shard(source, entry.part), self.folder / name)
                    self.shards[name] = {"pictures": len(entry.rows), "bytes": entry.bytes, "sha256": entry.sha256}
                    if entry.int8:
                        self.shards[name]["int8"] = entry.int8
                    added[name] = source, entry.part
            self.sources[source] = {name: done[name] for name in ("stamp", "shards", "pictures", "skipped")}
        self._write_index(added, parts)
        self._write_skipped(set(plan), parts)
        self._write()
        (parts.folder / _PLAN).unlink(missing_ok=True)
        parts.clear(list(plan))

    def drop(self, sources: list[str]) -> None:
        """Take sources out, their shards too."""
        if not sources:
            return
        names = [name for source in sources for name in self.sources.pop(source)["shards"]]
        for name in names:
            del self.shards[name]
        self._write()  # first: an interruption then leaves sources to be done again, and none that only seems done
        self._write_index({}, None)
        self._write_skipped(set(), None)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _write(self) -> None:
        meta = json.loads((self.folder / META).read_text(encoding="utf-8"))
        content = {
            "manifest_version": _VERSION,
            "package": f"blip3o_fast {__version__}",
            "provenance": meta,
            "pictures": sum(shard["pictures"] for shard in self.shards.values()),
            "skipped": sum(source["skipped"] for source in self.sources.values()),
            "sources": dict(sorted(self.sources.items())),
            "shards": dict(sorted(self.shards.items())),
        }
        write_text(self.folder / MANIFEST, json.dumps(content, indent=1) + "\n")

    def _write_index(self, added: dict[str, tuple[str, int]], parts: Parts | None) -> None:
        """index.jsonl in the order of the shards; old lines are copied one by one, however many there are."""
        old = _grouped(self.folder / INDEX, "shard")
        ahead = next(old, None)
        with _writing(self.folder / INDEX) as file:
            for name in sorted(self.shards):
                while ahead is not None and (ahead[0] < name or (ahead[0] == name and name in added)):
                    ahead = next(old, None)
                if name in added and parts is not None:
                    source, part = added[name]
                    for row, (key, caption) in enumerate(_entry(parts, source, part).rows):
                        line = json.dumps(asdict(Row(key, caption, name, row, source)), ensure_ascii=False)
                        file.write(line + "\n")
                while ahead is not None and ahead[0] == name:
                    file.write(ahead[1])
                    ahead = next(old, None)

    def _write_skipped(self, added: set[str], parts: Parts | None) -> None:
        """skipped.jsonl in the order of the sources' names."""
        old = _grouped(self.folder / SKIPPED, "source")
        ahead = next(old, None)
        with _writing(self.folder / SKIPPED) as file:
            for name in sorted(self.sources):
                while ahead is not None and (ahead[0] < name or (ahead[0] == name and name in added)):
                    ahead = next(old, None)
                for entry in parts.entries(name) if name in added and parts is not None else ():
                    lines = [{"source": name, "key": key, "reason": reason} for key, reason in entry.skipped]
                    if entry.skipped_unnamed:
                        lines.append({"source": name, "key": "", "reason": f"{entry.skipped_unnamed} more, not listed"})
                    lines += [
                        {"source": name, "key": key, "reason": NO_CAPTION} for key, text in entry.rows if not text
                    ]
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                while ahead is not None and ahead[0] == name:
                    file.write(ahead[1])
                    ahead = next(old, None)


def read_skipped(folder: Path) -> Iterator[tuple[str, str, str]]:
    """source, key and reason of every line of skipped.jsonl."""
    for source, line in _grouped(folder / SKIPPED, "source"):
        data = json.loads(line)
        yield source, data["key"], data["reason"]


def _move(part: Path, shard: Path) -> None:
    try:
        os.replace(part, shard)
    except FileNotFoundError:
        if not shard.is_file():  # else an earlier try, or another process, has moved it
            raise


def _entry(parts: Parts, source: str, part: int) -> Entry:
    entry = parts.read(source, part)
    if entry is None:
        raise FileNotFoundError(f"{parts.folder}: no entry {part} of {source}")
    return entry


@contextmanager
def _writing(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces path once it is whole and on the disk."""
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _grouped(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The lines of a JSONL file, each with its field ``name``; none where there is no file."""
    try:
        file = open(path, encoding="utf-8")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            yield json.loads(line)[name], line
