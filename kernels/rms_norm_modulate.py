"""Triton kernels of `rms_norm_modulate`: one program per row forward, some rows of one sample per program backward.

    forward:   y  = x * rstd * weight * (1 + scale)                    one read of x, one write of y
    backward:  dx = rstd * (g - xhat * mean(g * xhat)),  g = dy * weight * (1 + scale),  xhat = x * rstd
               P  = sum over the program's rows of dy * xhat           one fp32 row per program, see `_sample_sums.py`

A row of D is held whole, in a block of the next power of two. The masked lanes of 1792 in 2048 cost no traffic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _sample_sums
from blip3o_fast.kernels._config import launch_config
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride


@triton.jit
def rms_norm_modulate_fwd(
    x_ptr, weight_ptr, scale_ptr, y_ptr, rstd_ptr, tokens, stride_xb, stride_xt, stride_scale, eps: tl.float32,
    D: tl.constexpr, SCALED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its rows does not.
    program = tl.program_id(0)
    sample, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    row = program.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    x = tl.load(x_ptr + sample * stride_xb + token * stride_xt + cols, mask=seen, other=0.0).to(tl.float32)
    factor = tl.load(weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    if SCALED:
        factor *= 1.0 + tl.load(scale_ptr + sample * stride_scale + cols, mask=seen, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * D + cols, (x * rstd * factor).to(y_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows", "chunks"])
def rms_norm_modulate_bwd(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, rstd_ptr, dx_ptr, partial_ptr,
    tokens, rows, chunks, stride_dyb, stride_dyt, stride_xb, stride_xt, stride_scale,
    D: tl.constexpr, SCALED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, first = (program // chunks).to(tl.int64), ((program % chunks) * rows).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    factor = tl.load(weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    if SCALED:
        factor *= 1.0 + tl.load(scale_ptr + sample * stride_scale + cols, mask=seen, other=0.0).to(tl.float32)
    p = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        dy = tl.load(dy_ptr + sample * stride_dyb + token * stride_dyt + cols, mask=seen, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + sample * stride_xb + token * stride_xt + cols, mask=seen, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = x * rstd
        g = dy * factor
        p += dy * xhat
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=seen)
    tl.store(partial_ptr + program.to(tl.int64) * D + cols, p, mask=seen)


def forward(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, y: Tensor, rstd: Tensor) -> None:
    """Fill y [B, T, D] and rstd [B, T] (fp32), both contiguous."""
    batch, tokens, width = x.shape
    x, weight = with_unit_stride(x), weight.contiguous()
    scale = None if scale is None else with_unit_stride(scale)
    config = launch_config("rms_norm_modulate.forward", width=width, capability=capability_of(x))
    launch(
        rms_norm_modulate_fwd, (batch * tokens,),
        x, weight, scale, y, rstd, tokens, x.stride(0), x.stride(1), 0 if scale is None else scale.stride(0), eps,
        D=width, SCALED=scale is not None, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, rstd: Tensor,
    dx: Tensor, dweight: Tensor, dscale: Tensor | None,
) -> None:  # fmt: skip
    """Fill dx [B, T, D], dweight [D] and, with a scale, dscale [B, D], all contiguous."""
    batch, tokens, width = x.shape
    if batch * tokens == 0:
        for gradient in (dweight, dscale):
            if gradient is not None:
                gradient.zero_()
        return
    dy, x, weight = with_unit_stride(dy), with_unit_stride(x), weight.contiguous()
    scale = None if scale is None else with_unit_stride(scale)
    stride_scale = 0 if scale is None else scale.stride(0)
    config = launch_config(
        "rms_norm_modulate.backward", width=width, batch=batch, tokens=tokens, elements_per_thread=8,
        capability=capability_of(x),
    )  # fmt: skip
    chunks = triton.cdiv(tokens, config.rows)
    partial = torch.empty((batch * chunks, width), dtype=torch.float32, device=x.device)
    launch(
        rms_norm_modulate_bwd, (batch * chunks,),
        dy, x, weight, scale, rstd, dx, partial,
        tokens, config.rows, chunks, *dy.stride()[:2], *x.stride()[:2], stride_scale,
        D=width, SCALED=scale is not None, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    kind = _sample_sums.PLAIN if scale is None else _sample_sums.SCALE
    _sample_sums.finish(partial, scale, weight, dweight, dscale, chunks, kind)
