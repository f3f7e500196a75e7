"""The noisy sample of flow matching: data and noise mixed at the sample's noise level.

    x_t = alpha(sigma) * data + s(sigma) * noise

alpha and s are the path's coefficients (`_flow_schedule.py`); the noise is given, or made from (seed, offset) by the
counter-based generator of `_philox.py`, where row b is the sample with the global index offset + b. Source: conditional
flow matching, Lipman et al. 2023, https://arxiv.org/abs/2210.02747; BLIP3-o trains the linear schedule.

Backward, for the upstream gradient dy:

    ddata = alpha * dy          dnoise = s * dy

Saved: sigma.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _checks, _cpu, _triton
from blip3o_fast.ops._backend import Backends
from blip3o_fast.ops._flow_schedule import check_schedule, path_coefficients
from blip3o_fast.ops._library import (
    accumulation_dtype,
    define,
    needs_grad,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)
from blip3o_fast.ops._philox import normal_noise


def flow_interpolate_ref(
    data: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    schedule: str = "linear",
) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to data's dtype."""
    acc = accumulation_dtype(data)
    level = sigma.to(acc).reshape(-1, *(1,) * (data.dim() - 1))
    alpha, noise_scale, _, _ = path_coefficients(level, schedule, sigma_min, sigma_max)
    return (alpha * data.to(acc) + noise_scale * given_or_made_noise(data, noise, seed)).to(data.dtype)


def given_or_made_noise(data: Tensor, noise: Tensor | None, seed: Tensor | None) -> Tensor:
    """The noise as the arithmetic sees it: fp32 (fp64 for fp64 data), of data's shape."""
    acc = accumulation_dtype(data)
    if noise is not None:
        return noise.to(acc)
    assert seed is not None
    return normal_noise(seed, data.shape).to(acc)


def check_path_inputs(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
    axes: str,
) -> None:
    """What the two flow-matching ops demand alike; `axes` is data's shape in the op's letters."""
    _checks.check_shape("sigma", sigma, "B", (data.shape[0],))
    if sigma.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"sigma must be float32 (float64 with float64 data), got {sigma.dtype}: half precision merges noise levels"
        )
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"exactly one of noise and seed must be given, got {given}")
    if noise is not None:
        _checks.check_shape("noise", noise, axes, data.shape)
    _checks.check_floats(data=data, sigma=sigma, noise=noise)
    if seed is not None:
        _checks.check_shape("seed", seed, "2", (2,))
        if seed.dtype != torch.int64:
            raise ValueError(f"seed must be int64 (seed, offset), got {seed.dtype}")
        if seed.device != data.device:
            raise ValueError(f"seed must be on {data.device} like data, got {seed.device}")
    check_schedule(schedule, sigma_min, sigma_max)


def _check(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> None:
    if not isinstance(data, Tensor):
        raise ValueError(f"data must be a tensor of shape (B, ...), got {type(data).__name__}")
    if data.dim() < 2:
        raise ValueError(f"data must have at least 2 dimensions (B, ...), got shape {tuple(data.shape)}")
    check_path_inputs(data, sigma, noise, seed, sigma_min, sigma_max, schedule, "B, ...")
    if sigma.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "sigma requires grad, but only data and noise are differentiable here: detach it, "
            "or use flow_interpolate_ref"
        )


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> Tensor:
    return flow_interpolate_ref(
        data, sigma, noise=noise, seed=seed, sigma_min=sigma_min, sigma_max=sigma_max, schedule=schedule
    )


