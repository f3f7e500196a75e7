"""The network as stock diffusers runs it: the same operations in the same order, over the same parameters.

This is what "eager" means in the tests and benchmarks: what a user of `LuminaNextDiT2DModel` (diffusers,
`models/transformers/lumina_nextdit2d.py`) has today, also where diffusers is not installed. It is slower than the
forward of `BLIP3oDiT` and rounds more often in half precision; nothing else differs, except that an all-false context
mask row gives NaN here, as it does there.

Both functions call the layers (Linear, LayerNorm, RMSNorm) as modules, so hooks, offloading and adapters work; any
module tree with the stock names will do.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o_fast.models.patches import from_tokens, to_image
from blip3o_fast.models.rope import kept_rope_table


def _rotate(x: Tensor, image_rotary_emb: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * image_rotary_emb.unsqueeze(2)).flatten(3).type_as(x)


def _attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    query_rotary_emb: Tensor,
    key_rotary_emb: Tensor | None,
    head_dim: int,
    base_sequence_length: int | None,
) -> Tensor:
    """[B, T, H, d]. Proportional attention (base_sequence_length) is for self-attention only, as in stock."""
    batch, tokens, _ = hidden_states.shape
    query = attn.to_q(hidden_states)
    key = attn.to_k(encoder_hidden_states)
    value = attn.to_v(encoder_hidden_states)
    dtype = query.dtype
    heads, kv_heads = query.shape[-1] // head_dim, key.shape[-1] // head_dim
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    query = query.view(batch, -1, heads, head_dim)
    key = key.view(batch, -1, kv_heads, head_dim)
    value = value.view(batch, -1, kv_heads, head_dim)
    query = _rotate(query, query_rotary_emb)
    scale = None
    if key_rotary_emb is not None:
        key = _rotate(key, key_rotary_emb)
        scale = head_dim**-0.5
        if base_sequence_length is not None:
            scale *= math.sqrt(math.log(tokens, base_sequence_length))
    query, key = query.to(dtype), key.to(dtype)
    # Stock repeats and expands also where there is nothing to repeat or to mask.
    repeats = heads // kv_heads
    key = key.unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3)
    value = value.unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3)
    attention_mask = attention_mask.bool().view(batch, 1, 1, -1).expand(-1, heads, tokens, -1)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_mask, scale=scale
    )
    return attended.transpose(1, 2).to(dtype)


def eager_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor,
    temb: Tensor,
    base_sequence_length: int | None = None,
) -> Tensor:
    """One block: 107 dispatched operations forward, 278 with backward (fp64, views left out), as diffusers' own.

    hidden_states [B, T, D], attention_mask [B, T], image_rotary_emb complex64 [1, T, d / 2],
    encoder_hidden_states [B, L, E'], encoder_mask bool [B, L], temb [B, A]. Returns [B, T, D].
    """
    modulation = block.norm1.linear(F.silu(temb))
    scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=1)
    normed = block.norm1.norm(hidden_states) * (1 + scale_msa[:, None])
    attended = _attention(
        block.attn1,
        normed,
        normed,
        attention_mask,
        image_rotary_emb,
        image_rotary_emb,
        block.head_dim,
        base_sequence_length,
    )
    context = block.norm1_context(encoder_hidden_states)
    crossed = _attention(
        block.attn2, normed, context, encoder_mask, image_rotary_emb, None, block.head_dim, base_sequence_length
    )
    crossed = crossed * block.gate.tanh().view(1, 1, -1, 1)
    mixed = (attended + crossed).flatten(-2)
    projected = block.attn2.to_out[0](mixed)
    hidden_states = hidden_states + gate_msa.unsqueeze(1).tanh() * block.norm2(projected)

    normed = block.ffn_norm1(hidden_states) * (1 + scale_mlp.unsqueeze(1))
    ffn = block.feed_forward
    gate = ffn.linear_1(normed)
    gate = F.silu(gate.float()).to(gate.dtype)
    forwarded = ffn.linear_2(gate * ffn.linear_3(normed))
    return hidden_states + gate_mlp.unsqueeze(1).tanh() * block.ffn_norm2(forwarded)


def eager_conditioning(model: Any, timestep: Tensor, context: Tensor, encoder_mask: Tensor) -> Tensor:
    """[B, A]: time embedding plus pooled context. timestep [B], context [B, L, E'], encoder_mask [B, L]."""
    embed = model.time_caption_embed
    exponent = -math.log(10000) * torch.arange(start=0, end=128, dtype=torch.float32, device=timestep.device)
    angles = timestep[:, None].float() * torch.exp(exponent / 128)[None, :]
    waves = torch.cat([torch.sin(1 * angles), torch.cos(1 * angles)], dim=-1)
    waves = torch.cat([waves[:, 128:], waves[:, :128]], dim=-1)
    time = embed.timestep_embedder.linear_1(waves.to(dtype=context.dtype))
    time = embed.timestep_embedder.linear_2(F.silu(time))
    weights = encoder_mask.float().unsqueeze(-1)
    pooled = (context * weights).sum(dim=1) / weights.sum(dim=1)
    return time + embed.caption_embedder(pooled.to(context))


def eager_project(projection: Any, encoder_hidden_states: Tensor) -> Tensor:
    """BLIP3-o's context projection (diffusers' `PixArtAlphaTextProjection`): [B, L, E] to [B, L, D]."""
    return projection.linear_2(F.gelu(projection.linear_1(encoder_hidden_states), approximate="tanh"))


def eager_head(norm_out: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """[B, T, D] to [B, T, patch_size^2 * out_channels]."""
    scale = norm_out.linear_1(F.silu(temb).to(hidden_states.dtype))
    return norm_out.linear_2(norm_out.norm(hidden_states) * (1 + scale)[:, None, :])


def eager_forward(
    model: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor | None = None,
    *,
    base_sequence_length: int | None = None,
    image_rotary_emb: Tensor | None = None,
) -> Tensor:
    """The whole network of a `BLIP3oDiT`, with the arguments and the result of its forward."""
    net: Any = model
    config = net.config
    image, as_tokens = to_image(hidden_states, config)
    patch = config.patch_size
    batch, channels, height, width = image.shape
    rows, columns = height // patch, width // patch
    if encoder_mask is None:
        encoder_mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2], dtype=torch.bool)
    if image_rotary_emb is None:
        rope = torch.view_as_complex(kept_rope_table(rows, columns, config.head_dim, image.device)).unsqueeze(0)
    else:
        rope = image_rotary_emb.to(image.device)[:rows, :columns].flatten(0, 1).unsqueeze(0)

    patches = image.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = net.patch_embedder.proj(patches).flatten(1, 2)
    mask = torch.ones(x.shape[0], x.shape[1], dtype=torch.int32, device=x.device)
    context = encoder_hidden_states
    if config.context_projection:
        context = eager_project(net.caption_projection, context)
    temb = eager_conditioning(net, timestep.expand(batch), context, encoder_mask)
    encoder_mask = encoder_mask.bool()
    for block in net.layers:
        x = eager_block(block, x, mask, rope, context, encoder_mask, temb, base_sequence_length)
    return from_tokens(eager_head(net.norm_out, x, temb), config, rows, columns, as_tokens=as_tokens)
