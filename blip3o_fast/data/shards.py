"""Features on disk: a folder of safetensors shards, one line of text per picture, one description.

::

    meta.json                 what the features are: encoders, revision, tower, preprocessing, pooling
    index.jsonl               one picture per line: key, caption, shard, row, source
    shard-00000.safetensors   eva [n, T, E] (the condition) and clip [n, T, C] (the target); see stored.py
    shard-00001.safetensors   ...

Older folders (``shard_00000.safetensors``, tensors condition and target) are read as well.

Every file is written beside its place and renamed, so a file that exists is whole. A shard counts from
the moment the index lists it: the index is rewritten after its shard, so an interruption between the two
leaves a shard that nobody reads and that the next run overwrites.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.files import replacing

from .stored import FORMAT_VERSION, HEADER, TENSORS, StoredSide, allowed_names, check_tensor, save_sides

META, INDEX = "meta.json", "index.jsonl"
_SHARD = re.compile(r"shard[-_][0-9]{5,9}\.safetensors")


@dataclass(frozen=True)
class EncoderInfo:
    """How one side's features were made; two folders mix only if these are equal."""

    name: str
    dim: int
    revision: str = ""
    tower: str = ""
    preprocessing: str = ""
    pooling: str = ""

    def __str__(self) -> str:
        made = "; ".join(text for text in (self.revision, self.tower, self.preprocessing, self.pooling) if text)
        return self.name + (f" ({made})" if made else "")


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    condition: EncoderInfo
    target: EncoderInfo
    tokens: int = 64
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Meta:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: found a {type(data).__name__}; a JSON object is needed")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{where}: format_version {version!r}; this version reads {FORMAT_VERSION}")
        tokens = data.get("tokens")
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"{where}: tokens is {tokens!r}; a whole number >= 1 is needed")
        sides = [_encoder_info(where, side, data.get(side)) for side in ("condition", "target")]
        return cls(sides[0], sides[1], tokens)


@dataclass(frozen=True)
class Row:
    """One line of the index: a picture's key and caption, where its features lie, where it came from."""

    key: str
    caption: str
    shard: str
    row: int
    source: str


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_text(path: Path, text: str) -> None:
    """Write a small file beside its place and, once it is on the disk, rename it there."""
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def claim_folder(folder: Path, meta: Meta, *, overwrite: bool = False) -> None:
    """Make a folder for features described by ``meta``, or see that it holds such.

    Raises ``ValueError`` where it already holds features of other encoders (mixing them would go unnoticed until the
    samples are bad), unless ``overwrite``, which drops those.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = read_meta(folder) if (folder / META).exists() else None
    if found is not None and found != meta and not overwrite:
        raise ValueError(
            f"{folder}: holds features of {_difference(found, meta)}; choose another output folder, or overwrite"
        )
    if found is not None and found != meta and (folder / INDEX).exists():
        drop_all(folder)
    if found != meta:
        write_text(folder / META, json.dumps(asdict(meta), indent=2) + "\n")


def drop_all(folder: Path) -> None:
    """Remove the shards that the index lists, and all that is said of them but meta.json."""
    old = {row.shard for row in read_index(folder)}
    for name in (INDEX, "manifest.json", "skipped.jsonl", *sorted(old)):
        (folder / name).unlink(missing_ok=True)  # the index first: no description lies over shards of another kind


class ShardWriter:
    """Adds shards to a folder, which it makes or continues; errors as of `claim_folder`."""

    def __init__(self, folder: str | os.PathLike[str], meta: Meta, *, overwrite: bool = False) -> None:
        self.folder, self.meta = Path(folder), meta
        claim_folder(self.folder, meta, overwrite=overwrite)
        self.rows: dict[str, list[Row]] = {}
        for row in read_index(self.folder) if (self.folder / INDEX).exists() else []:
            self.rows.setdefault(row.shard, []).append(row)

    def header(self, name: str) -> dict[str, Any] | None:
        """The ``extra`` given to `write` for a shard that is whole, else None (write it again)."""
        from safetensors import SafetensorError, safe_open

        if name not in self.rows:
            return None
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                count = StoredSide(file, "condition").shape[0]
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
        except (SafetensorError, OSError, ValueError):
            return None
        return header if count == len(self.rows[name]) else None

    def write(
        self,
        number: int,
        condition: Tensor,
        target: Tensor,
        keys: Sequence[str],
        captions: Sequence[str],
        source: str,
        extra: Mapping[str, str] | None = None,
        *,
        listed: bool = True,
    ) -> Path:
        """Write shard ``number`` (condition ``[n, T, E]``, target ``[n, T, C]``), then list it in the index.

        listed: False leaves the index to a call of `write_index` at the end: until then the folder holds no set.
        """
        name = shard_name(number)
        path = self.folder / name
        if not len(condition) == len(target) == len(keys) == len(captions):
            counts = (len(condition), len(target), len(keys), len(captions))
            raise ValueError(f"{path}: {counts} conditions, targets, keys and captions; they must be as many")
        save_sides(path, condition, target, self.meta, extra or {})
        self.rows[name] = [Row(k, c, name, i, source) for i, (k, c) in enumerate(zip(keys, captions, strict=True))]
        if listed:
            self.write_index()
        return path

    def drop(self, names: Sequence[str]) -> None:
        """Take shards out of the index and the folder."""
        if names:
            self.rows = {name: rows for name, rows in self.rows.items() if name not in names}
            self.write_index()  # first, so that the index never lists a file that is not there
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def write_index(self) -> None:
        lines = [json.dumps(asdict(row), ensure_ascii=False) for name in sorted(self.rows) for row in self.rows[name]]
        write_text(self.folder / INDEX, "".join(line + "\n" for line in lines))


def read_meta(folder: str | os.PathLike[str]) -> Meta:
    """meta.json of a folder, checked field by field."""
    path = Path(folder) / META
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a folder of features has {META}, {INDEX} and shards")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return Meta.from_dict(data, str(path))


def read_index(folder: str | os.PathLike[str]) -> list[Row]:
    """index.jsonl of a folder, each line checked, in the order of the file."""
    return list(iter_index(folder))


def iter_index(folder: str | os.PathLike[str]) -> Iterator[Row]:
    """The same line by line: a list of sixty million rows is a machine's memory."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a folder of features has {META}, {INDEX} and shards")
    wanted = {"key": str, "caption": str, "shard": str, "row": int, "source": str}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                data = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(data, dict) or {k: type(v) for k, v in data.items()} != wanted:
                raise ValueError(f"{path}, line {number}: found {line.strip()[:120]}; needed are {', '.join(wanted)}")
            if not _SHARD.fullmatch(data["shard"]):  # a path here would read any file of the machine
                raise ValueError(f"{path}, line {number}: shard {data['shard']!r}; shard-00000.safetensors is allowed")
            yield Row(**data)


