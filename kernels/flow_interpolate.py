"""Triton kernels of `flow_interpolate`: one block of one sample per program, the noise made in registers.

    forward:   x_t = alpha(sigma) * data + s(sigma) * noise        one read of data (and of a given noise), one write
    backward:  ddata = alpha * dy,  dnoise = s * dy                one read of dy

A sample is a run of n elements, whatever its shape.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _config
from blip3o_fast.kernels._config import LaunchConfig
from blip3o_fast.kernels._flow_schedule import path_coefficients
from blip3o_fast.kernels._launch import capability_of, launch
from blip3o_fast.kernels._philox import normals, sample_stream

_DEFAULT = LaunchConfig(num_warps=4, block=2048)


@triton.jit(do_not_specialize=["blocks"])
def flow_interpolate_fwd(
    data_ptr, sigma_ptr, noise_ptr, seed_ptr, x_t_ptr, n, blocks, stride_data, stride_noise,
    sigma_min: tl.float64, span: tl.float64,
    COSINE: tl.constexpr, SEEDED: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its blocks does not.
    program = tl.program_id(0)
    sample, first = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    seen = lanes < n - first
    data = tl.load(data_ptr + (sample * stride_data + first) + lanes, mask=seen, other=0.0).to(tl.float32)
    alpha, scale = path_coefficients(tl.load(sigma_ptr + sample), sigma_min, span, COSINE)
    if SEEDED:
        s_low, s_high, k_low, k_high = sample_stream(seed_ptr, sample)
        noise = normals(first >> 2, s_low, s_high, k_low, k_high, BLOCK, QUADS)
    else:
        noise = tl.load(noise_ptr + (sample * stride_noise + first) + lanes, mask=seen, other=0.0).to(tl.float32)
    x_t = alpha * data + scale * noise
    tl.store(x_t_ptr + (sample * n + first) + lanes, x_t.to(x_t_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["blocks"])
def flow_interpolate_bwd(
    dy_ptr, sigma_ptr, ddata_ptr, dnoise_ptr, n, blocks, stride_dy, sigma_min: tl.float64, span: tl.float64,
    COSINE: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, first = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    seen = lanes < n - first
    dy = tl.load(dy_ptr + (sample * stride_dy + first) + lanes, mask=seen, other=0.0).to(tl.float32)
    alpha, scale = path_coefficients(tl.load(sigma_ptr + sample), sigma_min, span, COSINE)
    row = sample * n + first
    tl.store(ddata_ptr + row + lanes, (alpha * dy).to(ddata_ptr.dtype.element_ty), mask=seen)
    if GIVEN:
        tl.store(dnoise_ptr + row + lanes, (scale * dy).to(dnoise_ptr.dtype.element_ty), mask=seen)


def samples(tensor: Tensor) -> Tensor:
    """The tensor itself where each of its samples is contiguous, however far apart they lie, else a copy."""
    if tensor.is_contiguous() or tensor.shape[0] and tensor[0].is_contiguous():
        return tensor
    return tensor.contiguous()


def forward(
    data: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None,
    sigma_min: float, sigma_max: float, schedule: str, x_t: Tensor,
) -> None:  # fmt: skip
    """Fill x_t, contiguous and of data's shape [B, ...]."""
    n, blocks, config = _shape("flow_interpolate.forward", x_t)
    data, noise = samples(data), None if noise is None else samples(noise)
    launch(
        flow_interpolate_fwd, (x_t.shape[0] * blocks,),
        data, sigma.contiguous(), noise, None if seed is None else seed.contiguous(), x_t,
        n, blocks, data.stride(0), 0 if noise is None else noise.stride(0), sigma_min, sigma_max - sigma_min,
        COSINE=schedule == "cosine", SEEDED=seed is not None, QUADS=1 if x_t.itemsize == 4 else 2,
        BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(
    dy: Tensor, sigma: Tensor, sigma_min: float, sigma_max: float, schedule: str, ddata: Tensor, dnoise: Tensor | None
) -> None:
    """Fill ddata and, where the noise was given, dnoise; contiguous and of dy's shape [B, ...]."""
    n, blocks, config = _shape("flow_interpolate.backward", ddata)
    dy = samples(dy)
    launch(
        flow_interpolate_bwd, (ddata.shape[0] * blocks,),
        dy, sigma.contiguous(), ddata, dnoise, n, blocks, dy.stride(0), sigma_min, sigma_max - sigma_min,
        COSINE=schedule == "cosine", GIVEN=dnoise is not None, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def _shape(kernel: str, x: Tensor) -> tuple[int, int, LaunchConfig]:
    """Elements of one sample, programs per sample, and how they are launched."""
    n = x[0].numel() if x.shape[0] else 0
    config = replace(_DEFAULT, **_config.tuned(kernel, 0, capability_of(x)))
    return n, triton.cdiv(n, config.block), config
