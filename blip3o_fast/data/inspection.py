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
from .manifest import MANIFEST, Manifest

# What one H100 trains at 55 % of its peak, a sample being 64 tokens of 1280 and of 768 in half precision.
SAMPLES_PER_GPU = 1200
_PICTURES = 8  # in the image of the grids
_NORMS_KEPT = 200_000
_ROWS = 64  # at once in float64


@dataclass
class Side:
    """One side of a set. Sums are float64, over all tokens that are finite."""

    width: int
    dtypes: set[str] = field(default_factory=set)
    tokens: int = 0
    not_finite: list[str] = field(default_factory=list)  # keys
    norms: list[Tensor] = field(default_factory=list)  # of the first `kept` tokens, for the figure
    kept: int = 0
    norm_least: float = float("inf")
    norm_most: float = 0.0
    first: Tensor | None = None

    def __post_init__(self) -> None:
        self.mean, self.spread = torch.zeros(2, self.width, dtype=torch.float64)  # spread: the sum of squares around it
        self.norm_sums = torch.zeros(2, dtype=torch.float64)  # of the norms and of their squares

    def add(self, features: Tensor, keys: list[str]) -> None:
        self.dtypes.add(str(features.dtype).removeprefix("torch."))
        for part, names in zip(features.split(_ROWS), (keys[i:] for i in range(0, len(keys), _ROWS)), strict=True):
            finite = torch.isfinite(part).flatten(1).all(dim=1)
            self.not_finite += [key for key, good in zip(names, finite.tolist(), strict=False) if not good]
            if bool(finite.any()):
                self._add(part[finite].double())

    def _add(self, features: Tensor) -> None:
        flat = features.reshape(-1, self.width)
        mean, tokens = flat.mean(0), self.tokens + len(flat)
        gap = mean - self.mean
        # The moments of two sets put together: sums of squares alone lose the deviations of channels far from zero.
        self.spread += (flat - mean).square().sum(0) + gap.square() * (self.tokens * len(flat) / tokens)
        self.mean += gap * (len(flat) / tokens)
        self.tokens = tokens
        norms = flat.norm(dim=-1)
        self.norm_sums += torch.stack([norms.sum(), norms.square().sum()])
        self.norm_least, self.norm_most = (
            min(self.norm_least, float(norms.min())),
            max(self.norm_most, float(norms.max())),
        )
        if self.kept < _NORMS_KEPT:
            self.norms.append(norms[: _NORMS_KEPT - self.kept].float())
            self.kept += len(self.norms[-1])
        if self.first is None or len(self.first) < _PICTURES:
            some = features[:_PICTURES].float()
            self.first = some if self.first is None else torch.cat([self.first, some])[:_PICTURES]

    def channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float64 [width]."""
        return self.mean, (self.spread / max(1, self.tokens)).sqrt()

    def lines(self, name: str) -> list[str]:
        norm, squares = (self.norm_sums / max(1, self.tokens)).tolist()
        mean, deviation = self.channels()
        dead = int((deviation == 0).sum())
        return [
            f"{name:11} width {self.width}, stored as {', '.join(sorted(self.dtypes))}; token norms "
            f"{norm:.3g} +- {max(0.0, squares - norm**2) ** 0.5:.2g} "
            f"({min(self.norm_least, self.norm_most):.3g} to {self.norm_most:.3g})",
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
    checksums: str
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
                lines.append(f"            made by {info}")
        lines.append(
            f"repeated    {self.repeated_keys} keys, {self.repeated_features} pictures with another's features"
        )
        lines.append(f"captions    {self.pictures - self.without_caption} of {self.pictures}")
        lines += [f"            {caption[:100]!r}" for caption in self.captions]
        lines.append(
            f"reading     {rate:.0f} MB/s from where it lies: {rate * 1e6 / (SAMPLES_PER_GPU * sample):.1f} GPUs at "
            f"{SAMPLES_PER_GPU} pictures/s each"
        )
        lines.append(f"checksums   {self.checksums}")
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
    checksums, faults = _compare_checksums(features)
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
        features,
        pictures,
        tokens,
        *sides,
        shown,
        without,
        _repeats(keys),
        _repeats(digests),
        size,
        seconds,
        checksums,
        faults,
    )
    if figure is not None:
        from .inspection_plot import draw

        draw(found, Path(figure))
    return found


def _compare_checksums(features: FeatureSet) -> tuple[str, list[str]]:
    """What to say of the files' checksums, and what is wrong with them; a manifest is what `extract` writes."""
    recorded = Manifest.read(features.path).shards if features.path.is_dir() else {}
    if not recorded:
        return "none recorded", []
    faults = []
    for path in features.files:
        wanted = recorded.get(path.name, {}).get("sha256")
        if wanted is None:
            faults.append(f"{path}: {MANIFEST} does not list it")
        elif path.is_file():  # if not, reading it says so
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                    faults.append(f"{path}: its SHA-256 is not the one that {MANIFEST} records")
    return f"{len(features.files) - len(faults)} of {len(features.files)} files as {MANIFEST} records them", faults


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
                os.fsync(file.fileno())  # what is not written yet is not let go
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while piece := file.read(8 << 20):
                done += len(piece)
            seconds += time.perf_counter() - start
    return seconds * size / max(1, done), size
