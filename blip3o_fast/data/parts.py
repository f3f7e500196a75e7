"""What a running extraction has finished: parts of sources, each a shard that has no number yet and an entry.

A part is ``samples_per_shard`` pictures of one source, damaged ones counted, so that the place of a part in its
source is known without decoding what lies before it. The features are written first and the entry after them: a
part counts from the moment its entry exists. Names depend on the source alone, and each source is worked on by one
process, so processes that share the folder need no locks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .images import Source
from .shards import write_text

PARTS = "parts"


@dataclass(frozen=True)
class Stamp:
    """What features are made of; they are kept as long as nothing of it changes.

    encoders: hash of the description in meta.json.
    """

    source: str
    fingerprint: str
    limit: int | None
    dtype: str
    precision: str
    samples_per_shard: int
    encoders: str

    def unlike(self, there: Stamp) -> str:
        """The first setting in which features that are there differ from what is asked for; "" where none does."""
        for name in ("dtype", "precision", "limit", "samples_per_shard"):
            found, asked = getattr(there, name), getattr(self, name)
            if found != asked:
                return f"{self.source} with {name} {found}, asked for {asked}"
        return ""


@dataclass
class Entry:
    """One part: its rows (key, caption), what was skipped (key, reason), the file's size and sha256 ("" if no rows)."""

    stamp: Stamp
    part: int
    last: bool
    rows: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    skipped_unnamed: int = 0
    bytes: int = 0
    sha256: str = ""
    int8: dict[str, dict[str, float]] = field(default_factory=dict)  # of each side, see int8_report.py


class Parts:
    """The folder ``parts`` of an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PARTS

    def stem(self, source: str, part: int) -> str:
        return f"{hashlib.sha256(source.encode()).hexdigest()[:20]}-{part:06d}"

    def shard(self, source: str, part: int) -> Path:
        return self.folder / f"{self.stem(source, part)}.safetensors"

    def write(self, entry: Entry) -> None:
        path = self.folder / f"{self.stem(entry.stamp.source, entry.part)}.json"
        write_text(path, json.dumps(asdict(entry), ensure_ascii=False))

    def read(self, source: str, part: int) -> Entry | None:
        """The entry of a part; None where there is none, or one that this version did not write."""
        path = self.folder / f"{self.stem(source, part)}.json"
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            stamp = Stamp(**data.pop("stamp"))
            rows, skipped = ([(a, b) for a, b in data.pop(name)] for name in ("rows", "skipped"))
            return Entry(stamp, rows=rows, skipped=skipped, **data)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def done(self, stamp: Stamp) -> tuple[int, bool]:
        """How many parts of a source are whole, from its beginning, and whether these are all of it."""
        part = 0
        while (entry := self.read(stamp.source, part)) is not None and entry.stamp == stamp:
            path = self.shard(stamp.source, part)
            if entry.rows and not (path.is_file() and path.stat().st_size == entry.bytes):
                break
            part += 1
            if entry.last:
                return part, True
        return part, False

    def stamps(self, sources: list[Source]) -> Iterator[Stamp]:
        """Of the sources that are begun."""
        return (entry.stamp for source in sources if (entry := self.read(source.name, 0)) is not None)

    def entries(self, source: Source | str) -> Iterator[Entry]:
        """The entries of a source that is done, one at a time: a tar may hold millions of captions.

        ``FileNotFoundError`` where another process has just cleared them.
        """
        name = source if isinstance(source, str) else source.name
        for part in itertools.count():
            entry = self.read(name, part)
            if entry is None:
                raise FileNotFoundError(f"{self.folder}: no entry {part} of {name}")
            yield entry
            if entry.last:
                return

    def clear(self, sources: list[str]) -> None:
        """Remove what is left of sources whose shards are in place, and the folder once it is empty."""
        for source in sources:
            for path in self.folder.glob(f"{self.stem(source, 0)[:-6]}*"):
                path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.glob("*.json")):
            shutil.rmtree(self.folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
