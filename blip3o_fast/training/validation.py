"""The evaluation loss: velocity error on held-out pictures at fixed noise levels and fixed noise.

The training loss draws a new noise level for each sample, so it scatters by a factor of several and two runs can hardly
be compared. Here picture i meets the same noise and the same levels in every run, whatever its seed, batch size or
timestep sampling: two numbers differ because two models differ. The conditional velocity is measured, without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_fast.flow.loss import velocity_from_model
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.ops._philox import normal_noise_at

# Midpoints of equal buckets, and what keeps an evaluation to a few seconds. Changing either makes new numbers
# incomparable with old ones.
NUM_LEVELS = 8
MAX_PICTURES = 256
NOISE_SEED = 0x0B113


def levels() -> list[float]:
    """The noise levels: midpoints of `NUM_LEVELS` equal buckets of [0, 1]."""
    return [(i + 0.5) / NUM_LEVELS for i in range(NUM_LEVELS)]


def evenly_spaced(n: int, most: int) -> Tensor:
    """int64 indices of at most ``most`` of ``n`` pictures, evenly spread."""
    if n <= most:
        return torch.arange(n)
    return torch.arange(most) * n // most


@dataclass
class Validation:
    """Held-out pictures and what to measure on them.

    Args:
        conditions, targets: ``[n, T, E]`` and ``[n, T, C]`` as the network sees them; at most 256 pictures are used.
        config: the model's BLIP3oConfig (path, prediction type, time convention).
        batch_size: pictures per forward pass.
        linear_losses: the best linear velocity's loss at each level (`flow.yardstick`), or None.
        more: ``model -> metrics``, measured too (on the main process only), generation quality for example.
    """

    conditions: Tensor
    targets: Tensor
    config: Any
    batch_size: int = 64
    linear_losses: list[float] | None = None
    more: Callable[[nn.Module], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        if not len(self.conditions) or len(self.conditions) != len(self.targets):
            raise ValueError(
                f"conditions and targets must be equally many and at least 1, got {len(self.conditions)} and "
                f"{len(self.targets)}"
            )
        self.pictures = evenly_spaced(len(self.conditions), MAX_PICTURES)

    @torch.no_grad()
    def run(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """``loss`` (mean over the levels), ``loss_sigma_0.06`` ..., ``loss_over_linear``, and what `more` adds.

        The model must be in eval mode. With several ranks each takes every world_size-th picture and ``reduce`` sums
        a float64 tensor over them.
        """
        path = FlowPath(self.config.schedule, self.config.sigma_min, self.config.sigma_max)
        sums = torch.zeros(NUM_LEVELS + 1, dtype=torch.float64, device=device)
        for pictures in self.pictures[rank::world_size].split(self.batch_size):
            data = self.targets[pictures].to(device).float()
            condition = self.conditions[pictures].to(device)
            noise = normal_noise_at(NOISE_SEED, pictures.to(device), data.shape[1:])
            for k, level in enumerate(levels()):
                sigma = torch.full((len(data),), level, device=device)
                x_t = path.interpolate(data, noise, sigma)
                velocity = velocity_from_model(model, x_t, sigma, condition, None, self.config)
                error = velocity.float() - path.velocity(data, noise, sigma)
                sums[k] += error.square().mean(dim=(1, 2)).sum(dtype=torch.float64)
            sums[-1] += len(pictures)
        if reduce is not None:
            sums = reduce(sums)
        losses = (sums[:-1] / sums[-1]).tolist()
        metrics = {"loss": sum(losses) / NUM_LEVELS}
        if self.linear_losses is not None:
            metrics["loss_over_linear"] = sum(losses) / sum(self.linear_losses)
        metrics |= {f"loss_sigma_{level:.2f}": loss for level, loss in zip(levels(), losses, strict=True)}
        if self.more is not None and rank == 0:
            metrics |= self.more(model)
        return metrics
