"""From a picture to a network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input: ``(rgb - mean) / std``, rgb in 0..255."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: bool  # True: the shorter side becomes `shorter`, the centre is cut out. False: the whole picture, squeezed
    shorter: int = 0  # pixels of the shorter side before the cut; 0 is `size`
    interpolation: str = "bicubic"
    round_margins: bool = False  # of what is cut off, an odd number of pixels: torchvision rounds the half to even

    def __call__(self, picture: Image) -> Tensor:
        """Float32 ``[3, size, size]`` of an RGB picture of any size."""
        import numpy
        from PIL.Image import Resampling

        how = Resampling[self.interpolation.upper()]
        if self.crop:
            picture = _bounded_aspect(picture)
            width, height = picture.size
            shorter = self.shorter or self.size
            # the longer side is cut to a whole number of pixels, as the processors of CLIP do
            scaled = (shorter, int(shorter * height / width))
            if width > height:
                scaled = (int(shorter * width / height), shorter)
            picture = picture.resize(scaled, how)
            left, top = (self._margin(side - self.size) for side in scaled)
            picture = picture.crop((left, top, left + self.size, top + self.size))
        else:
            picture = picture.resize((self.size, self.size), how)
        pixels = torch.from_numpy(numpy.array(picture, dtype=numpy.float32)).permute(2, 0, 1)
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def _margin(self, over: int) -> int:
        return round(over / 2) if self.round_margins else over // 2

    def __str__(self) -> str:
        how = "aspect not kept"
        if self.crop:
            how = f"shorter side{f' to {self.shorter}' if self.shorter else ''}, centre crop"
            how += " of torchvision" if self.round_margins else ""
        return f"{self.size}x{self.size} {self.interpolation} ({how}), mean {self.mean}, std {self.std}"


def clip_preprocessing(size: int) -> Preprocessing:
    """That of OpenAI's CLIP, which EVA-CLIP shares, at any size."""
    mean, std = (tuple(255 * v for v in values) for values in (_CLIP_MEAN, _CLIP_STD))
    return Preprocessing(size, mean, std, crop=True)  # type: ignore[arg-type]


def torchvision_preprocessing(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], *, crop: bool, interpolation: str, shorter: int = 0
) -> Preprocessing:
    """As open_clip and timm prepare pictures: mean and standard deviation of rgb in 0..1, torchvision's crop."""
    means, stds = (tuple(255 * v for v in values) for values in (mean, std))
    return Preprocessing(size, means, stds, crop, shorter, interpolation, round_margins=True)  # type: ignore[arg-type]


def _bounded_aspect(picture: Image, limit: int = 32) -> Image:
    """A line of pixels would become gigabytes when its shorter side is scaled up: keep its middle."""
    width, height = picture.size
    across, down = min(width, limit * height), min(height, limit * width)
    left, top = (width - across) // 2, (height - down) // 2
    return picture.crop((left, top, left + across, top + down))
