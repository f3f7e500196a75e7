"""Triton kernels of `dual_attention`: both attentions in one launch, from the packed queries and keys as they lie.

    64 tokens, 64 context tokens, a head size that is a power of two: two tiles of scores.
        forward   `dual_attention_tile_fwd`      one program per (sample, query head)
        backward  `dual_attention_tile_bwd`      one program per (sample, key head), which adds up its query heads
    everything else: tile by tile (`_dual_attention_loops.py`).
        forward   `dual_attention_fwd`           one program per (sample, query head, tile of queries)
        backward  `dual_attention_bwd_queries`   the same programs: dq1, dq2 and the row statistics
                  `dual_attention_bwd_keys`      one program per (sample, key head, tile of keys or of context)

Each backward leaves sum(P2 * dP2) = sum(dout * P2 v2) per program and query head, and `dual_attention_bwd_gate` makes
dgate of them. Every gradient is written once, nothing depends on the order of programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels._attention_tiles import (
    LOG2E,
    TILE,
    TRITON_DTYPES,
    attention_config,
    block_of,
    compute_dtype,
    is_tile,
    mask_bytes,
    packed,
    precision,
    store_rows,
    tile_attend,
    tile_gradients,
)
from blip3o_fast.kernels._dual_attention_loops import (
    dual_attention_bwd_keys,
    dual_attention_bwd_queries,
    dual_attention_fwd,
    heads_of,
)
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride
from blip3o_fast.kernels._tl import tanh

# Tile of `dual_attention_bwd_gate`: few heads and many partial sums, so that many samples take few steps.
GATE_ROWS, GATE_HEADS = 256, 4


@triton.jit
def dual_attention_tile_fwd(
    x_ptr, v1_ptr, k2_ptr, v2_ptr, gate_ptr, mask_ptr, out_ptr,
    stride_xb, stride_xt, stride_xh, stride_v1b, stride_v1t, stride_v1h, stride_k2b, stride_k2t, stride_k2h,
    stride_v2b, stride_v2t, stride_v2h, stride_mask,
    score1: tl.float32, score2: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE1: tl.constexpr, COMPUTE2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, head = (program // H).to(tl.int64), program % H
    key_head = head // (H // K)
    q1_ptr, k1_ptr, v1_ptr, q2_ptr, k2_ptr, v2_ptr = heads_of(
        x_ptr, v1_ptr, k2_ptr, v2_ptr, sample, head, key_head,
        stride_xb, stride_xh, stride_v1b, stride_v1h, stride_k2b, stride_k2h, stride_v2b, stride_v2h, H, K, D, PACKED,
    )  # fmt: skip
    mask_ptr = mask_ptr + sample * stride_mask if MASKED else mask_ptr
    out_ptr += sample * (TILE * H * D) + head * D
    g = tanh(tl.load(gate_ptr + head).to(tl.float32))
    for first in range(0, TILE, ROWS):
        rows = first + tl.arange(0, ROWS)
        own = tile_attend(
            q1_ptr, k1_ptr, v1_ptr, mask_ptr, rows, stride_xt, stride_xt, stride_v1t, score1,
            D, TILE, False, COMPUTE1,
        )  # fmt: skip
        cross = tile_attend(
            q2_ptr, k2_ptr, v2_ptr, mask_ptr, rows, stride_xt, stride_k2t, stride_v2t, score2,
            D, TILE, MASKED, COMPUTE2,
        )  # fmt: skip
        store_rows(out_ptr, own + g * cross, rows, H * D, rows, D, D, True)


@triton.jit
def dual_attention_tile_bwd(
    dout_ptr, x_ptr, v1_ptr, k2_ptr, v2_ptr, gate_ptr, mask_ptr, dx_ptr, dv1_ptr, dk2_ptr, dv2_ptr, gate_sums_ptr,
    stride_ob, stride_ot,
    stride_xb, stride_xt, stride_xh, stride_v1b, stride_v1t, stride_v1h, stride_k2b, stride_k2t, stride_k2h,
    stride_v2b, stride_v2t, stride_v2h, stride_mask,
    score1: tl.float32, score2: tl.float32, scale1: tl.float32, scale2: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE1: tl.constexpr, COMPUTE2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample, key_head = (program // K).to(tl.int64), program % K
    head = key_head * (H // K)
    q1_ptr, k1_ptr, v1_ptr, q2_ptr, k2_ptr, v2_ptr = heads_of(
        x_ptr, v1_ptr, k2_ptr, v2_ptr, sample, head, key_head,
        stride_xb, stride_xh, stride_v1b, stride_v1h, stride_k2b, stride_k2h, stride_v2b, stride_v2h, H, K, D, PACKED,
    )  # fmt: skip
    mask_ptr = mask_ptr + sample * stride_mask if MASKED else mask_ptr
    dout_ptr += sample * stride_ob + head * D
    dx_ptr += sample * (TILE * (H + K + H) * D)
    keys = sample * (TILE * K * D) + key_head * D
    stride_head = D if PACKED else stride_xh
    tile_gradients(
        dout_ptr, q1_ptr, k1_ptr, v1_ptr, mask_ptr, gate_ptr,
        dx_ptr + head * D, dx_ptr + (H + key_head) * D, dv1_ptr + keys, gate_sums_ptr,
        stride_ot, D, stride_xt, stride_head, stride_xt, stride_v1t, (H + K + H) * D, (H + K + H) * D, K * D,
        score1, scale1, H // K, D, TILE, ROWS, False, False, COMPUTE1,
    )  # fmt: skip
    tile_gradients(
        dout_ptr, q2_ptr, k2_ptr, v2_ptr, mask_ptr, gate_ptr + head,
        dx_ptr + (H + K + head) * D, dk2_ptr + keys, dv2_ptr + keys, gate_sums_ptr + sample * H + head,
        stride_ot, D, stride_xt, stride_head, stride_k2t, stride_v2t, (H + K + H) * D, K * D, K * D,
        score2, scale2, H // K, D, TILE, ROWS, MASKED, True, COMPUTE2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["partial_rows"])
def dual_attention_bwd_gate(
    gate_sums_ptr, gate_ptr, dgate_ptr, partial_rows, H: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr
):
    """dgate = (1 - tanh(gate)^2) * sum over the rows of gate_sums [partial_rows, H], in their order."""
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    acc = tl.zeros((HEADS,), tl.float32)
    for first in range(0, partial_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        seen = (rows < partial_rows)[:, None] & (heads < H)[None, :]
        sums = tl.load(gate_sums_ptr + rows.to(tl.int64)[:, None] * H + heads[None, :], mask=seen, other=0.0)
        acc += tl.sum(sums, axis=0)
    gate = tl.load(gate_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    # 1 - tanh^2 without its cancellation, from rest = 1 - |tanh|
    e = tl.exp(-2.0 * tl.abs(gate))
    rest = 2.0 * e / (1.0 + e)
    tl.store(dgate_ptr + heads, (acc * (rest * (2.0 - rest))).to(dgate_ptr.dtype.element_ty), mask=heads < H)


def forward(
    qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, mask: Tensor | None, scale: float, out: Tensor
) -> None:
    """Fill out [B, T, H*d], contiguous."""
    x, v1, k2, v2 = with_unit_stride(qkq), with_unit_stride(v1), with_unit_stride(k2), with_unit_stride(v2)
    gate, mask = gate.contiguous(), mask_bytes(mask)
    batch, tokens, _, head_dim = x.shape
    heads, context = gate.shape[0], k2.shape[1]
    dtypes = (compute_dtype(x, v1), compute_dtype(x, k2, v2))
    constants, settings = _constants(x, v1, k2, v2, mask, heads, dtypes), _settings(x, dtypes)
    arguments = (*_strides(x, v1, k2, v2, mask), scale * LOG2E, head_dim**-0.5 * LOG2E)
    if is_tile(tokens, context, head_dim, *dtypes):
        config = attention_config("tile.forward", **settings)
        launch(
            dual_attention_tile_fwd, (batch * heads,), x, v1, k2, v2, gate, mask, out, *arguments,
            TILE=TILE, ROWS=config.queries, num_warps=config.num_warps, **constants,
        )  # fmt: skip
        return
    config = attention_config("forward", **settings)
    launch(
        dual_attention_fwd, (batch * heads * triton.cdiv(tokens, config.queries),),
        x, v1, k2, v2, gate, mask, out, tokens, context, *arguments,
        BLOCK_D=block_of(head_dim), PRECISION=precision(*dtypes), QUERIES=config.queries, KEYS=config.keys,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip


def backward(
    dout: Tensor, qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, mask: Tensor | None, scale: float,
    dqkq: Tensor, dv1: Tensor, dk2: Tensor, dv2: Tensor, dgate: Tensor,
) -> None:  # fmt: skip
    """Fill the gradients, contiguous, each of its input's shape."""
    x, v1, k2, v2 = with_unit_stride(qkq), with_unit_stride(v1), with_unit_stride(k2), with_unit_stride(v2)
    dout, gate, mask = with_unit_stride(dout), gate.contiguous(), mask_bytes(mask)
    batch, tokens, _, head_dim = x.shape
    heads, key_heads, context = gate.shape[0], v1.shape[2], k2.shape[1]
    dtypes = (compute_dtype(dout, x, v1), compute_dtype(dout, x, k2, v2))
    constants, settings = _constants(x, v1, k2, v2, mask, heads, dtypes), _settings(x, dtypes)
    inputs = (dout, x, v1, k2, v2, gate, mask)
    # the softmax of one score is 1 whatever it is, so that its gradient is zero and not the rounding of zero
    slopes = (0.0 if tokens == 1 else scale, 0.0 if context == 1 else head_dim**-0.5)
    strides = (*dout.stride()[:2], *_strides(x, v1, k2, v2, mask))
    arguments = (*strides, scale * LOG2E, head_dim**-0.5 * LOG2E, *slopes)
    if is_tile(tokens, context, head_dim, *dtypes):
        gate_sums = torch.empty((batch, heads), dtype=torch.float32, device=x.device)
        config = attention_config("tile.backward", **settings)
        launch(
            dual_attention_tile_bwd, (batch * key_heads,), *inputs, dqkq, dv1, dk2, dv2, gate_sums, *arguments,
            TILE=TILE, ROWS=config.queries, num_warps=config.num_warps, **constants,
        )  # fmt: skip
    else:
        constants |= {"BLOCK_D": block_of(head_dim), "PRECISION": precision(*dtypes)}
        config = attention_config("query_gradients", **settings)
        tiles = triton.cdiv(tokens, config.queries)
        gate_sums = torch.empty((batch * tiles, heads), dtype=torch.float32, device=x.device)
        statistics = torch.empty((6, batch, heads, tokens), dtype=torch.float32, device=x.device)
        arguments = (tokens, context, statistics.stride(0), *arguments)
        launch(
            dual_attention_bwd_queries, (batch * heads * tiles,), *inputs, dqkq, statistics, gate_sums, *arguments,
            QUERIES=config.queries, KEYS=config.keys,
            num_warps=config.num_warps, num_stages=config.num_stages, **constants,
        )  # fmt: skip
        config = attention_config("key_gradients", **settings)
        tiles = triton.cdiv(tokens, config.keys) + triton.cdiv(context, config.keys)
        launch(
            dual_attention_bwd_keys, (batch * key_heads * tiles,),
            *inputs, dqkq, dv1, dk2, dv2, statistics, *arguments,
            QUERIES=config.queries, KEYS=config.keys,
            num_warps=config.num_warps, num_stages=config.num_stages, **constants,
        )  # fmt: skip
    finish_gate(gate_sums, gate, dgate)


