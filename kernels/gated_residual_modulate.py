"""Triton kernels of `gated_residual_modulate`: a row per program forward, some rows of one sample backward.

    forward:   h  = x + y * rstd_y * tanh(gate) * weight, rounded           one read of x and y,
               n  = h * rstd_h * next_weight * (1 + next_scale)             one write of h and n

    backward:  e  = dh + rstd_h * (q - hhat * mean(q * hhat)),  q = dn * next_weight * (1 + next_scale)
               dx = e,  dy = rstd_y * (g - yhat * mean(g * yhat)),  g = e * tanh(gate) * weight
               P  = sum over the program's rows of e * yhat                 two fp32 rows per program, both added
               R  = sum over the program's rows of dn * hhat                up by one launch (`_sample_sums.py`)

with yhat = y * rstd_y and hhat = h * rstd_h. e stays in fp32 registers: dy and P come from the unrounded one. A row of
D is held whole, in a block of the next power of two, the tail masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _sample_sums
from blip3o_fast.kernels._config import launch_config
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride
from blip3o_fast.kernels._sample_sums import sample_sums
from blip3o_fast.kernels._tl import tanh


@triton.jit
def gated_residual_modulate_fwd(
    x_ptr, y_ptr, gate_ptr, weight_ptr, next_weight_ptr, next_scale_ptr, h_ptr, n_ptr, rstd_y_ptr, rstd_h_ptr,
    tokens, stride_xb, stride_xt, stride_yb, stride_yt, stride_gate, stride_scale, eps: tl.float32,
    D: tl.constexpr, SCALED: tl.constexpr, BLOCK_D: tl.constexpr,
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
    next_factor = tl.load(next_weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    if SCALED:
        next_scale = tl.load(next_scale_ptr + sample * stride_scale + cols, mask=seen, other=0.0).to(tl.float32)
        next_factor *= 1.0 + next_scale
    rstd_y = tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
    stored = (x + y * rstd_y * factor).to(h_ptr.dtype.element_ty)
    # The norm of what memory holds: backward reads h from there.
    h = stored.to(tl.float32)
    rstd_h = tl.rsqrt(tl.sum(h * h, axis=0) / D + eps)
    tl.store(rstd_y_ptr + row, rstd_y)
    tl.store(rstd_h_ptr + row, rstd_h)
    tl.store(h_ptr + row * D + cols, stored, mask=seen)
    tl.store(n_ptr + row * D + cols, (h * rstd_h * next_factor).to(n_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows", "chunks"])
def gated_residual_modulate_bwd(
    dh_ptr, dn_ptr, y_ptr, h_ptr, gate_ptr, weight_ptr, next_weight_ptr, next_scale_ptr, rstd_y_ptr, rstd_h_ptr,
    dx_ptr, dy_ptr, p_ptr, r_ptr,
    tokens, rows, chunks, stride_dhb, stride_dht, stride_dnb, stride_dnt, stride_yb, stride_yt, stride_gate,
    stride_scale,
    D: tl.constexpr, SCALED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, first = (program // chunks).to(tl.int64), ((program % chunks) * rows).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    seen = cols < D
    factor = tl.load(weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    factor *= tanh(tl.load(gate_ptr + sample * stride_gate + cols, mask=seen, other=0.0).to(tl.float32))
    next_factor = tl.load(next_weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    if SCALED:
        next_scale = tl.load(next_scale_ptr + sample * stride_scale + cols, mask=seen, other=0.0).to(tl.float32)
        next_factor *= 1.0 + next_scale
    p = tl.zeros((BLOCK_D,), tl.float32)
    r = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        dn = tl.load(dn_ptr + sample * stride_dnb + token * stride_dnt + cols, mask=seen, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * D + cols, mask=seen, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + sample * stride_dhb + token * stride_dht + cols, mask=seen, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + sample * stride_yb + token * stride_yt + cols, mask=seen, other=0.0).to(tl.float32)
        rstd_h = tl.load(rstd_h_ptr + row)
        rstd_y = tl.load(rstd_y_ptr + row)
        hhat = h * rstd_h
        r += dn * hhat
        q = dn * next_factor
        e = dh + rstd_h * (q - hhat * (tl.sum(q * hhat, axis=0) / D))
        tl.store(dx_ptr + row * D + cols, e.to(dx_ptr.dtype.element_ty), mask=seen)
        yhat = y * rstd_y
        p += e * yhat
        g = e * factor
        dy = rstd_y * (g - yhat * (tl.sum(g * yhat, axis=0) / D))
        tl.store(dy_ptr + row * D + cols, dy.to(dy_ptr.dtype.element_ty), mask=seen)
    partial = program.to(tl.int64) * D + cols
    tl.store(p_ptr + partial, p, mask=seen)
    tl.store(r_ptr + partial, r, mask=seen)


@triton.jit(do_not_specialize=["gate_programs", "partial_rows", "chunks"])
def gated_residual_modulate_sums(
    p_ptr, gate_ptr, weight_ptr, dweight_ptr, dgate_ptr,
    r_ptr, next_scale_ptr, next_weight_ptr, dnext_weight_ptr, dnext_scale_ptr,
    gate_programs, partial_rows, chunks, stride_gate, stride_scale,
    D: tl.constexpr, GATE_KIND: tl.constexpr, NEXT_KIND: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr, WEIGHT_COLUMNS: tl.constexpr, MOD_ROWS: tl.constexpr, MOD_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first `gate_programs` programs add up P, the others R."""
    program = tl.program_id(0)
    if program < gate_programs:
        sample_sums(
            p_ptr, gate_ptr, weight_ptr, dweight_ptr, dgate_ptr, program, partial_rows, chunks, stride_gate,
            D, GATE_KIND, WEIGHT_ROWS, WEIGHT_COLUMNS, MOD_ROWS, MOD_COLUMNS,
        )  # fmt: skip
    else:
        sample_sums(
            r_ptr, next_scale_ptr, next_weight_ptr, dnext_weight_ptr, dnext_scale_ptr, program - gate_programs,
            partial_rows, chunks, stride_scale,
            D, NEXT_KIND, WEIGHT_ROWS, WEIGHT_COLUMNS, MOD_ROWS, MOD_COLUMNS,
        )  # fmt: skip


