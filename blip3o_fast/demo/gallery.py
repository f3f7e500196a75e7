"""The run's collection of pictures: who is near whom by features, and the pictures themselves, found again by key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip3o_fast.data.images import DamagedPictureError, Picture, Skipped, Source, decode, find_sources

if TYPE_CHECKING:
    from PIL.Image import Image

Name = tuple[str, str]
"""(source, key): a key names a picture only within its tar. The source is "" where the embeddings do not say it."""


def directions(tokens: Tensor, mean: Tensor) -> Tensor:
    """float64 ``[n, C]`` of ``[n, T, C]``: mean over the tokens, centred by ``mean`` ``[C]``, of length 1.

    Their products are the similarities of recall@k (`evaluation.metrics.recall_at_k`).
    """
    return torch.nn.functional.normalize(tokens.mean(1).double() - mean.double(), dim=-1)


def nearest(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows (int64) and similarities, each ``[m, count]``, of the gallery's nearest to each query, best first.

    Both are `directions`. Of equally near ones the earlier row comes first.
    """
    similarity, rows = (queries @ gallery.T).sort(dim=1, descending=True, stable=True)
    return rows[:, :count], similarity[:, :count]


def find_pictures(places: Sequence[Path], wanted: Collection[Name]) -> dict[Name, Image]:
    """The pictures with these names, decoded, from the first of the places (folders, tars) that has them.

    What is nowhere, or cannot be read, is left out: whoever shows pictures can show a key instead.
    """
    found: dict[Name, Image] = {}
    missing: dict[str, set[str]] = {}  # by key: the sources
    for name, key in wanted:
        missing.setdefault(key, set()).add(name)
    for source in (source for place in places for source in _readable_sources(place)):
        if not missing:
            break
        for picture in _readable_pictures(source):
            sources = missing.get(picture.key, set())
            # One tar among others is told by its name; the embeddings need not know that of a folder of pictures.
            fitting = set(sources) if source.files else sources & {"", source.name}
            try:
                found |= {(name, picture.key): decode(picture.data) for name in fitting}
            except DamagedPictureError:
                continue
            sources -= fitting
            if not sources:
                missing.pop(picture.key, None)
    return found


def _readable_sources(place: Path) -> list[Source]:
    try:
        return find_sources(place)
    except (OSError, ValueError):  # gone, or nothing in it
        return []


def _readable_pictures(source: Source) -> Iterator[Picture]:
    try:
        yield from source.pictures(Skipped())
    except ValueError:  # a tar that breaks off; what came before counts
        return
