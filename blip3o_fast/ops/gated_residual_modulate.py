"""The gated sandwich residual and the adaLN norm that reads it, in one pass over the residual stream.

    rstd_y = 1 / sqrt(mean(y^2) + eps)
    h      = x + tanh(gate) * y * rstd_y * weight                rounded to its dtype
    rstd_h = 1 / sqrt(mean(h^2) + eps)                           of the rounded h
    n      = h * rstd_h * next_weight * (1 + next_scale)

Source: `LuminaNextDiTBlock` of diffusers: norm2 and gate_msa followed by ffn_norm1 and scale_mlp, and ffn_norm2 and
gate_mlp followed by the next block's norm1 and scale_msa; RMSNorm is Zhang and Sennrich 2019,
https://arxiv.org/abs/1910.07467.

h is rounded before its norm because backward reads h from memory: statistics and gradient belong to the same numbers.

Backward, with hhat = h * rstd_h, q = dn * next_weight * (1 + next_scale) and r = sum over the sample's tokens of
dn * hhat:

    e            = dh + rstd_h * (q - hhat * mean(q * hhat))     the whole gradient of h, kept in fp32
    dnext_scale  = r * next_weight                               [B, D]
    dnext_weight = sum over samples of r * (1 + next_scale)

and with t = tanh(gate), yhat = y * rstd_y, g = e * t * weight, p = sum over the sample's tokens of e * yhat:

    dx      = e
    dy      = rstd_y * (g - yhat * mean(g * yhat))
    dgate   = p * weight * (1 - t^2)                             [B, D]
    dweight = sum over samples of p * t

Saved: y, the output h, gate, both weights, next_scale, rstd_y and rstd_h; x is not needed.
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
from blip3o_fast.ops.gated_residual import gated_residual_ref
from blip3o_fast.ops.rms_norm_modulate import rms_norm_modulate_ref


def gated_residual_modulate_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The specification: the two ops' own specifications, one after the other; both results in x's dtype."""
    h = gated_residual_ref(x, y, gate, weight, eps=eps)
    return h, rms_norm_modulate_ref(h, next_weight, next_scale, eps=eps)


def _check(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
) -> None:
    _checks.check_rank("x", x, "B, T, D")
    batch, _, dim = x.shape
    _checks.check_shape("y", y, "B, T, D", x.shape)
    _checks.check_shape("gate", gate, "B, D", (batch, dim))
    _checks.check_shape("weight", weight, "D", (dim,))
    _checks.check_shape("next_weight", next_weight, "D", (dim,))
    if next_scale is not None:
        _checks.check_shape("next_scale", next_scale, "B, D", (batch, dim))
    _checks.check_floats(x=x, y=y, gate=gate, weight=weight, next_weight=next_weight, next_scale=next_scale)
    _checks.check_eps(eps)


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x)
    y_acc = y.to(acc)
    rstd_y = torch.rsqrt(y_acc.square().mean(-1) + eps)
    factor = torch.tanh(gate.to(acc)).mul_(weight.to(acc))[:, None]
    h = (y_acc * rstd_y[..., None]).mul_(factor).add_(x.to(acc)).to(x.dtype)
    h_acc = h.to(acc)
    rstd_h = torch.rsqrt(h_acc.square().mean(-1) + eps)
    n = (h_acc * rstd_h[..., None]).mul_(_factor(next_weight, next_scale, acc))
    return h, n.to(dtype), rstd_y, rstd_h


