"""The figure of `inspect`: how long the tokens are, and the first grids in the colours of their main directions."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.files import replacing

from .inspection import Inspection


def draw(found: Inspection, path: Path) -> Path:
    """Write the figure; its suffix names the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = {"condition": found.condition, "target": found.target}
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 5), gridspec_kw={"width_ratios": (1, 1.6)})
    for row, (name, side) in zip(axes, sides.items(), strict=True):
        row[0].hist(torch.cat(side.norms).numpy(), bins=60, color="#0072b2")
        row[0].set(title=f"{name}: norms of {side.kept} tokens", xlabel="L2 norm", ylabel="tokens")
        assert side.first is not None
        row[1].imshow(grids(side.first).numpy(), interpolation="nearest")
        row[1].set(title=f"{name}: the first {len(side.first)} pictures, 3 main directions as RGB")
        row[1].axis("off")
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format=path.suffix.removeprefix(".") or "png")
    pyplot.close(figure)
    return path


def grids(features: Tensor) -> Tensor:
    """``[n, T, C]`` -> an RGB image in [0, 1]: n grids side by side, by the three main directions of all tokens."""
    count, tokens, width = features.shape
    side = math.isqrt(tokens)
    flat = features[:, : side * side].reshape(-1, width).float()
    centred = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    colours = centred @ directions[:3].T
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))
    low, high = colours.quantile(0.01, dim=0), colours.quantile(0.99, dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    image = torch.ones(side, count * (side + 1) - 1, 3)  # a white line between
    for i, grid in enumerate(colours.reshape(count, side, side, 3)):
        image[:, i * (side + 1) : i * (side + 1) + side] = grid
    return image
