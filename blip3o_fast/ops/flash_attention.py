"""Softmax attention with grouped key heads and a mask of visible tokens.

    P   = softmax(q k^T * scale)       over the tokens that the mask shows; query head j reads key head j // (H / K)
    out = P v

A sample whose mask shows nothing gets zero, with zero gradients (where PyTorch's formula is 0 / 0).

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; never holding all of P is Dao et al. 2022,
https://arxiv.org/abs/2205.14135; the order of the repeated key heads is `LuminaAttnProcessor2_0` of diffusers, whose
`repeat` of each key head before flattening gives every key head H / K consecutive query heads.

Backward, with dP = dout v^T and P made again:

    dv = P^T dout
    dS = P * (dP - sum(P * dP))        sum over the keys of a row
    dq = dS k * scale,   dk = dS^T q * scale        dk and dv summed over the query heads of a group

Saved: the inputs alone. The pass that makes P again has whole rows at hand, so a saved row statistic would save
nothing, and exp(score - lse) would carry the rounding of lse into the whole row.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _attention, _checks, _cpu, _triton
from blip3o_fast.ops import _softmax_blocks as softmax_blocks
from blip3o_fast.ops._backend import Backends
from blip3o_fast.ops._library import (
    accumulation_dtype,
    define,
    needs_grad,
    output_dtype,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)


def flash_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to q's dtype."""
    acc, group = accumulation_dtype(q, k, v), q.shape[2] // k.shape[2]
    k_all, v_all = (t.to(acc).repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(acc), k_all) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_all).to(q.dtype)
    empty = ~mask.any(-1)
    # an empty row would be 0 / 0: it sees everything here and is set to zero below
    hidden = ~mask & ~empty[:, None]
    p = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    p = p.masked_fill(empty[:, None, None, None], 0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v_all).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> None:
    _checks.check_rank("q", q, "B, Tq, H, d")
    _checks.check_rank("k", k, "B, Tk, K, d")
    batch, _, heads, head_dim = q.shape
    context, key_heads = k.shape[1], k.shape[2]
    _checks.check_shape("k", k, "B, Tk, K, d", (batch, context, key_heads, head_dim))
    _checks.check_shape("v", v, "B, Tk, K, d", (batch, context, key_heads, head_dim))
    if context < 1:
        raise ValueError(f"k must have at least 1 token, got shape {tuple(k.shape)}")
    _attention.check_groups(heads, key_heads)
    _checks.check_floats(q=q, k=k, v=v)
    _attention.check_scale(scale)
    _attention.check_mask(mask, q, context, "Tk")


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    acc, mask = accumulation_dtype(q), softmax_blocks.seen(mask)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    by_heads, by_rows = softmax_blocks.partition(q, k.shape[2], k.shape[1])
    for heads in by_heads:
        visible = None if mask is None else heads.of_mask(mask)
        keys, values = heads.of_keys(k, acc), softmax_blocks.values(heads.of_keys(v, acc), visible)
        for rows in by_rows:
            p = softmax_blocks.probabilities(heads.of_queries(q, rows, acc), keys, visible, scale)
            heads.store_queries(out, rows, torch.bmm(p, values))
    return out


def _backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    acc, mask = accumulation_dtype(q), softmax_blocks.seen(mask)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    by_heads, by_rows = softmax_blocks.partition(q, k.shape[2], k.shape[1])
    for heads in by_heads:
        visible = None if mask is None else heads.of_mask(mask)
        gradient = softmax_blocks.Gradient(heads.of_keys(k, acc), heads.of_keys(v, acc), visible, scale)
        for rows in by_rows:
            dqueries = gradient.add(heads.of_queries(q, rows, acc), heads.of_queries(dout, rows, acc))
            heads.store_queries(dq, rows, dqueries)
        dkeys, dvalues = gradient.of_keys_and_values()
        heads.store_keys(dk, dkeys)
        heads.store_keys(dv, dvalues)
    return dq, dk, dv


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    out = _forward_fake(q, k, v, mask, scale, dtype, "cpu")
    _cpu.call("flash_attention_fwd", q, k, v, mask, scale, out)
    return out


def _backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward_fake(dout, q, k, v, mask, scale, "cpu")
    _cpu.call("flash_attention_bwd", dout, q, k, v, mask, scale, dq, dk, dv)
    return dq, dk, dv


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    out = _forward_fake(q, k, v, mask, scale, dtype, "triton")
    _triton.kernels("flash_attention").forward(q, k, v, mask, scale, out)
    return out


def _backward_triton(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward_fake(dout, q, k, v, mask, scale, "triton")
    _triton.kernels("flash_attention").backward(dout, q, k, v, mask, scale, dq, dk, dv)
    return dq, dk, dv


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu}
BACKENDS = Backends("flash_attention", triton=_attention.triton_refusal, cpu=_cpu.refusal)


def _forward(q: Tensor, *args: Any) -> Tensor:
    return _FORWARD[args[-1]](q, *args[:-1])


def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _BACKWARD[args[-1]](dout, *args[:-1])


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype, backend: str
) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_flash_attention_fwd = define(
    "flash_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, ScalarType dtype, str backend)"
    " -> Tensor",
    _forward,
    _forward_fake,
)
_flash_attention_bwd = define(
    "flash_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.backend = scale, backend
        return run(_flash_attention_fwd, q, k, v, mask, scale, dtype, backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("flash_attention")
        dq, dk, dv = run(_flash_attention_bwd, dout, *ctx.saved_tensors, ctx.scale, ctx.backend)
        return dq, dk, dv, None, None, None, None


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention, every head of every query against the visible tokens of its key head.

    Equivalent to `flash_attention_ref`, without ever holding all probabilities.

    q: [B, Tq, H, d]; k, v: [B, Tk, K, d], Tk >= 1; H a multiple of K, query head j reads key head j // (H / K). Slices
    of packed tensors are read where they lie. scale: of the scores, None = d^-0.5. mask: bool [B, Tk], True = attend;
    a sample with none gets zero. fp32, bf16, fp16, mixed freely; fp64 only alone. B may be 0.
    Returns [B, Tq, H, d] in autocast's dtype where autocast is on, else in q's dtype.
    Numerics: fp32 softmax and products, one rounding at the store, bitwise repeatable. Under `use_attention("sdpa")`,
    and by default where it is faster, PyTorch's `scaled_dot_product_attention` computes it with PyTorch's roundings;
    other names of `use_attention` with theirs.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where what was asked for by name cannot run it.
    """
    _check(q, k, v, scale, mask)
    refuse_transforms("flash_attention")
    dtype, differentiable = output_dtype(q), needs_grad(q, k, v)
    backend = _attention.choose(
        BACKENDS, q, k, v, mask,
        dtype=dtype, differentiable=differentiable, computed=_attention.computing_dtype(dtype, q, k, v),
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with recorded("flash_attention"):
        if backend in _attention.IMPLEMENTATIONS:
            return _attention.attend(backend, q, k, v, scale, mask, dtype).to(dtype)
        if differentiable:
            return _FlashAttention.apply(q, k, v, mask, scale, dtype, backend)
        return run(_flash_attention_fwd, q, k, v, mask, scale, dtype, backend)
