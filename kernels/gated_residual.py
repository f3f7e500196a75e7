"""Triton kernels of `gated_residual`: one program per row forward, some rows of one sample per program backward.

    forward:   h  = x + y * rstd * tanh(gate) * weight              one read of x and y, one write of h
    backward:  dy = rstd * (g - yhat * mean(g * yhat)),  g = dh * tanh(gate) * weight,  yhat = y * rstd
               P  = sum over the program's rows of dh * yhat        one fp32 row per program, see `_sample_sums.py`

dx is dh itself. A row of D is held whole, in a block of the next power of two, the tail masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _sample_sums
from blip3o_fast.kernels._config import launch_config
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride
from blip3o_fast.kernels._tl import tanh


@triton.jit
def gated_residual_fwd(
    x_ptr, y_ptr, gate_ptr, weight_ptr, h_ptr, rstd_ptr,
    tokens, stride_xb, stride_xt, stride_yb, stride_yt, stride_gate, eps: tl.float32,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its rows does not.
    program = tl.program_id(0)
    sample, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    row = program.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    x = tl.load(x_ptr + sample * stride_xb + token * stride_xt + cols, mask=seen, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + sample * stride_yb + token * stride_yt + cols, mask=seen, other=0.0).to(tl.float32)
    factor = tl.load(weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    factor *= tanh(tl.load(gate_ptr + sample * stride_gate + cols, mask=seen, other=0.0).to(tl.float32))
    rstd = tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(h_ptr + row * D + cols, (x + y * rstd * factor).to(h_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows", "chunks"])
def gated_residual_bwd(
    dh_ptr, y_ptr, gate_ptr, weight_ptr, rstd_ptr, dy_ptr, partial_ptr,
    tokens, rows, chunks, stride_dhb, stride_dht, stride_yb, stride_yt, stride_gate,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, first = (program // chunks).to(tl.int64), ((program % chunks) * rows).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    factor = tl.load(weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    factor *= tanh(tl.load(gate_ptr + sample * stride_gate + cols, mask=seen, other=0.0).to(tl.float32))
    p = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        dh = tl.load(dh_ptr + sample * stride_dhb + token * stride_dht + cols, mask=seen, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + sample * stride_yb + token * stride_yt + cols, mask=seen, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        yhat = y * rstd
        g = dh * factor
        p += dh * yhat
        dy = rstd * (g - yhat * (tl.sum(g * yhat, axis=0) / D))
        tl.store(dy_ptr + row * D + cols, dy.to(dy_ptr.dtype.element_ty), mask=seen)
    tl.store(partial_ptr + program.to(tl.int64) * D + cols, p, mask=seen)


def forward(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, h: Tensor, rstd: Tensor) -> None:
    """Fill h [B, T, D] and rstd [B, T] (fp32), both contiguous."""
    batch, tokens, width = x.shape
    x, y, gate, weight = with_unit_stride(x), with_unit_stride(y), with_unit_stride(gate), weight.contiguous()
    config = launch_config("gated_residual.forward", width=width, capability=capability_of(x))
    launch(
        gated_residual_fwd, (batch * tokens,),
        x, y, gate, weight, h, rstd, tokens, *x.stride()[:2], *y.stride()[:2], gate.stride(0), eps,
        D=width, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dgate: Tensor, dweight: Tensor
) -> None:
    """Fill dy [B, T, D], dgate [B, D] and dweight [D], all contiguous."""
    batch, tokens, width = y.shape
    if batch * tokens == 0:
        dgate.zero_()
        dweight.zero_()
        return
    dh, y, gate, weight = with_unit_stride(dh), with_unit_stride(y), with_unit_stride(gate), weight.contiguous()
    config = launch_config(
        "gated_residual.backward", width=width, batch=batch, tokens=tokens, elements_per_thread=8,
        capability=capability_of(y),
    )  # fmt: skip
    chunks = triton.cdiv(tokens, config.rows)
    partial = torch.empty((batch * chunks, width), dtype=torch.float32, device=y.device)
    launch(
        gated_residual_bwd, (batch * chunks,),
        dh, y, gate, weight, rstd, dy, partial,
        tokens, config.rows, chunks, *dh.stride()[:2], *y.stride()[:2], gate.stride(0),
        D=width, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    _sample_sums.finish(partial, gate, weight, dweight, dgate, chunks, _sample_sums.GATE)
