"""Initial weights: the distributions of the torch modules that stock diffusers is made of, drawn in its order.

With the same seed the weights are stock's, bit for bit: training from scratch here and there starts at the same point.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


def initialise(model: Any, generator: torch.Generator | None = None) -> None:
    """Draw every parameter of a `BLIP3oDiT`. generator: on the parameters' device; None is torch's global one.

    Linear: uniform in +-1/sqrt(in_features), weight and bias. Norms 1 and 0, attention gates 0. The adaLN layers and
    the head are drawn like any other: stock does not start them at zero.
    """
    config = model.config
    with torch.no_grad():
        if config.context_projection:
            _draw_all(model.caption_projection, generator)
        else:
            model.pad_token.zero_()  # stock leaves it as the memory was; nothing reads it
        _draw_all(model.patch_embedder, generator)
        _draw_all(model.time_caption_embed, generator)
        for block in model.layers:
            block.gate.zero_()
            attn1, attn2, feed_forward = block.attn1, block.attn2, block.feed_forward
            for layer in (attn1.to_q, attn1.to_k, attn1.to_v):
                _draw(layer, generator)
            # Stock builds an output projection for attn1 too, and throws it away after its draw.
            _draw_weight(torch.empty_like(attn2.to_out[0].weight), generator)
            for layer in (attn2.to_q, attn2.to_k, attn2.to_v, attn2.to_out[0]):
                _draw(layer, generator)
            for layer in (feed_forward.linear_1, feed_forward.linear_2, feed_forward.linear_3):
                _draw(layer, generator)
            _draw(block.norm1.linear, generator)
            for norm in (attn1.norm_q, attn1.norm_k, attn2.norm_q, attn2.norm_k):
                if norm is not None:
                    norm.reset_parameters()
            for norm in (block.norm1.norm, block.ffn_norm1, block.norm2, block.ffn_norm2, block.norm1_context):
                norm.weight.fill_(1.0)
        _draw_all(model.norm_out, generator)


def _draw_all(module: nn.Module, generator: torch.Generator | None) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            _draw(layer, generator)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


def _draw(layer: nn.Linear, generator: torch.Generator | None) -> None:
    _draw_weight(layer.weight, generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _draw_weight(weight: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