def forward(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, next_weight: Tensor, next_scale: Tensor | None, eps: float,
    h: Tensor, n: Tensor, rstd_y: Tensor, rstd_h: Tensor,
) -> None:  # fmt: skip
    """Fill h and n [B, T, D], rstd_y and rstd_h [B, T] (fp32), all contiguous."""
    batch, tokens, width = x.shape
    x, y, gate = with_unit_stride(x), with_unit_stride(y), with_unit_stride(gate)
    weight, next_weight = weight.contiguous(), next_weight.contiguous()
    next_scale = None if next_scale is None else with_unit_stride(next_scale)
    stride_scale = 0 if next_scale is None else next_scale.stride(0)
    config = launch_config("gated_residual_modulate.forward", width=width, capability=capability_of(x))
    launch(
        gated_residual_modulate_fwd, (batch * tokens,),
        x, y, gate, weight, next_weight, next_scale, h, n, rstd_y, rstd_h,
        tokens, *x.stride()[:2], *y.stride()[:2], gate.stride(0), stride_scale, eps,
        D=width, SCALED=next_scale is not None, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(
    dh: Tensor, dn: Tensor, y: Tensor, h: Tensor, gate: Tensor, weight: Tensor, next_weight: Tensor,
    next_scale: Tensor | None, rstd_y: Tensor, rstd_h: Tensor,
    dx: Tensor, dy: Tensor, dgate: Tensor, dweight: Tensor, dnext_weight: Tensor, dnext_scale: Tensor,
) -> None:  # fmt: skip
    """Fill dx and dy [B, T, D], dgate and, with a next_scale, dnext_scale [B, D], dweight and dnext_weight [D]."""
    batch, tokens, width = y.shape
    if batch * tokens == 0:
        for gradient in (dgate, dweight, dnext_weight, dnext_scale):
            gradient.zero_()
        return
    dh, dn, y, gate = with_unit_stride(dh), with_unit_stride(dn), with_unit_stride(y), with_unit_stride(gate)
    # h is forward's own output, so this copies nothing.
    h, weight, next_weight = h.contiguous(), weight.contiguous(), next_weight.contiguous()
    next_scale = None if next_scale is None else with_unit_stride(next_scale)
    stride_scale = 0 if next_scale is None else next_scale.stride(0)
    config = launch_config(
        "gated_residual_modulate.backward", width=width, batch=batch, tokens=tokens, elements_per_thread=8,
        capability=capability_of(y),
    )  # fmt: skip
    chunks = triton.cdiv(tokens, config.rows)
    partial_rows = batch * chunks
    p, r = (torch.empty((partial_rows, width), dtype=torch.float32, device=y.device) for _ in range(2))
    launch(
        gated_residual_modulate_bwd, (partial_rows,),
        dh, dn, y, h, gate, weight, next_weight, next_scale, rstd_y, rstd_h, dx, dy, p, r,
        tokens, config.rows, chunks, *dh.stride()[:2], *dn.stride()[:2], *y.stride()[:2], gate.stride(0), stride_scale,
        D=width, SCALED=next_scale is not None, BLOCK_D=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    next_kind = _sample_sums.PLAIN if next_scale is None else _sample_sums.SCALE
    gate_programs = _sample_sums.programs(batch, width, _sample_sums.GATE)
    launch(
        gated_residual_modulate_sums, (gate_programs + _sample_sums.programs(batch, width, next_kind),),
        p, gate, weight, dweight, dgate, r, next_scale, next_weight, dnext_weight, dnext_scale,
        gate_programs, partial_rows, chunks, gate.stride(0), stride_scale,
        D=width, GATE_KIND=_sample_sums.GATE, NEXT_KIND=next_kind,
        WEIGHT_ROWS=_sample_sums.WEIGHT_ROWS, WEIGHT_COLUMNS=_sample_sums.WEIGHT_COLUMNS,
        MOD_ROWS=_sample_sums.MOD_ROWS, MOD_COLUMNS=_sample_sums.MOD_COLUMNS, num_warps=_sample_sums.NUM_WARPS,
    )  # fmt: skip
