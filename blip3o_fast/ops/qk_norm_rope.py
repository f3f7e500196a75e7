"""LayerNorm across heads and rotary embedding of queries and keys, straight from the packed projection.

Group i holds heads[i] heads, n = heads[i] * d neighbouring columns of x. It is normalised as one vector of n, not per
head, then every pair of neighbouring channels (a, b) of each head turns by its token's angle:

    mean = sum(x) / n,   rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
    z    = (x - mean) * rstd * weight + bias
    y    = (a cos - b sin, a sin + b cos)      for every pair (a, b) of z

Source: `LuminaAttnProcessor2_0` with `qk_norm="layer_norm_across_heads"` and `apply_rotary_emb(use_real=False)` of
diffusers; LayerNorm is Ba et al. 2016, https://arxiv.org/abs/1607.06450.

Backward, with dz = dy turned by the negative angle, xhat = (x - mean) * rstd and g = dz * weight:

    dx      = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)
    dweight = sum over samples and tokens of dz * xhat
    dbias   = sum over samples and tokens of dz

Saved: the inputs, and mean and rstd of each token and group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _checks, _cpu, _triton
from blip3o_fast.ops import _norm_rope_cpu as cpu
from blip3o_fast.ops import _norm_rope_cuda as cuda
from blip3o_fast.ops import _norm_rope_reference as reference
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


def qk_norm_rope_ref(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    rope: Tensor | None,
    *,
    heads: Sequence[int],
    head_dim: int,
    eps: float = 1e-5,
) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to x's dtype."""
    acc = accumulation_dtype(x, *weights, *biases)
    groups = []
    for z, weight, bias in zip(x.split([h * head_dim for h in heads], dim=-1), weights, biases, strict=True):
        z = z.to(acc)
        if weight is not None and bias is not None:
            centred = z - z.mean(-1, keepdim=True)
            rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
            z = centred * rstd * weight.to(acc) + bias.to(acc)
        groups.append(z.unflatten(-1, (-1, head_dim)))
    y = torch.cat(groups, dim=2)
    if rope is not None:
        cos, sin = rope.to(acc)[:, None].unbind(-1)
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return y.to(x.dtype)