@dataclass(frozen=True)
class Features:
    """All of a folder, in the index's order: float32 on the CPU."""

    condition: Tensor
    target: Tensor
    keys: list[str]
    captions: list[str]
    meta: Meta


def read_shards(folder: str | os.PathLike[str]) -> Features:
    """Read and check a whole folder: names, shapes, dtypes and finite values of every shard.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the file, what was found and what is allowed.
    """
    folder = Path(folder)
    meta, rows = read_meta(folder), read_index(folder)
    if not rows:
        raise ValueError(f"{folder / INDEX}: lists no picture; extraction has not finished a shard yet")
    by_shard = positions_by_shard(folder, rows)
    condition = torch.empty(len(rows), meta.tokens, meta.condition.dim)
    target = torch.empty(len(rows), meta.tokens, meta.target.dim)
    for name, positions in by_shard.items():
        numbers = [rows[p].row for p in positions]
        c, t = read_shard(folder / name, meta, len(numbers))
        take, put = torch.tensor(numbers), torch.tensor(positions)
        condition[put] = c[take].float()
        target[put] = t[take].float()
    return Features(condition, target, [r.key for r in rows], [r.caption for r in rows], meta)


def positions_by_shard(folder: Path, rows: Sequence[Row]) -> dict[str, list[int]]:
    """Shard -> where its pictures stand in the index; ValueError where these are not all of them, each once."""
    by_shard: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        by_shard.setdefault(row.shard, []).append(position)
    for name, positions in by_shard.items():
        if sorted(rows[p].row for p in positions) != list(range(len(positions))):
            raise ValueError(f"{folder / INDEX}: rows of {name} are not 0..{len(positions) - 1}, each once")
    return by_shard


def read_shard(path: str | os.PathLike[str], meta: Meta, count: int) -> tuple[Tensor, Tensor]:
    """One shard's ``condition [count, T, E]`` and ``target [count, T, C]`` in their stored dtype; int8 as float32."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, but the index lists {count} pictures of it; extract again")
    try:
        with safe_open(path, framework="pt") as file:
            if not allowed_names(file.keys()):
                raise ValueError(
                    f"{path}: holds the tensors {sorted(file.keys())}; eva and clip (or condition and target, as older "
                    "versions wrote) and their scales are allowed"
                )
            condition, target = (StoredSide(file, side)[:] for side in TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); delete it and extract again") from error
    check_tensor(str(path), "condition", condition, meta.tokens, meta.condition.dim)
    check_tensor(str(path), "target", target, meta.tokens, meta.target.dim)
    for name, found in (("condition", len(condition)), ("target", len(target))):
        if found != count:
            raise ValueError(f"{path}: {name} has {found} pictures; the index lists {count}")
    return condition, target


def _encoder_info(where: str, side: str, described: Any) -> EncoderInfo:
    known = [field.name for field in fields(EncoderInfo)]
    if not isinstance(described, dict) or not {"name", "dim"} <= set(described) <= set(known):
        found = sorted(described) if isinstance(described, dict) else f"a {type(described).__name__}"
        raise ValueError(f"{where}: {side!r} has {found}; needed are name and dim, allowed also {', '.join(known[2:])}")
    for name, value in described.items():
        if type(value) is not (int if name == "dim" else str) or value == 0:
            raise ValueError(f"{where}: {side}.{name} is {value!r}; dim is a whole number >= 1, the others are text")
    return EncoderInfo(**described)


def _difference(found: Meta, asked: Meta) -> str:
    """The fields in which two folders' features differ; of a network with another name, the name alone."""
    told = []
    for side in ("condition", "target"):
        there, wanted = asdict(getattr(found, side)), asdict(getattr(asked, side))
        keys = ["name"] if there["name"] != wanted["name"] else list(there)
        told += [f"{side} {key} {there[key]!r}, asked for {wanted[key]!r}" for key in keys if there[key] != wanted[key]]
    if found.tokens != asked.tokens:
        told.append(f"{found.tokens} tokens, asked for {asked.tokens}")
    return "; ".join(told)
