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
    for place in places:
        for source in _readable_sources(place):
            missing = set(wanted) - found.keys()
            if not missing:
                return found
            for picture in _readable_pictures(source):
                # One tar among others is told by its name; a folder of pictures has none that the embeddings know.
                names = [name for name in missing if name[1] == picture.key and name[0] in ("", source.name)]
                if source.files:
                    names = [name for name in missing if name[1] == picture.key]
                for name in names:
                    try:
                        found[name] = decode(picture.data)
                    except DamagedPictureError:
                        continue
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
