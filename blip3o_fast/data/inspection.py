"""What a set of features holds, in one pass: counts, sizes, norms, faults, statistics, and how fast it can be read."""

from __future__ import annotations

import collections
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .blocks import FeatureSet, open_features

# What one H100 trains at 55 % of its peak, a sample being 64 tokens of 1280 and of 768 in half precision.
SAMPLES_PER_GPU = 1200
_PICTURES = 8  # in the image of the grids
_NORMS_KEPT = 200_000


@dataclass
class Side:
    """One side of a set. Sums are float64, over all tokens that are finite."""

    width: int
    dtypes: set[str] = field(default_factory=set)
    tokens: int = 0
    not_finite: list[str] = field(default_factory=list)  # keys
    total: Tensor | None = None
    squares: Tensor | None = None
    norms: list[Tensor] = field(default_factory=list)
    kept: int = 0
    first: Tensor | None = None

    def add(self, features: Tensor, keys: list[str]) -> None:
        self.dtypes.add(str(features.dtype).removeprefix("torch."))
        finite = torch.isfinite(features).flatten(1).all(dim=1)
        self.not_finite += [key for key, good in zip(keys, finite.tolist(), strict=True) if not good]
        features = features[finite].double()
        flat = features.reshape(-1, self.width)
        self.tokens += len(flat)
        total, squares = flat.sum(0), flat.square().sum(0)
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        if self.kept < _NORMS_KEPT:
            norms = flat.norm(dim=-1)[: _NORMS_KEPT - self.kept].float()
            self.norms.append(norms)
            self.kept += len(norms)
        if self.first is None or len(self.first) < _PICTURES:
            some = features[:_PICTURES].float()
            self.first = some if self.first is None else torch.cat([self.first, some])[:_PICTURES]

    def channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float64 [width]."""
        assert self.total is not None and self.squares is not None
        mean = self.total / max(1, self.tokens)
        return mean, (self.squares / max(1, self.tokens) - mean.square()).clamp(min=0).sqrt()

    def lines(self, name: str) -> list[str]:
        norms = torch.cat(self.norms) if self.norms else torch.zeros(1)
        mean, deviation = self.channels()
        dead = int((deviation == 0).sum())
        return [
            f"{name:11} width {self.width}, stored as {', '.join(sorted(self.dtypes))}; token norms "
            f"{norms.mean():.3g} +- {norms.std(unbiased=False):.2g} ({norms.min():.3g} to {norms.max():.3g})",
            f"            channels: means {mean.min():.3g} to {mean.max():.3g}, deviations {deviation.min():.3g} to "
            f"{deviation.max():.3g}" + (f"; {dead} never change" if dead else ""),
        ]


@dataclass
class Inspection:
    """The result of `inspect_features`; printed, it is the report. faults: what is wrong, one line each."""

    features: FeatureSet
    pictures: int
    tokens: int
    condition: Side
    target: Side
    captions: list[str]
    without_caption: int
    repeated_keys: int
    repeated_features: int
    bytes_read: int
    read_seconds: float
    faults: list[str]

    def __str__(self) -> str:
        size = self.bytes_read / 1e6
        rate = size / max(self.read_seconds, 1e-9)
        sample = self.bytes_read / max(1, self.pictures)
        meta = self.features.meta
        lines = [f"{self.features.path}: {self.features.kind}, {len(self.features.files)} files, {size:.1f} MB"]
        lines.append(f"pictures    {self.pictures}, {self.tokens} tokens each, {sample / 1e3:.0f} kB a picture")
        for name, side in (("condition", self.condition), ("target", self.target)):
            lines += side.lines(name)
            info = getattr(meta, name, None)
            if info is not None:
                made = "; ".join(t for t in (info.revision, info.tower, info.preprocessing, info.pooling) if t)
                lines.append(f"            made by {info.name}" + (f" ({made})" if made else ""))
        lines.append(
            f"repeated    {self.repeated_keys} keys, {self.repeated_features} pictures with another's features"
        )
        lines.append(f"captions    {self.pictures - self.without_caption} of {self.pictures}")
        lines += [f"            {caption[:100]!r}" for caption in self.captions]
        lines.append(
            f"reading     {rate:.0f} MB/s from where it lies: {rate * 1e6 / (SAMPLES_PER_GPU * sample):.1f} GPUs at "
            f"{SAMPLES_PER_GPU} pictures/s each"
        )
        lines += [f"FAULT       {fault}" for fault in self.faults] or ["faults      none"]
        return "\n".join(lines)


def inspect_features(
    path: str | os.PathLike[str], *, captions: int = 5, figure: str | os.PathLike[str] | None = None, quiet: bool = True
) -> Inspection:
    """Read a set once (see `open_features`) and say what it holds.

    captions: how many are shown. figure: where a picture of the norms and of the first grids is written (PNG, SVG).
    A damaged shard is a fault of the result, not an error; raises ValueError or FileNotFoundError where the set itself
    cannot be opened, ModuleNotFoundError where a figure is wanted and matplotlib is not there.
    """
    if captions < 0:
        raise ValueError(f"--captions must be a whole number >= 0, got {captions}")
    if figure is not None:
        import matplotlib  # noqa: F401  (before hours of reading)
    features = open_features(path)
    seconds, size = _read_speed(features.files)
    sides: tuple[Side, Side] | None = None
    faults: list[str] = []
    shown: list[str] = []
    keys: collections.Counter[str] = collections.Counter()
    digests: collections.Counter[bytes] = collections.Counter()
    pictures = without = tokens = 0
    with tqdm(total=features.count, unit=" pictures", disable=quiet) as bar:
        for file in features.files:
            try:
                block = features.block(file)
            except (ValueError, OSError) as error:  # which names the file
                faults.append(str(error))
                continue
            if sides is None:
                sides = Side(block.condition.shape[-1]), Side(block.target.shape[-1])
                tokens = block.condition.shape[1]
            if (block.condition.shape[-1], block.target.shape[-1]) != (sides[0].width, sides[1].width):
                faults.append(f"{block.file}: widths differ from those of the files before it")
                continue
            sides[0].add(block.condition, block.keys)
            sides[1].add(block.target, block.keys)
            keys.update(block.keys)
            digests.update(hashlib.blake2b(_bytes(picture), digest_size=16).digest() for picture in block.condition)
            without += sum(not caption.strip() for caption in block.captions)
            shown += [caption for caption in block.captions if caption.strip()][: captions - len(shown)]
            pictures += len(block.keys)
            bar.update(len(block.keys))
    if sides is None:
        raise ValueError("\n".join(faults) or f"{features.path}: holds no picture")
    if features.count is not None and features.count != pictures:
        faults.append(f"{features.count} pictures are listed, {pictures} could be read")
    for name, side in zip(("condition", "target"), sides, strict=True):
        if side.not_finite:
            some = ", ".join(side.not_finite[:3]) + (" ..." if len(side.not_finite) > 3 else "")
            faults.append(f"{name}: NaN or Inf in {len(side.not_finite)} pictures ({some})")
    found = Inspection(
        features, pictures, tokens, *sides, shown, without, _repeats(keys), _repeats(digests), size, seconds, faults
    )
    if figure is not None:
        from .inspection_plot import draw

        draw(found, Path(figure))
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _repeats(counted: collections.Counter[str] | collections.Counter[bytes]) -> int:
    return sum(count - 1 for count in counted.values())


def _read_speed(files: list[Path], most: int = 1 << 30) -> tuple[float, int]:
    """Seconds that all files would take to read, by the first GB of them, and their bytes; past the page cache where
    the system lets it go."""
    size = sum(path.stat().st_size for path in files if path.is_file())
    done, seconds = 0, 0.0
    for path in files:
        if done >= most or not path.is_file():
            continue
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while piece := file.read(8 << 20):
                done += len(piece)
            seconds += time.perf_counter() - start
    return seconds * size / max(1, done), size