def _check(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    rope: Tensor | None,
    heads: Sequence[int],
    head_dim: int,
    eps: float,
) -> None:
    if len(heads) == 0 or any(h < 1 for h in heads):
        raise ValueError(f"heads must be the number of heads of each group, each at least 1, got {tuple(heads)}")
    if head_dim < 2 or head_dim % 2 != 0:
        raise ValueError(f"head_dim must be a positive even number, got {head_dim}")
    _checks.check_rank("x", x, "B, T, sum(heads)*head_dim")
    batch, tokens, _ = x.shape
    _checks.check_shape("x", x, "B, T, sum(heads)*head_dim", (batch, tokens, sum(heads) * head_dim))
    for name, given in (("weights", weights), ("biases", biases)):
        if len(given) != len(heads):
            raise ValueError(f"{name} must have one entry per group of heads ({len(heads)}), got {len(given)}")
    named: dict[str, Tensor] = {}
    for i, (weight, bias, h) in enumerate(zip(weights, biases, heads, strict=True)):
        if (weight is None) != (bias is None):
            present, absent = ("biases", "weights") if weight is None else ("weights", "biases")
            raise ValueError(f"{absent}[{i}] is None and {present}[{i}] is not: give both (norm) or neither (no norm)")
        if weight is not None and bias is not None:
            _checks.check_shape(f"weights[{i}]", weight, "heads[i]*head_dim", (h * head_dim,))
            _checks.check_shape(f"biases[{i}]", bias, "heads[i]*head_dim", (h * head_dim,))
            named |= {f"weights[{i}]": weight, f"biases[{i}]": bias}
    _checks.check_floats(x=x, **named)
    if rope is not None:
        _checks.check_shape("rope", rope, "T, head_dim/2, 2", (tokens, head_dim // 2, 2))
        if rope.dtype != torch.float32:
            raise ValueError(f"rope must be float32 (cos, sin), got {rope.dtype}")
        if rope.device != x.device:
            raise ValueError(f"rope must be on {x.device} like x, got {rope.device}")
        if rope.requires_grad:
            raise ValueError("rope must not require grad: it is a table of constants and gets no gradient")
    _checks.check_eps(eps)


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(*[x, *args, "cpu"])
    cpu.forward(*[x, *args[:-1], y, mean, rstd])
    return y, mean, rstd


def _backward_cpu(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dx, daffine = _backward_fake(*[dy, *args, "cpu"])
    cpu.backward(*[dy, *args[:-1], dx, daffine])
    return dx, daffine


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(
    x: Tensor,
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    rope: Tensor | None,
    heads: list[int],
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, weights, biases, rope, heads, head_dim, eps, dtype, "triton")
    _triton.kernels("qk_norm_rope").forward(x, weights, biases, rope, heads, head_dim, eps, y, mean, rstd)
    return y, mean, rstd


def _backward_triton(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor | None],
    rope: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    heads: list[int],
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dx, daffine = _backward_fake(dy, x, weights, rope, mean, rstd, heads, head_dim, dtype, "triton")
    _triton.kernels("qk_norm_rope").backward(dy, x, weights, rope, mean, rstd, heads, head_dim, dx, daffine)
    return dx, daffine


# ---- cuda ----------------------------------------------------------------------------------------------------------


def _forward_cuda(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(*[x, *args, "cuda"])
    cuda.forward(*[x, *args[:-1], y, mean, rstd])
    return y, mean, rstd


def _backward_cuda(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dx, daffine = _backward_fake(*[dy, *args, "cuda"])
    cuda.backward(*[dy, *args[:-1], dx, daffine])
    return dx, daffine


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": reference.forward, "triton": _forward_triton, "cpu": _forward_cpu, "cuda": _forward_cuda}
_BACKWARD = {"reference": reference.backward, "triton": _backward_triton, "cpu": _backward_cpu, "cuda": _backward_cuda}
BACKENDS = Backends("qk_norm_rope", triton=_triton.refusal, cpu=_cpu.refusal, cuda=cuda.refusal)


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _FORWARD[args[-1]](x, *args[:-1])


def _backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _BACKWARD[args[-1]](dy, *args[:-1])


def _forward_fake(
    x: Tensor,
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    rope: Tensor | None,
    heads: list[int],
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:2], sum(heads), head_dim), dtype=dtype)
    mean = x.new_empty((*x.shape[:2], len(heads)), dtype=accumulation_dtype(x))
    return y, mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor | None],
    rope: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    heads: list[int],
    head_dim: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1] if any(weight is not None for weight in weights) else 0
    return x.new_empty(x.shape), x.new_empty((2, columns), dtype=dtype)


_qk_norm_rope_fwd = define(
    "qk_norm_rope_fwd(Tensor x, Tensor?[] weights, Tensor?[] biases, Tensor? rope, int[] heads, int head_dim,"
    " float eps, ScalarType dtype, str backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
# daffine [2, sum(heads)*head_dim], of `dtype`: dweight and dbias of every column of x, zeros for groups without a norm;
# [2, 0] where no group has one. One tensor, so that one pass sums both and a split hands every group its own.
_qk_norm_rope_bwd = define(
    "qk_norm_rope_bwd(Tensor dy, Tensor x, Tensor?[] weights, Tensor? rope, Tensor mean, Tensor rstd, int[] heads,"
    " int head_dim, ScalarType dtype, str backend) -> (Tensor dx, Tensor daffine)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rope: Tensor | None,
        heads: list[int],
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
        backend: str,
        *affine: Tensor | None,
    ) -> Tensor:
        weights, biases = list(affine[: len(heads)]), list(affine[len(heads) :])
        y, mean, rstd = run(_qk_norm_rope_fwd, x, weights, biases, rope, heads, head_dim, eps, dtype, backend)
        ctx.save_for_backward(x, rope, mean, rstd, *weights)
        ctx.heads, ctx.head_dim, ctx.backend = heads, head_dim, backend
        ctx.dtypes = [None if t is None else t.dtype for t in affine]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("qk_norm_rope")
        x, rope, mean, rstd, *weights = ctx.saved_tensors
        # The parameters' own dtype, and no cast is left to do; in the accumulation dtype only where they differ.
        given = {dtype for dtype in ctx.dtypes if dtype is not None}
        dtype = next(iter(given)) if len(given) == 1 else rstd.dtype
        dx, daffine = run(
            _qk_norm_rope_bwd, dy, x, weights, rope, mean, rstd, ctx.heads, ctx.head_dim, dtype, ctx.backend
        )
        affine: list[Tensor | None] = [None] * len(ctx.dtypes)
        if given:
            grads = daffine.view(-1).split([h * ctx.head_dim for h in ctx.heads] * 2)
            affine = [_cast(grad, own) for grad, own in zip(grads, ctx.dtypes, strict=True)]
        return dx, None, None, None, None, None, None, *affine


def _cast(grad: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The gradient of one weight or bias; None for a group without a norm, which has none."""
    if dtype is None:
        return None
    return grad if grad.dtype == dtype else grad.to(dtype)


def qk_norm_rope(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    rope: Tensor | None,
    *,
    heads: Sequence[int],
    head_dim: int,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm of each group of heads over all its columns, then rotary embedding, for several groups at once.

    Equivalent to `qk_norm_rope_ref`.

    x: [B, T, sum(heads)*d], usually a column slice of a wider projection (it is not copied as a whole).
    heads: heads of each group, such as (H, K, H) for q1, k1, q2, or (K,) for the context's k2. d = head_dim, even.
    weights, biases: one [heads[i]*d] tensor per group, or None in both for a group that is not normalised.
    rope: fp32 [T, d/2, 2] (cos, sin), see `rope_table`, or None for no rotation. It gets no gradient.
    Any of fp32, bf16, fp16 for x, weights and biases, mixed freely; fp64 only alone. B may be 0.
    Returns [B, T, sum(heads), d], contiguous, in autocast's dtype where autocast is on, else in x's dtype.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where the backend asked for cannot run it.
    """
    _check(x, weights, biases, rope, heads, head_dim, eps)
    refuse_transforms("qk_norm_rope")
    dtype, backend = output_dtype(x), BACKENDS.choose(x, *weights, *biases, rope)
    groups = list(heads)
    with recorded("qk_norm_rope"):
        if needs_grad(x, *weights, *biases):
            return _QkNormRope.apply(x, rope, groups, head_dim, eps, dtype, backend, *weights, *biases)
        return run(_qk_norm_rope_fwd, x, list(weights), list(biases), rope, groups, head_dim, eps, dtype, backend)[0]
