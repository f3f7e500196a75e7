"""What depends on the condition alone: made once, used at every step of a sampling run.

Neither x_t nor the time enters the projected context, its mean, or any block's cross-attention keys and values, so a
sampler that calls the network thirty times with one condition needs them once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blip3o_fast.models import forward as fused


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


def prepare(
    model: Any,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor | None,
    projections: Sequence[Any] | None = None,
) -> PreparedCondition:
    """encoder_hidden_states [B, L, E] and its mask, through everything that needs nothing else.

    projections: per block, who computes its matrix products (None: the block itself).
    """
    context = fused.project_context(model, encoder_hidden_states)
    products = projections or [None] * len(model.layers)
    return PreparedCondition(
        context,
        fused.pool_context(context, encoder_mask),
        None if encoder_mask is None else encoder_mask.bool(),
        tuple(
            fused.context_key_value(block, context, product) if fused.fusable(block) else None
            for block, product in zip(model.layers, products, strict=True)
        ),
    )