def _backward_reference(
    dy: Tensor,
    sigma: Tensor,
    noise_dtype: torch.dtype | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(dy)
    level = sigma.to(acc).reshape(-1, *(1,) * (dy.dim() - 1))
    alpha, noise_scale, _, _ = path_coefficients(level, schedule, sigma_min, sigma_max)
    dy_acc = dy.to(acc)
    dnoise = dy.new_empty(0) if noise_dtype is None else (noise_scale * dy_acc).to(noise_dtype)
    return (alpha * dy_acc).to(dy.dtype), dnoise


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> Tensor:
    x_t = _forward_fake(data)
    _cpu.call("flow_interpolate_fwd", data, sigma, noise, seed, x_t, sigma_min, sigma_max, schedule == "cosine")
    return x_t


def _backward_cpu(
    dy: Tensor,
    sigma: Tensor,
    noise_dtype: torch.dtype | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    ddata, dnoise = _backward_fake(dy, sigma, noise_dtype)
    given = None if noise_dtype is None else dnoise
    _cpu.call("flow_interpolate_bwd", dy, sigma, ddata, given, sigma_min, sigma_max, schedule == "cosine")
    return ddata, dnoise


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> Tensor:
    x_t = _forward_fake(data, sigma, noise, seed, sigma_min, sigma_max, schedule, "triton")
    kernels = _triton.kernels("flow_interpolate")
    kernels.forward(data, sigma, noise, seed, sigma_min, sigma_max, schedule, x_t)
    return x_t


def _backward_triton(
    dy: Tensor,
    sigma: Tensor,
    noise_dtype: torch.dtype | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> tuple[Tensor, Tensor]:
    ddata, dnoise = _backward_fake(dy, sigma, noise_dtype, sigma_min, sigma_max, schedule, "triton")
    kernels = _triton.kernels("flow_interpolate")
    kernels.backward(dy, sigma, sigma_min, sigma_max, schedule, ddata, None if noise_dtype is None else dnoise)
    return ddata, dnoise


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu}
BACKENDS = Backends("flow_interpolate", triton=_triton.refusal, cpu=_cpu.elementwise_refusal)


def _forward(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
    backend: str,
) -> Tensor:
    return _FORWARD[backend](data, sigma, noise, seed, sigma_min, sigma_max, schedule)


def _backward(
    dy: Tensor,
    sigma: Tensor,
    noise_dtype: torch.dtype | None,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _BACKWARD[backend](dy, sigma, noise_dtype, sigma_min, sigma_max, schedule)


def _forward_fake(data: Tensor, *inputs_and_settings: Any) -> Tensor:
    return data.new_empty(data.shape)


def _backward_fake(dy: Tensor, sigma: Tensor, noise_dtype: torch.dtype | None, *settings: Any) -> tuple[Tensor, Tensor]:
    dnoise = dy.new_empty(0) if noise_dtype is None else dy.new_empty(dy.shape, dtype=noise_dtype)
    return dy.new_empty(dy.shape), dnoise


_flow_interpolate_fwd = define(
    "flow_interpolate_fwd(Tensor data, Tensor sigma, Tensor? noise, Tensor? seed, float sigma_min, float sigma_max,"
    " str schedule, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_flow_interpolate_bwd = define(
    "flow_interpolate_bwd(Tensor dy, Tensor sigma, ScalarType? noise_dtype, float sigma_min, float sigma_max,"
    " str schedule, str backend) -> (Tensor ddata, Tensor dnoise)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _FlowInterpolate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        data: Tensor,
        sigma: Tensor,
        noise: Tensor | None,
        seed: Tensor | None,
        sigma_min: float,
        sigma_max: float,
        schedule: str,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(sigma)
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.settings = (sigma_min, sigma_max, schedule, backend)
        return run(_flow_interpolate_fwd, data, sigma, noise, seed, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("flow_interpolate")
        (sigma,) = ctx.saved_tensors
        ddata, dnoise = run(_flow_interpolate_bwd, dy, sigma, ctx.noise_dtype, *ctx.settings)
        return ddata, None, None if ctx.noise_dtype is None else dnoise, None, None, None, None, None


def flow_interpolate(
    data: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    schedule: str = "linear",
) -> Tensor:
    """Mix data with noise: `alpha(sigma) * data + s(sigma) * noise`.

    Equivalent to `flow_interpolate_ref`, in one pass, with the noise made on the way.

    data: [B, ...]; sigma: fp32 [B] in [0, 1], 1 = pure noise; noise: of data's shape, or None; seed: int64 [2] =
    (seed, offset), or None. Exactly one of noise and seed. data and noise in fp32, bf16 or fp16, mixed freely; fp64
    only alone (sigma too). schedule: "linear" or "cosine", with 0 <= sigma_min < sigma_max. B may be 0.
    Returns x_t of data's shape and dtype. Differentiable in data and noise.
    Numerics: fp32 arithmetic, one rounding at the store. Bitwise repeatable; with a seed, row b depends only on seed
    and offset + b, so a batch may be cut anywhere.
    Raises ValueError for a wrong shape, dtype, device or setting and for a sigma that requires grad, RuntimeError
    where the backend asked for cannot run it.
    """
    _check(data, sigma, noise, seed, sigma_min, sigma_max, schedule)
    refuse_transforms("flow_interpolate")
    backend = BACKENDS.choose(data, sigma, noise, seed)
    settings = (noise, seed, float(sigma_min), float(sigma_max), schedule, backend)
    with recorded("flow_interpolate"):
        if needs_grad(data, noise):
            return _FlowInterpolate.apply(data, sigma, *settings)
        return run(_flow_interpolate_fwd, data, sigma, *settings)
