"""Triton kernels of `flash_attention`.

    64 queries, 64 keys, a head size that is a power of two: one tile of scores.
        forward   `flash_attention_tile_fwd`      one program per (sample, query head)
        backward  `flash_attention_tile_bwd`      one program per (sample, key head), which adds up its query heads
    everything else: tile by tile.
        forward   `flash_attention_fwd`           one program per (sample, query head, tile of queries)
        backward  `flash_attention_bwd_queries`   the same programs: dq and the row statistics
                  `flash_attention_bwd_keys`      one program per (sample, key head, tile of keys): dk and dv

Every input is read where it lies, every gradient written once, nothing depends on the order of programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels._attention_loops import attend, key_gradients, query_gradients
from blip3o_fast.kernels._attention_tiles import (
    LOG2E,
    TILE,
    TRITON_DTYPES,
    attention_config,
    block_of,
    compute_dtype,
    head_offset,
    is_tile,
    load_rows,
    mask_bytes,
    packed,
    precision,
    store_rows,
    tile_attend,
    tile_gradients,
)
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride


@triton.jit
def flash_attention_tile_fwd(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_mask,
    score: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, head = (program // H).to(tl.int64), program % H
    key_head = head // (H // K)
    q_ptr += sample * stride_qb + head_offset(head, stride_qh, D, PACKED)
    k_ptr += sample * stride_kb + head_offset(key_head, stride_kh, D, PACKED)
    v_ptr += sample * stride_vb + head_offset(key_head, stride_vh, D, PACKED)
    mask_ptr = mask_ptr + sample * stride_mask if MASKED else mask_ptr
    out_ptr += sample * (TILE * H * D) + head * D
    for first in range(0, TILE, ROWS):
        rows = first + tl.arange(0, ROWS)
        out = tile_attend(
            q_ptr, k_ptr, v_ptr, mask_ptr, rows, stride_qt, stride_kt, stride_vt, score,
            D, TILE, MASKED, COMPUTE,
        )  # fmt: skip
        store_rows(out_ptr, out, rows, H * D, rows, D, D, True)


@triton.jit
def flash_attention_tile_bwd(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_ob, stride_ot, stride_oh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_mask, score: tl.float32, scale: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, key_head = (program // K).to(tl.int64), program % K
    head = key_head * (H // K)
    tile_gradients(
        dout_ptr + sample * stride_ob + head_offset(head, stride_oh, D, PACKED),
        q_ptr + sample * stride_qb + head_offset(head, stride_qh, D, PACKED),
        k_ptr + sample * stride_kb + head_offset(key_head, stride_kh, D, PACKED),
        v_ptr + sample * stride_vb + head_offset(key_head, stride_vh, D, PACKED),
        mask_ptr + sample * stride_mask if MASKED else mask_ptr, None,
        dq_ptr + sample * (TILE * H * D) + head * D,
        dk_ptr + sample * (TILE * K * D) + key_head * D,
        dv_ptr + sample * (TILE * K * D) + key_head * D, None,
        stride_ot, D if PACKED else stride_oh, stride_qt, D if PACKED else stride_qh, stride_kt, stride_vt,
        H * D, K * D, K * D, score, scale,
        H // K, D, TILE, ROWS, MASKED, False, COMPUTE,
    )  # fmt: skip


@triton.jit
def flash_attention_fwd(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, queries, keys,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_mask,
    score: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, QUERIES)
    sample, head = (program // tiles // H).to(tl.int64), program // tiles % H
    rows = program % tiles * QUERIES + tl.arange(0, QUERIES)
    key_head = head // (H // K)
    q_ptr += sample * stride_qb + head_offset(head, stride_qh, D, PACKED)
    q = load_rows(q_ptr, rows, stride_qt, rows < queries, D, BLOCK_D, False, COMPUTE)
    out = attend(
        q, k_ptr + sample * stride_kb + head_offset(key_head, stride_kh, D, PACKED),
        v_ptr + sample * stride_vb + head_offset(key_head, stride_vh, D, PACKED),
        mask_ptr + sample * stride_mask if MASKED else mask_ptr, keys, stride_kt, stride_vt, score,
        D, BLOCK_D, QUERIES, KEYS, MASKED, COMPUTE, PRECISION,
    )  # fmt: skip
    out_ptr += sample * queries * (H * D) + head * D
    store_rows(out_ptr, out, rows, H * D, rows < queries, D, BLOCK_D, False)


@triton.jit(do_not_specialize=["stride_statistic"])
def flash_attention_bwd_queries(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, dq_ptr, statistics_ptr, queries, keys, stride_statistic,
    stride_ob, stride_ot, stride_oh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_mask, score: tl.float32, scale: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, QUERIES)
    sample, head = (program // tiles // H).to(tl.int64), program // tiles % H
    rows = program % tiles * QUERIES + tl.arange(0, QUERIES)
    real = rows < queries
    key_head = head // (H // K)
    q_ptr += sample * stride_qb + head_offset(head, stride_qh, D, PACKED)
    dout_ptr += sample * stride_ob + head_offset(head, stride_oh, D, PACKED)
    q = load_rows(q_ptr, rows, stride_qt, real, D, BLOCK_D, False, COMPUTE)
    dout = load_rows(dout_ptr, rows, stride_ot, real, D, BLOCK_D, False, COMPUTE)
    largest, inverse, delta, dq = query_gradients(
        q, dout, k_ptr + sample * stride_kb + head_offset(key_head, stride_kh, D, PACKED),
        v_ptr + sample * stride_vb + head_offset(key_head, stride_vh, D, PACKED),
        mask_ptr + sample * stride_mask if MASKED else mask_ptr, keys, stride_kt, stride_vt, score,
        D, BLOCK_D, QUERIES, KEYS, MASKED, COMPUTE, PRECISION,
    )  # fmt: skip
    statistics_ptr += (sample * H + head) * queries + rows
    tl.store(statistics_ptr, largest, mask=real)
    tl.store(statistics_ptr + stride_statistic, inverse, mask=real)
    tl.store(statistics_ptr + 2 * stride_statistic, delta, mask=real)
    dq_ptr += sample * queries * (H * D) + head * D
    store_rows(dq_ptr, dq * scale, rows, H * D, real, D, BLOCK_D, False)


@triton.jit(do_not_specialize=["stride_statistic"])
def flash_attention_bwd_keys(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, dk_ptr, dv_ptr, statistics_ptr, queries, keys, stride_statistic,
    stride_ob, stride_ot, stride_oh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_mask, score: tl.float32, scale: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(keys, KEYS)
    sample, key_head = (program // tiles // K).to(tl.int64), program // tiles % K
    head = key_head * (H // K)
    key_gradients(
        dout_ptr + sample * stride_ob + head_offset(head, stride_oh, D, PACKED),
        q_ptr + sample * stride_qb + head_offset(head, stride_qh, D, PACKED),
        k_ptr + sample * stride_kb + head_offset(key_head, stride_kh, D, PACKED),
        v_ptr + sample * stride_vb + head_offset(key_head, stride_vh, D, PACKED),
        mask_ptr + sample * stride_mask if MASKED else mask_ptr, None,
        dk_ptr + sample * keys * (K * D) + key_head * D,
        dv_ptr + sample * keys * (K * D) + key_head * D,
        statistics_ptr + (sample * H + head) * queries,
        queries, keys, program % tiles * KEYS, stride_ot, D if PACKED else stride_oh,
        stride_qt, D if PACKED else stride_qh, stride_kt, stride_vt, K * D, K * D, stride_statistic, score, scale,
        H // K, D, BLOCK_D, QUERIES, KEYS, MASKED, False, COMPUTE, PRECISION,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
    """Fill out [B, Tq, H, d], contiguous."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q, k, v, mask = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v), mask_bytes(mask)
    dtype = compute_dtype(q, k, v)
    constants, settings = _constants(q, k, mask, dtype, packed(q, k, v)), _settings(q, dtype)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if mask is None else mask.stride(0))
    if is_tile(queries, keys, head_dim, dtype):
        config = attention_config("tile.forward", **settings)
        launch(
            flash_attention_tile_fwd, (batch * heads,), q, k, v, mask, out, *strides, scale * LOG2E,
            TILE=TILE, ROWS=config.queries, num_warps=config.num_warps, **constants,
        )  # fmt: skip
        return
    config = attention_config("forward", **settings)
    launch(
        flash_attention_fwd, (batch * heads * triton.cdiv(queries, config.queries),),
        q, k, v, mask, out, queries, keys, *strides, scale * LOG2E,
        BLOCK_D=block_of(head_dim), PRECISION=precision(dtype), QUERIES=config.queries, KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Fill dq, dk and dv, contiguous, of the shapes of q, k and v."""
    batch, queries, heads, head_dim = q.shape
    keys, key_heads = k.shape[1:3]
    q, k, v, mask = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v), mask_bytes(mask)
    dout = with_unit_stride(dout)
    dtype = compute_dtype(q, k, v, dout)
    constants, settings = _constants(q, k, mask, dtype, packed(dout, q, k, v)), _settings(q, dtype)
    inputs = (dout, q, k, v, mask)
    # the softmax of one score is 1 whatever it is, so that its gradient is zero and not the rounding of zero
    slope = 0.0 if keys == 1 else scale
    strides = (*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    arguments: tuple[float, ...] = (*strides, 0 if mask is None else mask.stride(0), scale * LOG2E, slope)
    if is_tile(queries, keys, head_dim, dtype):
        config = attention_config("tile.backward", **settings)
        launch(
            flash_attention_tile_bwd, (batch * key_heads,), *inputs, dq, dk, dv, *arguments,
            TILE=TILE, ROWS=config.queries, num_warps=config.num_warps, **constants,
        )  # fmt: skip
        return
    constants |= {"BLOCK_D": block_of(head_dim), "PRECISION": precision(dtype)}
    statistics = torch.empty((3, batch, heads, queries), dtype=torch.float32, device=q.device)
    arguments = (queries, keys, statistics.stride(0), *arguments)
    config = attention_config("query_gradients", **settings)
    launch(
        flash_attention_bwd_queries, (batch * heads * triton.cdiv(queries, config.queries),),
        *inputs, dq, statistics, *arguments,
        QUERIES=config.queries, KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip
    config = attention_config("key_gradients", **settings)
    launch(
        flash_attention_bwd_keys, (batch * key_heads * triton.cdiv(keys, config.keys),),
        *inputs, dk, dv, statistics, *arguments,
        QUERIES=config.queries, KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip


def _constants(q: Tensor, k: Tensor, mask: Tensor | None, dtype: torch.dtype, heads_packed: bool) -> dict[str, Any]:
    """dtype: in which products are taken."""
    return {
        "H": q.shape[2], "K": k.shape[2], "D": q.shape[3], "PACKED": heads_packed, "MASKED": mask is not None,
        "COMPUTE": TRITON_DTYPES[dtype],
    }  # fmt: skip


def _settings(q: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    return {"head_dim": q.shape[3], "full_precision": dtype == torch.float32, "capability": capability_of(q)}
