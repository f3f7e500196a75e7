"""The forward of the network over the fused ops. One block is 13 launches where stock has 107 dispatched operations.

Everything here reads a module tree with the stock names and keeps nothing of its own. A block leaves the fused path
where it must: an adapter or a hook on a projection gets its own GEMM (the layer is called as a module), and a norm
that is hooked, offloaded or replaced sends its block through the stock sequence (`models/eager.py`).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from blip3o_fast import ops
from blip3o_fast.models.eager import eager_block
from blip3o_fast.models.layout import projection_groups

# Layers whose weight may be read directly. A subclass (a LoRA, a quantised or a sharded layer) is not among them.
PLAIN_NORMS: set[type] = {nn.LayerNorm}
_FREQUENCIES = 128
_MAX_PERIOD = 10000.0


class Grid:
    """What all blocks share beside the tensors that carry gradients.

    A plain object on purpose: FSDP's mixed precision casts the tensors in a block's arguments, also those in lists,
    dicts and dataclasses, and the table must stay fp32.

    rope: fp32 [T, d / 2, 2] (cos, sin). mask: bool [B, L], True = attend, or None for all of it.
    base_sequence_length: of proportional attention, or None.
    """

    def __init__(self, rope: Tensor, mask: Tensor | None = None, base_sequence_length: int | None = None) -> None:
        self.rope = rope
        self.mask = mask
        self.base_sequence_length = base_sequence_length

    def self_scale(self, head_dim: int) -> float | None:
        """Softmax scale of the self-attention: None is the usual 1 / sqrt(d)."""
        if self.base_sequence_length is None:
            return None
        return head_dim**-0.5 * math.sqrt(math.log(self.rope.shape[0], self.base_sequence_length))

    def complex_rope(self) -> Tensor:
        """The table as stock takes it: complex64 [1, T, d / 2]."""
        return torch.view_as_complex(self.rope).unsqueeze(0)


# ---- which layers may be read directly -----------------------------------------------------------------------------


def untouched(module: nn.Module) -> bool:
    """No hook and no replaced forward: reading the weight is the same as calling the module."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def dense(weight: Tensor | None) -> bool:
    return weight is None or type(weight) in (nn.Parameter, Tensor) or isinstance(weight, FakeTensor)


def plain_linear(module: Any) -> bool:
    """An `nn.Linear` whose weight may be read instead of calling it."""
    return type(module) is nn.Linear and untouched(module) and dense(module.weight)


def _plain_norm(module: Any) -> bool:
    return module is None or (type(module) in PLAIN_NORMS and untouched(module) and dense(module.weight))


def _norms(block: Any) -> tuple[Any, ...]:
    attn1, attn2 = block.attn1, block.attn2
    return (
        block.norm1.norm,
        block.norm2,
        block.ffn_norm1,
        block.ffn_norm2,
        block.norm1_context,
        attn1.norm_q,
        attn1.norm_k,
        attn2.norm_q,
        attn2.norm_k,
    )


def fusable(block: Any) -> bool:
    """Whether the block's norms can be read by the fused ops."""
    return all(_plain_norm(norm) for norm in _norms(block))


def carries(block: Any, kind: type[nn.Module]) -> bool:
    """Whether a neighbour may read this block's first norm and modulation, so that one launch covers the boundary.

    Not where the block is wrapped or hooked: its parameters may be sharded until it is called, and a hook expects the
    block's output alone.
    """
    of_our_kind = type(block) is kind
    return of_our_kind and untouched(block) and fusable(block) and plain_linear(block.norm1.linear)


# ---- one block -----------------------------------------------------------------------------------------------------


def project(x: Tensor, linears: tuple[Any, ...]) -> Tensor:
    """All the layers' outputs side by side in the last dimension, by one GEMM where their weights can be read."""
    if all(plain_linear(linear) for linear in linears):
        biases = [linear.bias for linear in linears]
        if all(bias is None for bias in biases):
            return ops.merged_linear(x, [linear.weight for linear in linears])
        if all(bias is not None for bias in biases):
            return ops.merged_linear(x, [linear.weight for linear in linears], biases)
    return torch.cat([linear(x) for linear in linears], dim=-1)


