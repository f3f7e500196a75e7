"""A set of features in blocks, whatever it is stored as: a folder of shards, the original's pickle or chunked pickles.

One block is in memory at a time: a shard, a chunk, or the whole of a single pickle, which is one object.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import features_of_pickle
from .shards import INDEX, META, EncoderInfo, Meta, Row, positions_by_shard, read_index, read_meta, read_shard

CHUNKS_MANIFEST = "embeddings_manifest.json"  # of the original's later versions
_CHUNK = re.compile(r"embeddings_shard_(\d+)\w*\.pkl")


@dataclass(frozen=True)
class Block:
    """condition [n, T, E] and target [n, T, C] as stored (int8 as float32), their names, the file they come from."""

    file: Path
    condition: Tensor
    target: Tensor
    keys: list[str]
    captions: list[str]


@dataclass
class FeatureSet:
    """kind: shards, pickle or chunked pickles. files: of the features, in order. count: pictures, None where only
    reading tells. meta: None for pickles."""

    path: Path
    kind: str
    files: list[Path]
    count: int | None
    meta: Meta | None

    def blocks(self) -> Iterator[Block]:
        """All blocks in order; the errors of `block`."""
        return (self.block(file) for file in self.files)

    def block(self, file: Path) -> Block:
        """The features of one of `files`. ValueError or FileNotFoundError names it and what is wrong with it."""
        if self.meta is None:
            return Block(file, *features_of_pickle(file))
        rows = self._rows[file.name]
        condition, target = read_shard(file, self.meta, len(rows))
        order = torch.tensor([row.row for row in rows])
        if not torch.equal(order, torch.arange(len(order))):
            condition, target = condition[order], target[order]
        return Block(file, condition, target, [row.key for row in rows], [row.caption for row in rows])

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        rows = read_index(self.path)
        return {name: [rows[p] for p in found] for name, found in positions_by_shard(self.path, rows).items()}

    def meta_for(self, block: Block) -> Meta:
        """The set's description; of a pickle what its sizes say."""
        if self.meta is not None:
            return self.meta
        sides = [
            EncoderInfo(f"{side} of {self.path.name}", tensor.shape[-1])
            for side, tensor in (("eva", block.condition), ("clip", block.target))
        ]
        return Meta(sides[0], sides[1], block.condition.shape[1])


def open_features(path: str | os.PathLike[str]) -> FeatureSet:
    """What a path holds. Raises FileNotFoundError or ValueError saying what was found and what is allowed."""
    found = Path(path)
    if found.is_file():
        if found.suffix == ".safetensors":
            raise ValueError(f"{found}: one shard; give its folder, {found.parent}")
        return FeatureSet(found, "pickle", [found], None, None)
    if not found.is_dir():
        raise FileNotFoundError(f"{found}: no such file or folder")
    if (found / META).is_file():
        rows = read_index(found) if (found / INDEX).is_file() else []
        files = [found / name for name in dict.fromkeys(row.shard for row in rows)]
        return FeatureSet(found, "shards", files, len(rows), read_meta(found))
    chunks = sorted(p for p in found.iterdir() if _CHUNK.fullmatch(p.name))
    if not chunks:
        names = ", ".join(sorted(p.name for p in found.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{found}: holds {names}; allowed are a folder made by 'blip3o-fast extract', a .pkl of the original, or a "
            "folder of its embeddings_shard_00000.pkl"
        )
    manifest = _manifest(found)
    announced = manifest.get("total_shards")
    failed = manifest.get("failed_shards")
    lost = len(failed) if isinstance(failed, list) else failed if isinstance(failed, int) else 0
    if isinstance(announced, int) and announced - lost > len(chunks):
        raise ValueError(f"{found}: {CHUNKS_MANIFEST} lists {announced} chunks, {len(chunks)} are there")
    total = manifest.get("total_samples")
    return FeatureSet(found, "chunked pickles", chunks, total if isinstance(total, int) else None, None)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / CHUNKS_MANIFEST
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}; a JSON object is needed")
    return data
