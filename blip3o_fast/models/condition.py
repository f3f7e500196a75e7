"""What depends on the condition alone: made once, used at every step of a sampling run.

Neither x_t nor the time enters the projected context, its mean, or any block's cross-attention keys and values, so a
sampler that calls the network thirty times with one condition needs them once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blip3o_fast.models import forward as fused
from blip3o_fast.models.packed import PackedBlock


@dataclass(frozen=True, eq=False)
class PreparedCondition:
    """A condition as `BLIP3oDiT.prepare_condition` returns it, to be given as `encoder_hidden_states`.

    It is of the weights that made it: after a change of weights, dtype or device prepare it again.

    context: [B, L, E'], projected. pooled: [B, E'], its mean over the attended tokens. mask: bool [B, L] or None.
    keys_values: per block (k2, v2), [B, L, K, d] each, or None for a block that takes the stock path.
    """

    context: Tensor
    pooled: Tensor
    mask: Tensor | None
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...]

    def rows(self, start: int, stop: int) -> "PreparedCondition":
        """Of samples start to stop - 1 alone; views, nothing is copied."""
        some = slice(start, stop)
        return PreparedCondition(
            self.context[some],
            self.pooled[some],
            None if self.mask is None else self.mask[some],
            tuple(None if made is None else (made[0][some], made[1][some]) for made in self.keys_values),
        )


def prepare(
    model: Any,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor | None,
    packed: Sequence[PackedBlock | None] | None = None,
) -> PreparedCondition:
    """encoder_hidden_states [B, L, E] and its mask, through everything that needs nothing else.

    packed: the blocks with their weights packed, None for one that runs by itself.
    """
    context = fused.project_context(model, encoder_hidden_states)
    packed = packed or [None] * len(model.layers)
    return PreparedCondition(
        context,
        fused.pool_context(context, encoder_mask),
        None if encoder_mask is None else encoder_mask.bool(),
        tuple(_key_value(*pair, context) for pair in zip(model.layers, packed, strict=True)),
    )


def _key_value(layer: Any, packed: PackedBlock | None, context: Tensor) -> tuple[Tensor, Tensor] | None:
    if packed is not None:
        return packed.context_key_value(context)
    return fused.context_key_value(layer, context) if fused.fusable(layer) else None
