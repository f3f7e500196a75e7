"""Captioned pictures from a dataset of the library `datasets`: a folder of `save_to_disk`, or a name on the hub.

``hf:NAME``, ``hf:FOLDER`` or the folder itself, with what is to be chosen behind a question mark:
``hf:NAME?config=C&split=train&image=image&caption=text&revision=COMMIT``. Each may be left out where there is only one
to choose. The picture's encoded bytes are taken as they are stored, never decoded by the library; a picture that is
stored as a path is not followed, because the path comes from whoever made the dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .images import MAX_PICTURE_BYTES, Picture, Skipped, Source, first_line
from .tower import import_package

_CHOICES = ("config", "split", "image", "caption", "revision")
_CAPTIONS = ("caption", "text", "prompt", "captions", "txt")
_ON_DISK = ("state.json", "dataset_dict.json")
_SIGNATURES = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"))


@dataclass(frozen=True)
class DatasetSource(Source):
    """Rows ``start`` to ``stop`` of an open dataset."""

    rows: Any = field(default=None, repr=False, compare=False)  # a datasets.Dataset of two columns
    columns: tuple[str, str] = ("", "")  # of the picture and of its caption ("": it has none)
    start: int = 0
    stop: int = 0

    @property
    def count(self) -> int:
        return self.stop - self.start

    def read(self, skipped: Skipped) -> Iterator[Picture]:
        image, caption = self.columns
        for number in range(self.start, self.stop):
            key = f"{number:09d}"
            try:
                row = self.rows[number]
            except Exception as error:  # pyarrow has a kind of its own for every way in which a file can be damaged
                skipped.add(f"{self.name}:{key}", f"its row cannot be read ({type(error).__name__}: {error})")
                continue
            data = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
            if not data:
                reason = "no picture" if row[image] is None else "its picture is a path, not embedded bytes"
                skipped.add(f"{self.name}:{key}", reason)
            elif len(data) > MAX_PICTURE_BYTES:
                skipped.add(f"{self.name}:{key}", f"{len(data)} bytes; at most {MAX_PICTURE_BYTES} are read")
            else:
                extension = next((name for begin, name in _SIGNATURES if data.startswith(begin)), ".jpg")
                yield Picture(key, _caption(row[caption]) if caption else "", data, extension)


def is_dataset(item: str) -> bool:
    """Whether a source is named as a dataset, or is a folder that `save_to_disk` wrote."""
    return item.startswith("hf:") or any((Path(item) / name).is_file() for name in _ON_DISK)


def dataset_sources(item: str, per_shard: int, limit: int | None = None) -> list[Source]:
    """The dataset, or its first ``limit`` rows, in pieces of ``per_shard`` rows, in its own order.

    Raises ``ValueError`` naming what there is to choose from, ``FileNotFoundError`` for a folder that is none, and
    ``OSError`` where the hub does not give it.
    """
    datasets = import_package("datasets")
    name, _, query = item.removeprefix("hf:").partition("?")
    choices = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(choices) - set(_CHOICES))
    if not name or unknown:
        what = f"{unknown[0]!r}" if unknown else "no name"
        raise ValueError(f"images: {item} has {what}; hf:NAME?KEY=VALUE takes {', '.join(_CHOICES)}")
    rows = _split(item, _open(datasets, item, name, choices), choices.get("split"))
    if len(rows) == 0:
        raise ValueError(f"images: {item} has no rows")
    image, caption = _columns(datasets, item, rows, choices)
    rows = rows.select_columns([image, *([caption] if caption else [])])
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    digest = hashlib.sha256(f"{rows._fingerprint}\0{image}\0{caption}\0{len(rows)}".encode()).hexdigest()
    label = f"{Path(name).name}{':' + choices['split'] if 'split' in choices else ''}"
    end = len(rows) if limit is None else min(limit, len(rows))
    return [
        DatasetSource(
            f"{label}[{start}:]",
            digest,
            Path(name),
            rows=rows,
            columns=(image, caption),
            start=start,
            stop=min(start + per_shard, end),
        )
        for start in range(0, end, per_shard)
    ]


def _open(datasets: Any, item: str, name: str, choices: dict[str, str]) -> Any:
    if Path(name).is_dir():
        if not is_dataset(name):
            raise FileNotFoundError(f"images: {name} is no dataset; a folder of save_to_disk has a {_ON_DISK[0]}")
        given = sorted({"config", "revision"} & set(choices))
        if given:
            raise ValueError(f"images: {item} is a folder, which has no {given[0]}")
        try:
            return datasets.load_from_disk(name)
        except Exception as error:
            raise ValueError(f"images: {name} cannot be read ({type(error).__name__}: {error})") from error
    try:
        return datasets.load_dataset(name, choices.get("config"), revision=choices.get("revision"))
    except Exception as error:  # the hub's client and the library each raise their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"images: {item} is neither a folder nor in the cache, and the hub did not give it ({reason})"
        ) from error


def _split(item: str, found: Any, split: str | None) -> Any:
    if not isinstance(found, dict):
        if split is not None:
            raise ValueError(f"images: {item} has no splits; leave split out")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        asked = "which split" if split is None else f"split={split}"
        raise ValueError(f"images: {item}: {asked}? it has {', '.join(found)}; hf:NAME?split={next(iter(found))}")
    return found[split]


def _columns(datasets: Any, item: str, rows: Any, choices: dict[str, str]) -> tuple[str, str]:
    """The column of pictures and that of captions ("" where the dataset has none)."""
    there = ", ".join(rows.features)
    for key in ("image", "caption"):
        if key in choices and choices[key] not in rows.features:
            raise ValueError(f"images: {item}: no column {choices[key]!r}; it has {there}")
    pictures = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if "image" not in choices and len(pictures) != 1:
        raise ValueError(f"images: {item}: {len(pictures)} columns of pictures; say image=COLUMN, of {there}")
    image = choices.get("image") or pictures[0]
    kind = rows.features[image]
    if not isinstance(kind, datasets.Image) and getattr(kind, "dtype", "") not in ("binary", "large_binary"):
        raise ValueError(f"images: {item}: the column {image!r} holds {kind}; pictures or their bytes are needed")
    if "caption" in choices:
        return image, choices["caption"]
    known = [name for name in _CAPTIONS if name in rows.features]
    texts = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if not known and len(texts) > 1:
        raise ValueError(f"images: {item}: which column has the captions? say caption=COLUMN, of {', '.join(texts)}")
    return image, (known or texts or [""])[0]


def _caption(value: Any) -> str:
    """The first line of a text, or of the first of several."""
    value = value[0] if isinstance(value, list) and value else value
    return first_line(value.encode(errors="replace")) if isinstance(value, str) else ""
