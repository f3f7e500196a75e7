"""LayerNorm without weight or bias, times a per-sample scale: the head of a Lumina NextDiT.

    mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps)        over the last dimension
    y    = (x - mean) * rstd * (1 + scale)

Source: `LuminaLayerNormContinuous` of diffusers, built with `elementwise_affine=False` by `LuminaNextDiT2DModel` (eps
1e-6); LayerNorm is Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.

Backward, with xhat = (x - mean) * rstd and g = dy * (1 + scale):

    dx     = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dscale = sum over the sample's tokens of dy * xhat                [B, D]

Saved: the inputs, mean and rstd.
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
    output_dtype,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)


def layer_norm_modulate_ref(x: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to x's dtype."""
    acc = accumulation_dtype(x, scale)
    x_acc = x.to(acc)
    centred = x_acc - x_acc.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * (1 + scale.to(acc))[:, None]).to(x.dtype)


def _check(x: Tensor, scale: Tensor, eps: float) -> None:
    _checks.check_rank("x", x, "B, T, D")
    batch, _, dim = x.shape
    _checks.check_shape("scale", scale, "B, D", (batch, dim))
    _checks.check_floats(x=x, scale=scale)
    _checks.check_eps(eps)


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x)
    x_acc = x.to(acc)
    mean = x_acc.mean(-1)
    # Centred first: E[x^2] - mean^2 loses every digit where the mean is large.
    centred = x_acc - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred.mul_(rstd[..., None]).mul_((1 + scale.to(acc))[:, None])
    return y.to(dtype), mean, rstd


def _backward_reference(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    acc = rstd.dtype
    dy_acc = dy.to(acc)
    xhat = (x.to(acc) - mean[..., None]).mul_(rstd[..., None])
    dscale = (dy_acc * xhat).sum(1)
    g = dy_acc * (1 + scale.to(acc))[:, None]
    projection = (g * xhat).mean(-1, keepdim=True)
    dx = g.sub_(g.mean(-1, keepdim=True)).sub_(xhat.mul_(projection)).mul_(rstd[..., None])
    return dx.to(x.dtype), dscale.to(scale.dtype)


# ---- cpu (csrc) ------------------------------------------------------------------------------------------------------


def _forward_cpu(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, scale, eps, dtype, "cpu")
    _cpu.call("layer_norm_modulate_fwd", x, scale, y, mean, rstd, eps)
    return y, mean, rstd


def _backward_cpu(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dscale = _backward_fake(dy, x, scale, mean, rstd, "cpu")
    _cpu.call("layer_norm_modulate_bwd", dy, x, scale, mean, rstd, dx, dscale)
    return dx, dscale


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, scale, eps, dtype, "triton")
    _triton.kernels("layer_norm_modulate").forward(x, scale, eps, y, mean, rstd)
    return y, mean, rstd


def _backward_triton(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dscale = _backward_fake(dy, x, scale, mean, rstd, "triton")
    _triton.kernels("layer_norm_modulate").backward(dy, x, scale, mean, rstd, dx, dscale)
    return dx, dscale


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu}
BACKENDS = Backends("layer_norm_modulate", triton=_triton.refusal, cpu=_cpu.refusal)


def _forward(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _FORWARD[backend](x, scale, eps, dtype)


def _backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _BACKWARD[backend](dy, x, scale, mean, rstd)


def _forward_fake(
    x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:2], dtype=acc),
        x.new_empty(x.shape[:2], dtype=acc),
    )


def _backward_fake(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


_layer_norm_modulate_fwd = define(
    "layer_norm_modulate_fwd(Tensor x, Tensor scale, float eps, ScalarType dtype, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_layer_norm_modulate_bwd = define(
    "layer_norm_modulate_bwd(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, str backend)"
    " -> (Tensor dx, Tensor dscale)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
        y, mean, rstd = run(_layer_norm_modulate_fwd, x, scale, eps, dtype, backend)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("layer_norm_modulate")
        x, scale, mean, rstd = ctx.saved_tensors
        dx, dscale = run(_layer_norm_modulate_bwd, dy, x, scale, mean, rstd, ctx.backend)
        return dx, dscale, None, None, None


def layer_norm_modulate(x: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension (no weight, no bias), times `1 + scale` of the sample.

    Equivalent to `layer_norm_modulate_ref`, in one pass.

    x: [B, T, D]; scale: [B, D], may be a strided slice (it is not copied). Any of fp32, bf16, fp16, mixed freely; fp64
    only alone. B may be 0.
    Returns [B, T, D] in autocast's dtype where autocast is on, else in x's dtype.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where the backend asked for cannot run it.
    """
    _check(x, scale, eps)
    refuse_transforms("layer_norm_modulate")
    dtype, backend = output_dtype(x), BACKENDS.choose(x, scale)
    with recorded("layer_norm_modulate"):
        if needs_grad(x, scale):
            return _LayerNormModulate.apply(x, scale, eps, dtype, backend)
        return run(_layer_norm_modulate_fwd, x, scale, eps, dtype, backend)[0]