def _backward_reference(
    dh: Tensor,
    dn: Tensor,
    y: Tensor,
    h: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    rstd_y: Tensor,
    rstd_h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = rstd_y.dtype
    hhat, dn_acc = h.to(acc) * rstd_h[..., None], dn.to(acc)
    r = (dn_acc * hhat).sum(1)
    q = dn_acc * _factor(next_weight, next_scale, acc)
    projection = (q * hhat).mean(-1, keepdim=True)
    e = q.sub_(hhat.mul_(projection)).mul_(rstd_h[..., None]).add_(dh.to(acc))

    yhat, weight_acc = y.to(acc) * rstd_y[..., None], weight.to(acc)
    t = torch.tanh(gate.to(acc))
    p = (e * yhat).sum(1)
    g = e * (t * weight_acc)[:, None]
    projection = (g * yhat).mean(-1, keepdim=True)
    dy = g.sub_(yhat.mul_(projection)).mul_(rstd_y[..., None])

    dgate = (p * weight_acc * (1 - t.square())).to(gate.dtype)
    dweight = (p * t).sum(0).to(weight.dtype)
    if next_scale is None:
        dnext_weight, dnext_scale = r.sum(0), h.new_empty(0)
    else:
        dnext_weight = (r * (1 + next_scale.to(acc))).sum(0)
        dnext_scale = (r * next_weight.to(acc)).to(next_scale.dtype)
    return e.to(h.dtype), dy.to(y.dtype), dgate, dweight, dnext_weight.to(next_weight.dtype), dnext_scale


def _factor(weight: Tensor, scale: Tensor | None, acc: torch.dtype) -> Tensor:
    """weight * (1 + scale), broadcastable over [B, T, D]."""
    return weight.to(acc) if scale is None else weight.to(acc) * (1 + scale.to(acc))[:, None]


# ---- cuda (csrc) ---------------------------------------------------------------------------------------------------


def _forward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _forward_fake(*[*args, "cuda"])
    *inputs, eps, _ = args
    _cuda.call("gated_residual_modulate_fwd", *map(_cuda.with_unit_stride, inputs), *outputs, eps)
    return outputs


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(*[*args, "cuda"])
    *inputs, rstd_y, rstd_h = args
    y, next_scale = inputs[2], inputs[-1]
    batch, tokens, width = y.shape
    p, r = (y.new_empty((batch, _cuda.chunks(batch, tokens), width), dtype=torch.float32) for _ in range(2))
    filled = gradients if next_scale is not None else (*gradients[:-1], None)
    _cuda.call(
        "gated_residual_modulate_bwd", *map(_cuda.with_unit_stride, inputs), rstd_y, rstd_h, *filled, p, r
    )  # fmt: skip
    return gradients


# ---- cpu (csrc) ------------------------------------------------------------------------------------------------------


def _forward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _forward_fake(*[*args, "cpu"])
    *inputs, eps, _ = args  # the kernel reads n's dtype off n
    _cpu.call("gated_residual_modulate_fwd", *inputs, *outputs, eps)
    return outputs


def _backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(*[*args, "cpu"])
    filled = gradients if args[7] is not None else (*gradients[:-1], None)
    _cpu.call("gated_residual_modulate_bwd", *args, *filled)
    return gradients


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call: tuple[Any, ...] = (*args, "triton")
    outputs = _forward_fake(*call)
    *inputs, _ = args  # the kernel reads n's dtype off n
    _triton.kernels("gated_residual_modulate").forward(*inputs, *outputs)
    return outputs


def _backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call: tuple[Any, ...] = (*args, "triton")
    gradients = _backward_fake(*call)
    _triton.kernels("gated_residual_modulate").backward(*args, *gradients)
    return gradients


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cuda": _forward_cuda, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton}
_BACKWARD |= {"cuda": _backward_cuda, "cpu": _backward_cpu}
BACKENDS = Backends("gated_residual_modulate", triton=_triton.refusal, cuda=_cuda.row_refusal, cpu=_cpu.refusal)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, backend = args
    return _FORWARD[backend](*tensors)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *tensors, backend = args
    return _BACKWARD[backend](*tensors)


def _forward_fake(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:2], dtype=acc),
        x.new_empty(x.shape[:2], dtype=acc),
    )


def _backward_fake(
    dh: Tensor,
    dn: Tensor,
    y: Tensor,
    h: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    rstd_y: Tensor,
    rstd_h: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        y.new_empty(y.shape),
        gate.new_empty(gate.shape),
        weight.new_empty(weight.shape),
        next_weight.new_empty(next_weight.shape),
        h.new_empty(0) if next_scale is None else next_scale.new_empty(next_scale.shape),
    )


_gated_residual_modulate_fwd = define(
    "gated_residual_modulate_fwd(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor next_weight,"
    " Tensor? next_scale, float eps, ScalarType dtype, str backend)"
    " -> (Tensor h, Tensor n, Tensor rstd_y, Tensor rstd_h)",
    _forward,
    _forward_fake,
)
_gated_residual_modulate_bwd = define(
    "gated_residual_modulate_bwd(Tensor dh, Tensor dn, Tensor y, Tensor h, Tensor gate, Tensor weight,"
    " Tensor next_weight, Tensor? next_scale, Tensor rstd_y, Tensor rstd_h, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dweight, Tensor dnext_weight, Tensor dnext_scale)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _GatedResidualModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        weight: Tensor,
        next_weight: Tensor,
        next_scale: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        h, n, rstd_y, rstd_h = run(
            _gated_residual_modulate_fwd, x, y, gate, weight, next_weight, next_scale, eps, dtype, backend
        )
        ctx.save_for_backward(y, h, gate, weight, next_weight, next_scale, rstd_y, rstd_h)
        ctx.backend = backend
        return h, n

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gated_residual_modulate")
        saved = y, h, gate, weight, next_weight, next_scale, rstd_y, rstd_h = ctx.saved_tensors
        *grads, dnext_scale = run(_gated_residual_modulate_bwd, dh, dn, *saved, ctx.backend)
        return *grads, None if next_scale is None else dnext_scale, None, None, None


def gated_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    next_scale: Tensor | None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`h = gated_residual(x, y, gate, weight)` and `n = rms_norm_modulate(h, next_weight, next_scale)` in one pass.

    Equivalent to `gated_residual_modulate_ref`.

    x, y: [B, T, D]; gate, next_scale: [B, D], may be strided chunks of one modulation tensor (they are not copied);
    next_scale None: a plain norm; weight, next_weight: [D]. Any of fp32, bf16, fp16, mixed freely; fp64 only alone. B
    may be 0.
    Returns (h, n), both [B, T, D]: h in x's dtype, n in autocast's dtype where autocast is on, else in x's dtype.
    Numerics: fp32 arithmetic, one rounding at each store; n is the norm of the stored h. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where the backend asked for cannot run it.
    """
    _check(x, y, gate, weight, next_weight, next_scale, eps)
    refuse_transforms("gated_residual_modulate")
    tensors = (x, y, gate, weight, next_weight, next_scale)
    dtype, backend = output_dtype(x), BACKENDS.choose(*tensors)
    with recorded("gated_residual_modulate"):
        if needs_grad(*tensors):
            return _GatedResidualModulate.apply(*tensors, eps, dtype, backend)
        h, n, _, _ = run(_gated_residual_modulate_fwd, *tensors, eps, dtype, backend)
        return h, n
