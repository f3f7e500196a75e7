"""Triton kernels of `layer_norm_modulate`: one program per row forward, some rows of one sample per program backward.

    forward:   y  = xhat * (1 + scale),  xhat = (x - mean) * rstd      one read of x, one write of y
    backward:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * (1 + scale)
               P  = sum over the program's rows of dy * xhat           one fp32 row per program, see `_sample_sums.py`

A row of D is held whole, in a block of the next power of two: the variance is taken from the centred row, in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _sample_sums
from blip3o_fast.kernels._config import launch_config
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride


@triton.jit
def layer_norm_modulate_fwd(
    x_ptr, scale_ptr, y_ptr, mean_ptr, rstd_ptr, tokens, stride_xb, stride_xt, stride_scale, eps: tl.float32,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its rows does not.
    program = tl.program_id(0)
    sample, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    row = program.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    x = tl.load(x_ptr + sample * stride_xb + token * stride_xt + cols, mask=seen, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale_ptr + sample * stride_scale + cols, mask=seen, other=0.0).to(tl.float32)
    # rounded to the nearest: plain division is 2 ulp off on a GPU, and the whole row would be shifted by that
    mean = tl.div_rn(tl.sum(x, axis=0), tl.full((), D, tl.float32))
    # Centred first: E[x^2] - mean^2 loses every digit where the mean is large. The tail lanes would add mean^2.
    centred = tl.where(seen, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * D + cols, (centred * rstd * factor).to(y_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows", "chunks"])
def layer_norm_modulate_bwd(
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    tokens, rows, chunks, stride_dyb, stride_dyt, stride_xb, stride_xt, stride_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, first = (program // chunks).to(tl.int64), ((program % chunks) * rows).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    factor = 1.0 + tl.load(scale_ptr + sample * stride_scale + cols, mask=seen, other=0.0).to(tl.float32)
    p = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        dy = tl.load(dy_ptr + sample * stride_dyb + token * stride_dyt + cols, mask=seen, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + sample * stride_xb + token * stride_xt + cols, mask=seen, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(seen, (x - mean) * rstd, 0.0)
        g = dy * factor
        p += dy * xhat
        dx = rstd * (g - tl.sum(g, axis=0) / D - xhat * (tl.sum(g * xhat, axis=0) / D))
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=seen)
    tl.store(partial_ptr + program.to(tl.int64) * D + cols, p, mask=seen)


def forward(x: Tensor, scale: Tensor, eps: float, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Fill y [B, T, D], mean and rstd [B, T] (fp32), all contiguous."""
    batch, tokens, width = x.shape
    x, scale = with_unit_stride(x), with_unit_stride(scale)
    config = launch_config("layer_norm_modulate.forward", width=width, capability=capability_of(x))
    launch(
        layer_norm_modulate_fwd, (batch * tokens,),
        x, scale, y, mean, rstd, tokens, *x.stride()[:2], scale.stride(0), eps,
        D=width, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor, dscale: Tensor) -> None:
    """Fill dx [B, T, D] and dscale [B, D], both contiguous."""
    batch, tokens, width = x.shape
    if batch * tokens == 0:
        dscale.zero_()
        return
    dy, x, scale = with_unit_stride(dy), with_unit_stride(x), with_unit_stride(scale)
    config = launch_config(
        "layer_norm_modulate.backward", width=width, batch=batch, tokens=tokens, elements_per_thread=8,
        capability=capability_of(x),
    )  # fmt: skip
    chunks = triton.cdiv(tokens, config.rows)
    partial = torch.empty((batch * chunks, width), dtype=torch.float32, device=x.device)
    launch(
        layer_norm_modulate_bwd, (batch * chunks,),
        dy, x, scale, mean, rstd, dx, partial,
        tokens, config.rows, chunks, *dy.stride()[:2], *x.stride()[:2], scale.stride(0),
        D=width, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    _sample_sums.finish(partial, scale, None, None, dscale, chunks, _sample_sums.BARE)
