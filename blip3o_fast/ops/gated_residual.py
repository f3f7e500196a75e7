"""The gated sandwich residual of a Lumina NextDiT block: a branch is normalised, gated, and added.

    rstd = 1 / sqrt(mean(y^2) + eps)        over the last dimension
    h    = x + tanh(gate) * y * rstd * weight

Source: `LuminaNextDiTBlock` of diffusers, `norm2` and `ffn_norm2` with `gate_msa` and `gate_mlp`; RMSNorm is Zhang and
Sennrich 2019, https://arxiv.org/abs/1910.07467.

Backward, with t = tanh(gate), yhat = y * rstd, g = dh * t * weight and p = sum over the sample's tokens of dh * yhat:

    dx      = dh
    dy      = rstd * (g - yhat * mean(g * yhat))
    dgate   = p * weight * (1 - t^2)           [B, D]
    dweight = sum over samples of p * t

Saved: y, gate, weight and rstd; x is not needed.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _checks, _cpu, _triton
from blip3o_fast.ops._backend import Backends
from blip3o_fast.ops._library import (
    accumulation_dtype,
    define,
    needs_grad,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)


def gated_residual_ref(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to x's dtype."""
    acc = accumulation_dtype(x, y, gate, weight)
    y_acc = y.to(acc)
    rstd = torch.rsqrt(y_acc.square().mean(-1, keepdim=True) + eps)
    branch = torch.tanh(gate.to(acc))[:, None] * (y_acc * rstd * weight.to(acc))
    return (x.to(acc) + branch).to(x.dtype)


def _check(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> None:
    _checks.check_rank("x", x, "B, T, D")
    batch, _, dim = x.shape
    _checks.check_shape("y", y, "B, T, D", x.shape)
    _checks.check_shape("gate", gate, "B, D", (batch, dim))
    _checks.check_shape("weight", weight, "D", (dim,))
    _checks.check_floats(x=x, y=y, gate=gate, weight=weight)
    _checks.check_eps(eps)


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(x)
    y_acc = y.to(acc)
    rstd = torch.rsqrt(y_acc.square().mean(-1) + eps)
    factor = torch.tanh(gate.to(acc)).mul_(weight.to(acc))[:, None]
    h = (y_acc * rstd[..., None]).mul_(factor).add_(x.to(acc))
    return h.to(x.dtype), rstd


def _backward_reference(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc = rstd.dtype
    dh_acc, weight_acc = dh.to(acc), weight.to(acc)
    yhat = y.to(acc) * rstd[..., None]
    t = torch.tanh(gate.to(acc))
    p = (dh_acc * yhat).sum(1)
    g = dh_acc * (t * weight_acc)[:, None]
    projection = (g * yhat).mean(-1, keepdim=True)
    dy = g.sub_(yhat.mul_(projection)).mul_(rstd[..., None])
    dgate = p * weight_acc * (1 - t.square())
    return dy.to(y.dtype), dgate.to(gate.dtype), (p * t).sum(0).to(weight.dtype)


# ---- cpu (csrc) ------------------------------------------------------------------------------------------------------


def _forward_cpu(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h, rstd = _forward_fake(x, y, gate, weight, eps, "cpu")
    _cpu.call("gated_residual_fwd", x, y, gate, weight, h, rstd, eps)
    return h, rstd


def _backward_cpu(dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, dgate, dweight = _backward_fake(dh, y, gate, weight, rstd, "cpu")
    _cpu.call("gated_residual_bwd", dh, y, gate, weight, rstd, dy, dgate, dweight)
    return dy, dgate, dweight


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h, rstd = _forward_fake(x, y, gate, weight, eps, "triton")
    _triton.kernels("gated_residual").forward(x, y, gate, weight, eps, h, rstd)
    return h, rstd


def _backward_triton(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dgate, dweight = _backward_fake(dh, y, gate, weight, rstd, "triton")
    _triton.kernels("gated_residual").backward(dh, y, gate, weight, rstd, dy, dgate, dweight)
    return dy, dgate, dweight


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu}
BACKENDS = Backends("gated_residual", triton=_triton.refusal, cpu=_cpu.refusal)


def _forward(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _FORWARD[backend](x, y, gate, weight, eps)


def _backward(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _BACKWARD[backend](dh, y, gate, weight, rstd)


def _forward_fake(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))


def _backward_fake(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


_gated_residual_fwd = define(
    "gated_residual_fwd(Tensor x, Tensor y, Tensor gate, Tensor weight, float eps, str backend)"
    " -> (Tensor h, Tensor rstd)",
    _forward,
    _forward_fake,
)
_gated_residual_bwd = define(
    "gated_residual_bwd(Tensor dh, Tensor y, Tensor gate, Tensor weight, Tensor rstd, str backend)"
    " -> (Tensor dy, Tensor dgate, Tensor dweight)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
        h, rstd = run(_gated_residual_fwd, x, y, gate, weight, eps, backend)
        ctx.save_for_backward(y, gate, weight, rstd)
        ctx.backend = backend
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gated_residual")
        y, gate, weight, rstd = ctx.saved_tensors
        dy, dgate, dweight = run(_gated_residual_bwd, dh, y, gate, weight, rstd, ctx.backend)
        return dh, dy, dgate, dweight, None, None


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`x + tanh(gate) * rms_norm(y) * weight`: the residual x plus the gated, normalised branch y.

    Equivalent to `gated_residual_ref`, in one pass.

    x, y: [B, T, D]; gate: [B, D], may be a strided chunk of a wider modulation tensor (it is not copied); weight: [D].
    Any of fp32, bf16, fp16, mixed freely; fp64 only alone. B may be 0.
    Returns [B, T, D] in x's dtype, also under autocast: the residual keeps its precision.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where the backend asked for cannot run it.
    """
    _check(x, y, gate, weight, eps)
    refuse_transforms("gated_residual")
    backend = BACKENDS.choose(x, y, gate, weight)
    with recorded("gated_residual"):
        if needs_grad(x, y, gate, weight):
            return _GatedResidual.apply(x, y, gate, weight, eps, backend)
        return run(_gated_residual_fwd, x, y, gate, weight, eps, backend)[0]