def _norm_weights(*norms: Any) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """(weights, biases) of LayerNorms, None where there is none."""
    return (
        tuple(None if norm is None else norm.weight for norm in norms),
        tuple(None if norm is None else norm.bias for norm in norms),
    )


def qk_eps(attn: Any) -> float:
    return 1e-5 if attn.norm_q is None else float(attn.norm_q.eps)


def context_key_value(block: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """k2 [B, L, K, d] (normed, never rotated) and v2 [B, L, K, d] of context [B, L, E']."""
    attn, head_dim = block.attn2, block.head_dim
    normed = ops.rms_norm_modulate(context, block.norm1_context.weight, eps=block.norm1_context.eps)
    key_value = project(normed, (attn.to_k, attn.to_v))
    width = key_value.shape[-1] // 2
    # split, not two slices: the backward joins the two gradients in one pass, where slices add two padded ones.
    key, value = key_value.split(width, dim=-1)
    weights, biases = _norm_weights(attn.norm_k)
    key = ops.qk_norm_rope(
        key,
        weights,
        biases,
        None,
        heads=(width // head_dim,),
        head_dim=head_dim,
        eps=qk_eps(attn),
    )
    return key, value.unflatten(-1, (-1, head_dim))


def modulate(block: Any, conditioning: Tensor) -> tuple[Tensor, ...]:
    """scale_msa, gate_msa, scale_mlp, gate_mlp, each a strided [B, D] of one [B, 4 D]. conditioning = silu(y)."""
    return project(conditioning, (block.norm1.linear,)).chunk(4, dim=1)


def block_forward(
    block: Any,
    h: Tensor,
    conditioning: Tensor,
    context: Tensor,
    grid: Grid,
    *,
    normed: Tensor | None = None,
    modulation: tuple[Tensor, ...] | None = None,
    following: Any = None,
    following_modulation: tuple[Tensor, ...] | None = None,
    key_value: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """One block: h [B, T, D], conditioning = silu(y) [B, A], context [B, L, E'].

    normed and modulation: this block's first norm and its modulation where the block before has made them.
    following: the next block, if its first norm is to be made here; following_modulation: its modulation where it was
    made before. Returns (h, its normed, its modulation).
    key_value: `context_key_value(block, context)` where it was made before.
    """
    attn1, attn2, head_dim = block.attn1, block.attn2, block.head_dim
    if modulation is None:
        modulation = modulate(block, conditioning)
    scale_msa, gate_msa, scale_mlp, gate_mlp = modulation
    if normed is None:
        normed = ops.rms_norm_modulate(h, block.norm1.norm.weight, scale_msa, eps=block.norm1.norm.eps)
    qkqv_layers, _, ffn_layers = projection_groups(block)

    projected = project(normed, qkqv_layers)
    # Columns q1, k1, q2, v1, of H, K, H and K heads.
    heads = block.gate.shape[0]
    kv_heads = projected.shape[-1] // (2 * head_dim) - heads
    queries_keys, value = projected.split([(2 * heads + kv_heads) * head_dim, kv_heads * head_dim], dim=-1)
    weights, biases = _norm_weights(attn1.norm_q, attn1.norm_k, attn2.norm_q)
    qkq = ops.qk_norm_rope(
        queries_keys,
        weights,
        biases,
        grid.rope,
        heads=(heads, kv_heads, heads),
        head_dim=head_dim,
        eps=qk_eps(attn1),
    )
    v1 = value.unflatten(-1, (kv_heads, head_dim))
    k2, v2 = context_key_value(block, context) if key_value is None else key_value
    attended = ops.dual_attention(qkq, v1, k2, v2, block.gate, scale=grid.self_scale(head_dim), mask=grid.mask)
    out = project(attended, (attn2.to_out[0],))

    # The ops take one eps for both norms they make; every RMSNorm of the network has the config's.
    h, u = ops.gated_residual_modulate(
        h, out, gate_msa, block.norm2.weight, block.ffn_norm1.weight, scale_mlp, eps=block.norm2.eps
    )
    forwarded = project(ops.swiglu(project(u, ffn_layers)), (block.feed_forward.linear_2,))
    if following is None:
        h = ops.gated_residual(h, forwarded, gate_mlp, block.ffn_norm2.weight, eps=block.ffn_norm2.eps)
        return h, None, None
    next_modulation = modulate(following, conditioning) if following_modulation is None else following_modulation
    h, normed = ops.gated_residual_modulate(
        h,
        forwarded,
        gate_mlp,
        block.ffn_norm2.weight,
        following.norm1.norm.weight,
        next_modulation[0],
        eps=block.ffn_norm2.eps,
    )
    return h, normed, next_modulation


def unfused_block(block: Any, h: Tensor, y: Tensor, context: Tensor, grid: Grid) -> Tensor:
    """One block through the stock sequence, where its norms cannot be read. y is the conditioning before silu."""
    tokens = h.new_ones(h.shape[:2], dtype=torch.bool)
    mask = grid.mask
    if mask is None:
        mask = context.new_ones(context.shape[:2], dtype=torch.bool)
    else:
        # The stock sequence gives NaN where a row attends to nothing. Attending to zeros adds the zero it should add.
        empty = ~mask.any(1, keepdim=True)
        context, mask = context.masked_fill(empty.unsqueeze(-1), 0), mask | empty
    return eager_block(block, h, tokens, grid.complex_rope(), context, mask, y, grid.base_sequence_length)


# ---- before and after the blocks -----------------------------------------------------------------------------------


def project_context(model: Any, encoder_hidden_states: Tensor) -> Tensor:
    """[B, L, E] to the [B, L, E'] that the blocks read."""
    if not model.config.context_projection:
        return encoder_hidden_states
    projection = model.caption_projection
    hidden = F.gelu(project(encoder_hidden_states, (projection.linear_1,)), approximate="tanh")
    return project(hidden, (projection.linear_2,))


def pool_context(context: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the attended tokens [B, E'], summed in fp32; zero where a row attends to nothing."""
    if mask is None:
        return context.mean(1, dtype=torch.promote_types(context.dtype, torch.float32)).to(context.dtype)
    weights = mask.float().unsqueeze(-1)
    total = weights.sum(1)
    return ((context * weights).sum(1) / torch.where(total == 0, 1.0, total)).to(context.dtype)


def embed_time(model: Any, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, A]: an MLP in dtype of sinusoids of width 256, cos first, made in fp32. timestep [B]."""
    steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device=timestep.device)
    angles = timestep[:, None].float() * torch.exp(-math.log(_MAX_PERIOD) * steps / _FREQUENCIES)
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    time = model.time_caption_embed.timestep_embedder
    return time.linear_2(F.silu(time.linear_1(waves)))


def embed_condition(model: Any, timestep: Tensor, pooled: Tensor) -> Tensor:
    """y [B, A]: time embedding plus pooled context. timestep [B], pooled [B, E']."""
    return embed_time(model, timestep, pooled.dtype) + model.time_caption_embed.caption_embedder(pooled)


def head_scale(model: Any, conditioning: Tensor) -> Tensor:
    """[B, D] of conditioning = silu(y) [B, A]."""
    return model.norm_out.linear_1(conditioning)


def head(model: Any, h: Tensor, conditioning: Tensor, scale: Tensor | None = None) -> Tensor:
    """[B, T, D] to [B, T, patch_size^2 * out_channels]. conditioning = silu(y); scale: `head_scale`, if made before."""
    norm_out = model.norm_out
    if scale is None:
        scale = head_scale(model, conditioning.to(h.dtype))
    return project(ops.layer_norm_modulate(h, scale, eps=norm_out.norm.eps), (norm_out.linear_2,))
