"""What depends on the time and the condition alone: the modulations of all blocks and the head, for many times at once.

A block's modulation is a Linear of silu(y), y = time embedding + pooled context, and x_t does not enter it. A sampler
knows its times before it starts, so it makes the modulations of a chunk of them together: one product of
[times * batch, A] rows per layer reads the layer's weights once, where a product per step reads them at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_fast.models import forward as fused
from blip3o_fast.models.condition import PreparedCondition
from blip3o_fast.models.modules import NextDiTBlock
from blip3o_fast.models.packed import PackedBlock


@dataclass(frozen=True, eq=False)
class StepModulations:
    """Of one time and one condition, to be given to the call of the model with the same two.

    They are of the weights that made them: after a change of weights, dtype or device make them again.

    y: [B, A]; conditioning: silu(y). layers: per block [B, 4 D], or None for a block that makes its own from y (one
    that is hooked, wrapped, or whose Linear is an adapter). head: [B, D], or None likewise.
    """

    y: Tensor
    conditioning: Tensor
    layers: tuple[Tensor | None, ...]
    head: Tensor | None


def step_bytes(config: Any, batch: int, dtype: torch.dtype) -> int:
    """Bytes of one `StepModulations`."""
    values = 2 * config.conditioning_dim + (4 * config.num_layers + 1) * config.hidden_size
    return batch * values * dtype.itemsize


def make_modulations(
    model: Any,
    condition: PreparedCondition,
    timesteps: Tensor,
    packed: Sequence[PackedBlock | None] | None = None,
) -> list[StepModulations] | None:
    """One per element of timesteps [S], in memory of `S * step_bytes`; None where y must be made call by call.

    That is where a module of the time embedding has a hook, which expects to be called with one batch.
    packed: the blocks with their weights packed, None for one that runs by itself.
    """
    if not all(fused.untouched(module) for module in model.time_caption_embed.modules()):
        return None
    steps, batch = timesteps.shape[0], condition.pooled.shape[0]
    time = fused.embed_time(model, timesteps, condition.pooled.dtype)
    y = time[:, None] + model.time_caption_embed.caption_embedder(condition.pooled)
    conditioning = F.silu(y)
    rows = conditioning.flatten(0, 1)

    # One product over all layers would need their weights side by side; each has tens of megabytes, so a product of
    # its own is no slower.
    blocks = packed or [None] * len(model.layers)
    layers = [_modulation(*pair, rows) for pair in zip(model.layers, blocks, strict=True)]
    head = model.norm_out.linear_1
    scale = fused.head_scale(model, rows.to(head.weight.dtype)) if fused.plain_linear(head) else None

    def of_step(made: Tensor | None, step: int) -> Tensor | None:
        return None if made is None else made[step * batch : (step + 1) * batch]

    return [
        StepModulations(y[s], conditioning[s], tuple(of_step(made, s) for made in layers), of_step(scale, s))
        for s in range(steps)
    ]


def _modulation(layer: Any, packed: PackedBlock | None, rows: Tensor) -> Tensor | None:
    if packed is not None:
        return packed.modulation(rows).made
    return fused.project(rows, (layer.norm1.linear,)) if fused.carries(layer, NextDiTBlock) else None
