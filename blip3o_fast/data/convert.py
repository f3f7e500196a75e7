"""From one way of storing features to another: pickles of the original -> shards, anything -> its single pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .blocks import FeatureSet, open_features
from .pickle_output import PICKLE, write_pickle
from .shards import ShardWriter, shard_name, write_text
from .splits import RULE_FILE, default_rule
from .stored import DTYPES

FORMATS = ("shards", "pickle")
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "shards",
    samples_per_shard: int = 1000,
    dtype: str | None = None,
    quiet: bool = True,
) -> int:
    """Write the features of ``source`` (see `open_features`) in another form; returns how many pictures there are.

    output: for ``format="shards"`` a folder that does not exist or is empty; for ``"pickle"`` a file, or a folder
    that gets ``blip3o_grid_embeddings.pkl``. samples_per_shard: pictures of one shard. dtype: float32, float16 or
    bfloat16 on disk; None: as stored, and int8 as float32. A pickle is always float32.
    Shards are written one at a time, and a source of shards or chunks is read one at a time. A single pickle is read
    whole, and written from memory. Shards hold out the pictures that their source does, by a ``split.json`` where their
    size says otherwise. The index comes last: what a killed conversion leaves is no set that can be read.
    Raises ValueError or FileNotFoundError naming the argument or the file; then nothing of the conversion is left.
    """
    if format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    if type(samples_per_shard) is not int or samples_per_shard < 1:
        raise ValueError(f"--samples_per_shard must be a whole number >= 1, got {samples_per_shard!r}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"--dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    features, target = open_features(source), Path(output)
    if format == "pickle":
        return _to_pickle(features, target, quiet)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output {target} exists and is not an empty folder; choose another one")
    made = not target.exists()
    try:
        count = _to_shards(features, target, samples_per_shard, None if dtype is None else FLOATS[dtype], quiet)
        rule = default_rule(source)
        if rule != default_rule(target):  # a set must not change its held-out pictures with its size on disk
            write_text(target / RULE_FILE, json.dumps({"rule": rule}) + "\n")
        return count
    except BaseException:
        for left in target.iterdir() if target.is_dir() else ():  # it was empty before
            left.unlink()
        if made and target.is_dir():
            target.rmdir()
        raise


class _Pieces:
    """Blocks of any size -> pieces of one size, the last one smaller."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: list[tuple[Tensor, Tensor, list[str], list[str]]] = []
        self.count = 0

    def add(self, condition: Tensor, target: Tensor, keys: list[str], captions: list[str]) -> None:
        self.held.append((condition, target, keys, captions))
        self.count += len(keys)

    def take(self, rest: bool = False) -> Iterator[tuple[Tensor, Tensor, list[str], list[str]]]:
        while self.count >= self.size or (rest and self.count):
            condition = torch.cat([held[0] for held in self.held])
            target = torch.cat([held[1] for held in self.held])
            keys = [key for held in self.held for key in held[2]]
            captions = [caption for held in self.held for caption in held[3]]
            n = min(self.size, self.count)
            yield condition[:n], target[:n], keys[:n], captions[:n]
            self.held, self.count = [], self.count - n
            if self.count:  # copies, so that the piece that was written can be freed
                self.held = [(condition[n:].clone(), target[n:].clone(), keys[n:], captions[n:])]


def _to_shards(features: FeatureSet, folder: Path, size: int, dtype: torch.dtype | None, quiet: bool) -> int:
    writer: ShardWriter | None = None
    pieces, number, total = _Pieces(size), 0, 0
    with tqdm(total=features.count, unit=" pictures", disable=quiet) as bar:
        for block in features.blocks():
            if writer is None:
                meta = features.meta_for(block)
                writer = ShardWriter(folder, meta)
            condition, target = (t if dtype is None else t.to(dtype) for t in (block.condition, block.target))
            for name, found, wanted in (("eva", condition, meta.condition.dim), ("clip", target, meta.target.dim)):
                if found.shape[1:] != (meta.tokens, wanted):
                    raise ValueError(
                        f"{block.file}: {name} has the shape {tuple(found.shape)}; the files before it have "
                        f"[n, {meta.tokens}, {wanted}]"
                    )
            pieces.add(condition, target, block.keys, block.captions)
            for piece in pieces.take():
                writer.write(number, *piece, f"{features.path.name} {shard_name(number)}", listed=False)
                number, total = number + 1, total + len(piece[2])
                bar.update(len(piece[2]))
        if writer is None:
            raise ValueError(f"{features.path}: holds no picture")
        for piece in pieces.take(rest=True):
            writer.write(number, *piece, f"{features.path.name} {shard_name(number)}", listed=False)
            number, total = number + 1, total + len(piece[2])
            bar.update(len(piece[2]))
    writer.write_index()
    return total


def _to_pickle(features: FeatureSet, target: Path, quiet: bool) -> int:
    path = target / PICKLE if target.is_dir() or target.suffix != ".pkl" else target
    if path.exists():
        raise ValueError(f"--output {path} exists; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if features.kind == "shards":
        if not features.files:
            raise ValueError(f"{features.path}: holds no picture")
        write_pickle(features.path, path)
        return features.count or 0
    # A pickle's shapes and names are checked on the way into shards.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as folder:
        count = _to_shards(features, Path(folder), 1000, None, quiet)
        write_pickle(folder, path)
    return count
