"""Classifier-free guidance and one Euler step of the sampling ODE, in one pass.

    v = v_uncond + guidance * (v_cond - v_uncond)          v = v_cond where v_uncond is None
    y = x + dsigma * v                                     dsigma = sigma_next - sigma, negative towards the data

Source: guidance is Ho and Salimans 2022, https://arxiv.org/abs/2207.12598; the step is that of diffusers'
`FlowMatchEulerDiscreteScheduler`. guidance and dsigma are tensors because numbers would be frozen into a CUDA graph.

Backward, for the upstream gradient dy:

    dx = dy        dv_cond = dsigma * guidance * dy        dv_uncond = dsigma * (1 - guidance) * dy

Saved: guidance and dsigma.
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


def ode_step_ref(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to x's dtype."""
    acc = accumulation_dtype(x)
    v = v_cond.to(acc)
    if v_uncond is not None:
        assert guidance is not None
        null = v_uncond.to(acc)
        v = null + guidance.to(acc) * (v - null)
    return (x.to(acc) + dsigma.to(acc) * v).to(x.dtype)


def _check(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor of shape (B, ...), got {type(x).__name__}")
    _checks.check_shape("v_cond", v_cond, "B, ...", x.shape)
    if v_uncond is not None:
        _checks.check_shape("v_uncond", v_uncond, "B, ...", x.shape)
        if guidance is None:
            raise ValueError("guidance must be a 0-d float32 tensor where v_uncond is given, got None")
    _checks.check_floats(x=x, v_cond=v_cond, v_uncond=v_uncond)
    for name, value in (("guidance", guidance), ("dsigma", dsigma)):
        if value is None and name == "guidance":
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a 0-d float32 tensor (a number would be frozen into a CUDA graph), got {value!r}"
            )
        if value.dim() != 0 or value.dtype not in (torch.float32, accumulation_dtype(x)):
            raise ValueError(
                f"{name} must be a 0-d float32 tensor (float64 with float64 x), "
                f"got shape {tuple(value.shape)}, {value.dtype}"
            )
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {value.device}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but only x, v_cond and v_uncond are differentiable here")


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor
) -> Tensor:
    return ode_step_ref(x, v_cond, v_uncond, guidance, dsigma)


def _backward_reference(
    dy: Tensor, guidance: Tensor | None, dsigma: Tensor, cond_dtype: torch.dtype, uncond_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(dy)
    step = dsigma.to(acc) * dy.to(acc)
    if guidance is None:
        return step.to(cond_dtype), dy.new_empty(0, dtype=uncond_dtype)
    w = guidance.to(acc)
    return (w * step).to(cond_dtype), ((1 - w) * step).to(uncond_dtype)


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor) -> Tensor:
    y = _forward_fake(x, v_cond, v_uncond, guidance, dsigma, "cpu")
    _cpu.call("ode_step_fwd", x, v_cond, v_uncond, guidance, dsigma, y)
    return y


def _backward_cpu(
    dy: Tensor, guidance: Tensor | None, dsigma: Tensor, cond_dtype: torch.dtype, uncond_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dv_cond, dv_uncond = _backward_fake(dy, guidance, dsigma, cond_dtype, uncond_dtype, "cpu")
    _cpu.call("ode_step_bwd", dy, guidance, dsigma, dv_cond, None if guidance is None else dv_uncond)
    return dv_cond, dv_uncond


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor
) -> Tensor:
    y = _forward_fake(x, v_cond, v_uncond, guidance, dsigma, "triton")
    _triton.kernels("ode_step").forward(x, v_cond, v_uncond, guidance, dsigma, y)
    return y


def _backward_triton(
    dy: Tensor, guidance: Tensor | None, dsigma: Tensor, cond_dtype: torch.dtype, uncond_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dv_cond, dv_uncond = _backward_fake(dy, guidance, dsigma, cond_dtype, uncond_dtype, "triton")
    _triton.kernels("ode_step").backward(dy, guidance, dsigma, dv_cond, dv_uncond)
    return dv_cond, dv_uncond


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu}
BACKENDS = Backends("ode_step", triton=_triton.refusal, cpu=_cpu.elementwise_refusal)


def _forward(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor, backend: str
) -> Tensor:
    return _FORWARD[backend](x, v_cond, v_uncond, guidance, dsigma)


def _backward(
    dy: Tensor,
    guidance: Tensor | None,
    dsigma: Tensor,
    cond_dtype: torch.dtype,
    uncond_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _BACKWARD[backend](dy, guidance, dsigma, cond_dtype, uncond_dtype)


def _forward_fake(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor, backend: str
) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dy: Tensor,
    guidance: Tensor | None,
    dsigma: Tensor,
    cond_dtype: torch.dtype,
    uncond_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    uncond_shape = (0,) if guidance is None else dy.shape
    return dy.new_empty(dy.shape, dtype=cond_dtype), dy.new_empty(uncond_shape, dtype=uncond_dtype)


_ode_step_fwd = define(
    "ode_step_fwd(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? guidance, Tensor dsigma, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_ode_step_bwd = define(
    "ode_step_bwd(Tensor dy, Tensor? guidance, Tensor dsigma, ScalarType cond_dtype, ScalarType uncond_dtype,"
    " str backend) -> (Tensor dv_cond, Tensor dv_uncond)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _OdeStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v_cond: Tensor,
        v_uncond: Tensor | None,
        guidance: Tensor | None,
        dsigma: Tensor,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(guidance, dsigma)
        ctx.dtypes = (v_cond.dtype, v_cond.dtype if v_uncond is None else v_uncond.dtype)
        ctx.backend = backend
        return run(_ode_step_fwd, x, v_cond, v_uncond, guidance, dsigma, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("ode_step")
        guidance, dsigma = ctx.saved_tensors
        dv_cond, dv_uncond = run(_ode_step_bwd, dy, guidance, dsigma, *ctx.dtypes, ctx.backend)
        return dy, dv_cond, None if guidance is None else dv_uncond, None, None, None


def ode_step(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor) -> Tensor:
    """One Euler step with guidance: `x + dsigma * (v_uncond + guidance * (v_cond - v_uncond))`.

    Equivalent to `ode_step_ref`, in one pass.

    x, v_cond: same shape, any; v_uncond: the same, or None where guidance is 1, and then guidance is not read (it may
    be None). guidance, dsigma: 0-d fp32 tensors on x's device. x, v_cond and v_uncond in fp32, bf16 or fp16, mixed
    freely (keep x in fp32 over a bf16 network); fp64 only alone.
    Returns a tensor of x's shape and dtype. Differentiable in x, v_cond and v_uncond.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device and for guidance or dsigma that require grad, RuntimeError
    where the backend asked for cannot run it.
    """
    _check(x, v_cond, v_uncond, guidance, dsigma)
    refuse_transforms("ode_step")
    if v_uncond is None:
        guidance = None
    backend = BACKENDS.choose(x, v_cond, v_uncond, guidance, dsigma)
    with recorded("ode_step"):
        if needs_grad(x, v_cond, v_uncond):
            return _OdeStep.apply(x, v_cond, v_uncond, guidance, dsigma, backend)
        return run(_ode_step_fwd, x, v_cond, v_uncond, guidance, dsigma, backend)
