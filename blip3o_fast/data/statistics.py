"""Normalisation statistics of a folder that memory does not hold: one pass over the shards, kept beside them.

The same numbers as `FeatureNormalizers.fit` on everything at once, to about 1e-6: sums are in fp64 and taken about the
first chunk's mean, so that a large mean does not drown a small spread.

What was fitted lies in ``<folder>/statistics/<digest>/normalizer.safetensors``. The digest names the description, the
index, every shard's size and time, the spec and the split, so other data or another split finds nothing and fits anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.models.normalizer import FeatureNormalizers, Normalizer, condition_spec, parse_spec
from blip3o_fast.models.normalizer_fit import pca_statistics, usable_std

from .mapped import MappedShards
from .shards import INDEX, META
from .stored import TENSORS, scale_name, to_float

FOLDER = "statistics"
_CHUNK = 256  # pictures read at a time


class StreamedFit:
    """The statistics of one side, from chunks ``[n, T, C]`` that come one after another."""

    def __init__(self, channels: int, spec: str) -> None:
        self.spec, self.channels = spec, channels
        self.kind, self.components = parse_spec(spec)
        self.count = 0
        self.shift = torch.zeros(channels, dtype=torch.float64)
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)
        self.length = torch.zeros((), dtype=torch.float64)
        wide = channels if self.kind == "pca" else 0
        self.products = torch.zeros(wide, wide, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        tokens = features.reshape(-1, self.channels).double()
        if self.count == 0:
            self.shift = tokens.mean(0)
        self.count += len(tokens)
        if self.kind == "l2":
            self.length += torch.linalg.vector_norm(tokens, dim=-1).sum()
            return
        moved = tokens - self.shift
        self.total += moved.sum(0)
        if self.kind == "pca":
            # fp32 products of centred rows, summed in fp64, as in `normalizer_fit`
            self.products += (moved.float().T @ moved.float()).double()
        else:
            self.squares += moved.square().sum(0)

    def normalizer(self) -> Normalizer:
        """ValueError where nothing came, or where PCA is asked for more directions than the tokens vary in."""
        if not self.count:
            raise ValueError("features: got none; at least one picture is needed")
        if self.components is not None and self.components > self.channels:
            raise ValueError(f"normalize: {self.spec!r} asks for more components than the {self.channels} channels")
        moved = self.total / self.count  # the mean, seen from the shift
        mean = self.shift + moved
        statistics: dict[str, Tensor] = {}
        if self.kind == "l2":
            statistics = {"length": self.length / self.count}
        elif self.kind == "standardize":
            std = (self.squares / self.count - moved.square()).clamp_min(0).sqrt()
            statistics = {"mean": mean, "std": usable_std(std, mean)}
        elif self.components is not None:
            covariance = self.products / self.count - torch.outer(moved, moved)
            statistics = pca_statistics(mean, covariance, self.count, self.components)
        return Normalizer(self.spec, self.channels, {name: value.float() for name, value in statistics.items()})


def fit_stream(chunks: Iterable[tuple[Tensor, Tensor]], spec: str, widths: tuple[int, int]) -> FeatureNormalizers:
    """`FeatureNormalizers.fit` over chunks of (condition ``[n, T, E]``, target ``[n, T, C]``), each seen once."""
    sides = StreamedFit(widths[0], condition_spec(spec)), StreamedFit(widths[1], spec)
    for chunk in chunks:
        for side, features in zip(sides, chunk, strict=True):
            side.add(features)
    return FeatureNormalizers(sides[0].normalizer(), sides[1].normalizer())


def read_side(part: dict[str, Tensor], side: str) -> Tensor:
    """One side of what `MappedShards.gather` returns, as floats (int8 times its scale)."""
    name = TENSORS[side]
    return to_float(part[name], part.get(scale_name(name)))


def fit_shards(shards: MappedShards, rows: Tensor, spec: str) -> FeatureNormalizers:
    """Fit on ``rows`` (int64, ascending) of a folder, in chunks."""
    widths = shards.meta.condition.dim, shards.meta.target.dim
    if parse_spec(spec)[0] == "none":  # nothing to estimate: nothing is read
        return FeatureNormalizers(Normalizer("none", widths[0]), Normalizer("none", widths[1]))
    parts = (shards.gather(some) for some in rows.split(_CHUNK))
    return fit_stream(((read_side(part, "condition"), read_side(part, "target")) for part in parts), spec, widths)


def stored_or_fitted(
    shards: MappedShards, rows: Tensor, spec: str, split: dict[str, object], *, write: bool = True
) -> FeatureNormalizers:
    """The folder's statistics for ``spec`` on the split's ``rows``: as stored, else fitted and, with ``write``, stored.

    split: what decides the rows (rule, share); part of the name. A folder that cannot be written to is fitted every
    time, which is said; a stored file that cannot be read is fitted anew.
    """
    if parse_spec(spec)[0] == "none":
        return fit_shards(shards, rows, spec)
    folder = shards.folder / FOLDER / digest(shards, spec, split)
    try:
        return FeatureNormalizers.load(folder)
    except (FileNotFoundError, ValueError):
        pass
    fitted = fit_shards(shards, rows, spec)
    if write and not shards.bad:  # statistics of a damaged set are not those of the set
        try:
            fitted.save(folder)
        except OSError as error:
            print(f"note: {folder}: the statistics could not be stored ({error}); every run will fit them again")
    return fitted


def digest(shards: MappedShards, spec: str, split: dict[str, object]) -> str:
    """Names the data, the spec and the split; another name whenever a shard, the index or meta.json was touched."""
    found = hashlib.sha256((shards.folder / META).read_bytes())
    with open(shards.folder / INDEX, "rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    for name in shards.names:
        path: Path = shards.folder / name
        state = path.stat() if path.is_file() else None
        found.update(json.dumps([name, state and state.st_size, state and state.st_mtime_ns]).encode())
    found.update(json.dumps([spec, split], sort_keys=True).encode())
    return found.hexdigest()[:32]
