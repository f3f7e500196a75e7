"""RMSNorm with a learned weight and a per-sample scale: the adaLN norms of a Lumina NextDiT block.

    rstd = 1 / sqrt(mean(x^2) + eps)        over the last dimension
    y    = x * rstd * weight * (1 + scale)

Source: `LuminaRMSNormZero` and `LuminaNextDiTBlock` of diffusers (there is no shift anywhere in this network);
RMSNorm is Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.

Backward, with xhat = x * rstd, g = dy * weight * (1 + scale) and p = sum over the sample's tokens of dy * xhat:

    dx      = rstd * (g - xhat * mean(g * xhat))
    dscale  = p * weight                       [B, D]
    dweight = sum over samples of p * (1 + scale)

Weight and 1 + scale are constant within a sample, so the one accumulator p serves both. Saved: the inputs and rstd.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _checks, _cpu, _cuda, _triton
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


def rms_norm_modulate_ref(x: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to x's dtype."""
    acc = accumulation_dtype(x, weight, scale)
    x_acc = x.to(acc)
    rstd = torch.rsqrt(x_acc.square().mean(-1, keepdim=True) + eps)
    y = x_acc * rstd * weight.to(acc)
    if scale is not None:
        y = y * (1 + scale.to(acc))[:, None]
    return y.to(x.dtype)


def _check(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float) -> None:
    _checks.check_rank("x", x, "B, T, D")
    batch, _, dim = x.shape
    _checks.check_shape("weight", weight, "D", (dim,))
    if scale is not None:
        _checks.check_shape("scale", scale, "B, D", (batch, dim))
    _checks.check_floats(x=x, weight=weight, scale=scale)
    _checks.check_eps(eps)


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(x)
    x_acc = x.to(acc)
    rstd = torch.rsqrt(x_acc.square().mean(-1) + eps)
    y = x_acc * rstd[..., None] * _factor(weight, scale, acc)
    return y.to(dtype), rstd


def _backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc = rstd.dtype
    dy_acc, xhat = dy.to(acc), x.to(acc) * rstd[..., None]
    g = dy_acc * _factor(weight, scale, acc)
    dx = rstd[..., None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    p = (dy_acc * xhat).sum(1)
    if scale is None:
        return dx.to(x.dtype), p.sum(0).to(weight.dtype), x.new_empty(0)
    dweight = (p * (1 + scale.to(acc))).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), (p * weight.to(acc)).to(scale.dtype)


def _factor(weight: Tensor, scale: Tensor | None, acc: torch.dtype) -> Tensor:
    """weight * (1 + scale), broadcastable over [B, T, D]."""
    return weight.to(acc) if scale is None else weight.to(acc) * (1 + scale.to(acc))[:, None]


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, rstd = _forward_fake(x, weight, scale, eps, dtype, "cpu")
    _cpu.call("rms_norm_modulate_fwd", x, weight, scale, y, rstd, eps)
    return y, rstd


def _backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dscale = _backward_fake(dy, x, weight, scale, rstd, "cpu")
    given = None if scale is None else dscale
    _cpu.call("rms_norm_modulate_bwd", dy, x, weight, scale, rstd, dx, dweight, given)
    return dx, dweight, dscale


# ---- cuda (csrc) ---------------------------------------------------------------------------------------------------


def _forward_cuda(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, rstd = _forward_fake(x, weight, scale, eps, dtype, "cuda")
    inputs = map(_cuda.with_unit_stride, (x, weight, scale))
    _cuda.call("rms_norm_modulate_fwd", *inputs, y, rstd, eps)
    return y, rstd


def _backward_cuda(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dscale = _backward_fake(dy, x, weight, scale, rstd, "cuda")
    batch, tokens, width = x.shape
    partial = x.new_empty((batch, _cuda.chunks(batch, tokens), width), dtype=torch.float32)
    inputs, filled = map(_cuda.with_unit_stride, (dy, x, weight, scale)), None if scale is None else dscale
    _cuda.call("rms_norm_modulate_bwd", *inputs, rstd, dx, dweight, filled, partial)
    return dx, dweight, dscale


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, rstd = _forward_fake(x, weight, scale, eps, dtype, "triton")
    _triton.kernels("rms_norm_modulate").forward(x, weight, scale, eps, y, rstd)
    return y, rstd


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dscale = _backward_fake(dy, x, weight, scale, rstd, "triton")
    _triton.kernels("rms_norm_modulate").backward(dy, x, weight, scale, rstd, dx, dweight, dscale)
    return dx, dweight, dscale


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cuda": _forward_cuda, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cuda": _backward_cuda, "cpu": _backward_cpu}
BACKENDS = Backends("rms_norm_modulate", triton=_triton.refusal, cuda=_cuda.row_refusal, cpu=_cpu.refusal)


def _forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return _FORWARD[backend](x, weight, scale, eps, dtype)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _BACKWARD[backend](dy, x, weight, scale, rstd)


def _forward_fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dscale = x.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dscale


_rms_norm_modulate_fwd = define(
    "rms_norm_modulate_fwd(Tensor x, Tensor weight, Tensor? scale, float eps, ScalarType dtype, str backend)"
    " -> (Tensor y, Tensor rstd)",
    _forward,
    _forward_fake,
)
_rms_norm_modulate_bwd = define(
    "rms_norm_modulate_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor rstd, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dscale)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _RmsNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        y, rstd = run(_rms_norm_modulate_fwd, x, weight, scale, eps, dtype, backend)
        ctx.save_for_backward(x, weight, scale, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("rms_norm_modulate")
        x, weight, scale, rstd = ctx.saved_tensors
        dx, dweight, dscale = run(_rms_norm_modulate_bwd, dy, x, weight, scale, rstd, ctx.backend)
        return dx, dweight, None if scale is None else dscale, None, None, None


def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dimension, times `weight`, times `1 + scale` of the sample.

    Equivalent to `rms_norm_modulate_ref`, in one pass.

    x: [B, T, D]; weight: [D]; scale: [B, D], may be a strided chunk of a wider modulation tensor (it is not copied), or
    None for a plain norm. Any of fp32, bf16, fp16, mixed freely; fp64 only alone. B may be 0.
    Returns [B, T, D] in autocast's dtype where autocast is on, else in x's dtype.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where the backend asked for cannot run it.
    """
    _check(x, weight, scale, eps)
    refuse_transforms("rms_norm_modulate")
    dtype, backend = output_dtype(x), BACKENDS.choose(x, weight, scale)
    with recorded("rms_norm_modulate"):
        if needs_grad(x, weight, scale):
            return _RmsNormModulate.apply(x, weight, scale, eps, dtype, backend)
        return run(_rms_norm_modulate_fwd, x, weight, scale, eps, dtype, backend)[0]
