"""Conditions read a batch at a time, for a set that memory does not hold.

    reader = open_conditions("runs/embeddings", split="eval")
    reader.read(0, 64)                  # float32 [64, T, E]: the first 64 pictures of the split

The pictures stand in the order of the file, not in the split's random one: then a batch lies in one or two shards, in
one stretch of each. Of a folder of shards only the index is held. The original's pickle is one object and has to be
read whole.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .dataset import EmbeddingDataset, check_arguments
from .shards import INDEX, META, Row, positions_by_shard, read_index, read_meta
from .splits import default_rule, split_rows
from .stored import StoredSide

# Of a large file this much of its beginning (where safetensors keeps its table) and of its end is looked at.
_PEEK = 1 << 20


class ConditionReader(Protocol):
    """Conditions of some pictures.

    indices: int64 [n], ascending, the pictures' rows of the file. keys: their names. width: E. fingerprint: of the
    file's content, see `fingerprint`.
    """

    indices: Tensor
    keys: list[str]
    width: int
    fingerprint: str

    def read(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, T, E] on the CPU, as stored; ValueError naming the file and row that is not finite."""
        ...


def open_conditions(
    path: str | os.PathLike[str], *, split: str = "all", eval_split: float = 0.1, num_samples: int | None = None
) -> ConditionReader:
    """Conditions of a folder of shards or of the original's pickle.

    path, split, eval_split: as of `EmbeddingDataset`, and with the same pictures in the split. num_samples: the first
    so many pictures of the split (in its random order, as everywhere), None: all.
    Raises FileNotFoundError or ValueError naming the file or argument, what was found and what is allowed.
    """
    check_arguments(split, eval_split, "none", num_samples)
    if not (Path(path) / META).is_file():
        return MemoryConditions(EmbeddingDataset(path, split=split, eval_split=eval_split), num_samples)
    index = read_index(path)
    train, held_out = split_rows((row.key for row in index), len(index), eval_split, default_rule(path))
    rows = {"train": train, "eval": held_out, "all": torch.arange(len(index))}[split][:num_samples]
    if len(rows) == 0:
        raise ValueError(
            f"split: {split!r} of the {len(index)} pictures in {path} is empty with eval_split={eval_split}"
        )
    return ShardConditions(Path(path), index, rows.sort().values)


class ShardConditions:
    """A `ConditionReader` of some rows of a folder of shards; one shard is open at a time."""

    def __init__(self, folder: Path, index: list[Row], indices: Tensor) -> None:
        self.folder, self.meta, self.indices = folder, read_meta(folder), indices
        self._counts = {shard: len(positions) for shard, positions in positions_by_shard(folder, index).items()}
        self.width, self.fingerprint = self.meta.condition.dim, fingerprint(folder)
        chosen = [index[i] for i in indices.tolist()]
        self.keys = [row.key for row in chosen]
        self._places = [(row.shard, row.row) for row in chosen]
        self._open: tuple[str, Any] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, self.meta.tokens, self.width)
        places = self._places[start:stop]
        first = 0
        while first < len(places):
            shard, row = places[first]
            last = first + 1
            while last < len(places) and places[last] == (shard, row + last - first):
                last += 1
            out[first:last] = self._stored(shard)[row : row + last - first]  # a stretch of the file, as fp32
            first = last
        finite = torch.isfinite(out).flatten(1).all(1)
        if not bool(finite.all()):
            shard, row = places[int((~finite).nonzero()[0])]
            raise ValueError(f"{self.folder / shard}: condition has NaN or Inf in row {row}")
        return out

    def _stored(self, shard: str) -> Any:
        """The condition of a shard, of which slices are read."""
        from safetensors import SafetensorError, safe_open

        if self._open is None or self._open[0] != shard:
            path = self.folder / shard
            try:
                stored = StoredSide(safe_open(path, framework="pt"), "condition")
            except SafetensorError as error:
                raise ValueError(f"{path}: has no whole condition ({error}); delete it and extract again") from error
            shape, wanted = stored.shape, [self._counts[shard], self.meta.tokens, self.width]
            if shape != wanted or stored.dtype not in ("F32", "F16", "BF16", "I8"):
                raise ValueError(
                    f"{path}: condition is {stored.dtype} {shape}; {META} and {INDEX} say {wanted}, "
                    "as F32, F16, BF16 or I8"
                )
            self._open = shard, stored
        return self._open[1]


class MemoryConditions:
    """A `ConditionReader` of an `EmbeddingDataset` that is in memory, which must be raw (normalize="none")."""

    def __init__(self, dataset: EmbeddingDataset, num_samples: int | None = None) -> None:
        if dataset.normalizer.condition.spec != "none":
            raise ValueError(
                f"dataset: its conditions are normalised ({dataset.normalizer.condition.spec}), but the model does "
                "that itself; make the EmbeddingDataset with normalize='none'"
            )
        order = dataset.indices[:num_samples].argsort()
        self.indices = dataset.indices[order]
        self.keys = [dataset.keys[i] for i in order.tolist()]
        self.width, self.fingerprint = dataset.conditions.shape[2], fingerprint(dataset.path)
        self._conditions, self._order = dataset.conditions, order

    def read(self, start: int, stop: int) -> Tensor:
        return self._conditions[self._order[start:stop]]


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Tells one set of embeddings from another without reading all of it; where the folder lies does not count.

    Of a folder: the description, the whole index, and of every shard its size, beginning and end; of a pickle the
    latter.
    """
    path, digest = Path(path), hashlib.sha256()
    files = [path]
    if path.is_dir():
        digest.update((path / META).read_bytes())
        digest.update((path / INDEX).read_bytes())
        files = [path / name for name in sorted({row.shard for row in read_index(path)})]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but {path / INDEX} lists pictures of it; extract again")
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(opened.read(_PEEK))
            opened.seek(max(0, size - _PEEK))
            digest.update(opened.read(_PEEK))
    return digest.hexdigest()