def finish_gate(gate_sums: Tensor, gate: Tensor, dgate: Tensor) -> None:
    """Fill dgate [H] from the partial sums [rows, H], fp32."""
    rows, heads = gate_sums.shape
    launch(
        dual_attention_bwd_gate, (triton.cdiv(heads, GATE_HEADS),), gate_sums, gate, dgate, rows,
        H=heads, ROWS=GATE_ROWS, HEADS=GATE_HEADS, num_warps=4,
    )  # fmt: skip


def _strides(x: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    strides = [stride for tensor in (x, v1, k2, v2) for stride in tensor.stride()[:3]]
    return (*strides, 0 if mask is None else mask.stride(0))


def _constants(
    x: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, mask: Tensor | None, heads: int, dtypes: tuple[torch.dtype, ...]
) -> dict[str, Any]:
    """dtypes: in which the self-attention and the cross-attention are multiplied."""
    return {
        "H": heads, "K": v1.shape[2], "D": x.shape[3], "PACKED": packed(x, v1, k2, v2), "MASKED": mask is not None,
        "COMPUTE1": TRITON_DTYPES[dtypes[0]], "COMPUTE2": TRITON_DTYPES[dtypes[1]],
    }  # fmt: skip


def _settings(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    return {"head_dim": x.shape[3], "full_precision": torch.float32 in dtypes, "capability": capability_of(x)}
