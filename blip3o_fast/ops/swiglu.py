"""SwiGLU on the packed output of one GEMM: the gate of a Lumina feed-forward layer.

    a, b = the two halves of gate_up's last dimension
    y    = silu(a) * b,    silu(a) = a * s,    s = 1 / (1 + exp(-a))

Source: `LuminaFeedForward` and `FP32SiLU` of diffusers (a = linear_1, b = linear_3); SwiGLU is Shazeer 2020,
https://arxiv.org/abs/2002.05202.

Backward, from ds/da = s * (1 - s):

    da = dy * b * s * (1 + a * (1 - s))
    db = dy * a * s

written as the two halves of one gradient, so that the GEMM's backward reads it where it lies. Saved: the input.
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


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to gate_up's dtype."""
    a, b = gate_up.to(accumulation_dtype(gate_up)).chunk(2, dim=-1)
    return (a * torch.sigmoid(a) * b).to(gate_up.dtype)


def _check(gate_up: Tensor) -> None:
    if not isinstance(gate_up, Tensor):
        raise ValueError(f"gate_up must be a tensor of shape (..., 2F), got {type(gate_up).__name__}")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up must have shape (..., 2F) with an even last dimension, got shape {tuple(gate_up.shape)}"
        )
    _checks.check_floats(gate_up=gate_up)


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = gate_up.to(accumulation_dtype(gate_up)).chunk(2, dim=-1)
    return torch.nn.functional.silu(a).mul_(b).to(dtype)


def _backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    acc = accumulation_dtype(gate_up)
    dy = dy.to(acc)
    a, b = gate_up.to(acc).chunk(2, dim=-1)
    dgate_up = torch.empty(gate_up.shape, dtype=acc, device=gate_up.device)
    da, db = dgate_up.chunk(2, dim=-1)
    torch.mul(dy, torch.nn.functional.silu(a), out=db)
    # aten's derivative of silu is the formula above in one pass: grad * s * (1 + a * (1 - s))
    torch.ops.aten.silu_backward.grad_input(dy * b, a, grad_input=da)
    return dgate_up.to(gate_up.dtype)


# ---- cpu (csrc) ------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x itself, or its leading dimensions as one where they are more than a kernel counts through."""
    return x if x.dim() <= 6 else x.flatten(0, -2)


def _forward_cpu(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    y = _forward_fake(gate_up, dtype, "cpu")
    _cpu.call("swiglu_fwd", _rows(gate_up), _rows(y))
    return y


def _backward_cpu(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = _backward_fake(dy, gate_up, "cpu")
    _cpu.call("swiglu_bwd", _rows(dy), _rows(gate_up), _rows(dgate_up))
    return dgate_up


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    y = _forward_fake(gate_up, dtype, "triton")
    _triton.kernels("swiglu").forward(gate_up, y)
    return y


def _backward_triton(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = _backward_fake(dy, gate_up, "triton")
    _triton.kernels("swiglu").backward(dy, gate_up, dgate_up)
    return dgate_up


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu}
BACKENDS = Backends("swiglu", triton=_triton.refusal, cpu=_cpu.refusal)


def _forward(gate_up: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return _FORWARD[backend](gate_up, dtype)


def _backward(dy: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    return _BACKWARD[backend](dy, gate_up)


def _forward_fake(gate_up: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=dtype)


def _backward_fake(dy: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_swiglu_fwd = define(
    "swiglu_fwd(Tensor gate_up, ScalarType dtype, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_swiglu_bwd = define(
    "swiglu_bwd(Tensor dy, Tensor gate_up, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.backend = backend
        return run(_swiglu_fwd, gate_up, dtype, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("swiglu")
        (gate_up,) = ctx.saved_tensors
        return run(_swiglu_bwd, dy, gate_up, ctx.backend), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(a) * b` of the packed `gate_up = [a, b]`.

    Equivalent to `swiglu_ref`, in one pass.

    gate_up: [..., 2F], what `merged_linear(x, [w1, w3])` returns; fp32, bf16, fp16 or fp64. Leading sizes may be 0.
    Returns [..., F] in autocast's dtype where autocast is on, else in gate_up's dtype.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable.
    Raises ValueError for a wrong shape or dtype, RuntimeError where the backend asked for cannot run it.
    """
    _check(gate_up)
    refuse_transforms("swiglu")
    dtype, backend = output_dtype(gate_up), BACKENDS.choose(gate_up)
    with recorded("swiglu"):
        if needs_grad(gate_up):
            return _Swiglu.apply(gate_up, dtype, backend)
        return run(_swiglu_fwd, gate_up, dtype, backend)
