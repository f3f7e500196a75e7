"""The kernels of `dual_attention` for any length, tile of scores by tile of scores (see `dual_attention.py`)."""

import triton
import triton.language as tl

from blip3o_fast.kernels._attention_loops import attend, key_gradients, query_gradients
from blip3o_fast.kernels._attention_tiles import head_offset, load_rows, store_rows, total
from blip3o_fast.kernels._tl import tanh


@triton.jit
def heads_of(
    x_ptr, v1_ptr, k2_ptr, v2_ptr, sample, head, key_head,
    stride_xb, stride_xh, stride_v1b, stride_v1h, stride_k2b, stride_k2h, stride_v2b, stride_v2h,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Pointers to q1, k1, v1, q2, k2 and v2 of one sample and head. x: the packed heads of q1, k1 and q2."""
    x_ptr += sample * stride_xb
    return (
        x_ptr + head_offset(head, stride_xh, D, PACKED),
        x_ptr + head_offset(H + key_head, stride_xh, D, PACKED),
        v1_ptr + sample * stride_v1b + head_offset(key_head, stride_v1h, D, PACKED),
        x_ptr + head_offset(H + K + head, stride_xh, D, PACKED),
        k2_ptr + sample * stride_k2b + head_offset(key_head, stride_k2h, D, PACKED),
        v2_ptr + sample * stride_v2b + head_offset(key_head, stride_v2h, D, PACKED),
    )


@triton.jit
def dual_attention_fwd(
    x_ptr, v1_ptr, k2_ptr, v2_ptr, gate_ptr, mask_ptr, out_ptr, tokens, context,
    stride_xb, stride_xt, stride_xh, stride_v1b, stride_v1t, stride_v1h, stride_k2b, stride_k2t, stride_k2h,
    stride_v2b, stride_v2t, stride_v2h, stride_mask,
    score1: tl.float32, score2: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE1: tl.constexpr, COMPUTE2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, QUERIES)
    sample, head = (program // tiles // H).to(tl.int64), program // tiles % H
    rows = program % tiles * QUERIES + tl.arange(0, QUERIES)
    real = rows < tokens
    key_head = head // (H // K)
    q1_ptr, k1_ptr, v1_ptr, q2_ptr, k2_ptr, v2_ptr = heads_of(
        x_ptr, v1_ptr, k2_ptr, v2_ptr, sample, head, key_head,
        stride_xb, stride_xh, stride_v1b, stride_v1h, stride_k2b, stride_k2h, stride_v2b, stride_v2h, H, K, D, PACKED,
    )  # fmt: skip
    mask_ptr = mask_ptr + sample * stride_mask if MASKED else mask_ptr
    q1 = load_rows(q1_ptr, rows, stride_xt, real, D, BLOCK_D, False, COMPUTE1)
    own = attend(
        q1, k1_ptr, v1_ptr, mask_ptr, tokens, stride_xt, stride_v1t, score1,
        D, BLOCK_D, QUERIES, KEYS, False, COMPUTE1, PRECISION,
    )  # fmt: skip
    if COMPUTE2 == tl.float32:
        tl.debug_barrier()  # keeps the operands of the second attention out of the registers of the first
    q2 = load_rows(q2_ptr, rows, stride_xt, real, D, BLOCK_D, False, COMPUTE2)
    cross = attend(
        q2, k2_ptr, v2_ptr, mask_ptr, context, stride_k2t, stride_v2t, score2,
        D, BLOCK_D, QUERIES, KEYS, MASKED, COMPUTE2, PRECISION,
    )  # fmt: skip
    g = tanh(tl.load(gate_ptr + head).to(tl.float32))
    out_ptr += sample * tokens * (H * D) + head * D
    store_rows(out_ptr, own + g * cross, rows, H * D, real, D, BLOCK_D, False)


@triton.jit(do_not_specialize=["stride_statistic"])
def dual_attention_bwd_queries(
    dout_ptr, x_ptr, v1_ptr, k2_ptr, v2_ptr, gate_ptr, mask_ptr, dx_ptr, statistics_ptr, gate_sums_ptr,
    tokens, context, stride_statistic, stride_ob, stride_ot,
    stride_xb, stride_xt, stride_xh, stride_v1b, stride_v1t, stride_v1h, stride_k2b, stride_k2t, stride_k2h,
    stride_v2b, stride_v2t, stride_v2h, stride_mask,
    score1: tl.float32, score2: tl.float32, scale1: tl.float32, scale2: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE1: tl.constexpr, COMPUTE2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, QUERIES)
    sample, head = (program // tiles // H).to(tl.int64), program // tiles % H
    rows = program % tiles * QUERIES + tl.arange(0, QUERIES)
    real = rows < tokens
    key_head = head // (H // K)
    q1_ptr, k1_ptr, v1_ptr, q2_ptr, k2_ptr, v2_ptr = heads_of(
        x_ptr, v1_ptr, k2_ptr, v2_ptr, sample, head, key_head,
        stride_xb, stride_xh, stride_v1b, stride_v1h, stride_k2b, stride_k2h, stride_v2b, stride_v2h, H, K, D, PACKED,
    )  # fmt: skip
    mask_ptr = mask_ptr + sample * stride_mask if MASKED else mask_ptr
    dout_ptr += sample * stride_ob + head * D
    dx_ptr += sample * tokens * ((H + K + H) * D)
    at = statistics_ptr + (sample * H + head) * tokens + rows
    q1 = load_rows(q1_ptr, rows, stride_xt, real, D, BLOCK_D, False, COMPUTE1)
    dout1 = load_rows(dout_ptr, rows, stride_ot, real, D, BLOCK_D, False, COMPUTE1)
    largest1, inverse1, delta1, dq1 = query_gradients(
        q1, dout1, k1_ptr, v1_ptr, mask_ptr, tokens, stride_xt, stride_v1t, score1,
        D, BLOCK_D, QUERIES, KEYS, False, COMPUTE1, PRECISION,
    )  # fmt: skip
    store_rows(dx_ptr + head * D, dq1 * scale1, rows, (H + K + H) * D, real, D, BLOCK_D, False)
    tl.store(at, largest1, mask=real)
    tl.store(at + stride_statistic, inverse1, mask=real)
    tl.store(at + 2 * stride_statistic, delta1, mask=real)
    if COMPUTE2 == tl.float32:
        tl.debug_barrier()  # keeps the operands of the second attention out of the registers of the first
    q2 = load_rows(q2_ptr, rows, stride_xt, real, D, BLOCK_D, False, COMPUTE2)
    dout2 = load_rows(dout_ptr, rows, stride_ot, real, D, BLOCK_D, False, COMPUTE2)
    largest2, inverse2, delta2, dq2 = query_gradients(
        q2, dout2, k2_ptr, v2_ptr, mask_ptr, context, stride_k2t, stride_v2t, score2,
        D, BLOCK_D, QUERIES, KEYS, MASKED, COMPUTE2, PRECISION,
    )  # fmt: skip
    g = tanh(tl.load(gate_ptr + head).to(tl.float32))
    store_rows(dx_ptr + (H + K + head) * D, dq2 * (scale2 * g), rows, (H + K + H) * D, real, D, BLOCK_D, False)
    tl.store(at + 3 * stride_statistic, largest2, mask=real)
    tl.store(at + 4 * stride_statistic, inverse2, mask=real)
    tl.store(at + 5 * stride_statistic, delta2, mask=real)
    # Rows that do not exist have dout = 0 and with it sums of 0. In fp32 the gate learns from sum(dout * P v), which is
    # the same and has the rounding of few outputs; sum(P * dP) has that of every dP, which are larger.
    # Its operands are loaded again: held in registers through all loops they would spill.
    sums = delta2
    if COMPUTE2 == tl.float32:
        tl.debug_barrier()
        q3 = load_rows(q2_ptr, rows, stride_xt, real, D, BLOCK_D, False, COMPUTE2)
        cross = attend(
            q3, k2_ptr, v2_ptr, mask_ptr, context, stride_k2t, stride_v2t, score2,
            D, BLOCK_D, QUERIES, KEYS, MASKED, COMPUTE2, PRECISION,
        )  # fmt: skip
        dout3 = load_rows(dout_ptr, rows, stride_ot, real, D, BLOCK_D, False, COMPUTE2)
        sums = tl.sum(dout3 * cross, axis=1)
    gate_sums_ptr += (sample * tiles + program % tiles) * H + head
    tl.store(gate_sums_ptr + tl.arange(0, 1), total(sums, QUERIES))


@triton.jit(do_not_specialize=["stride_statistic"])
def dual_attention_bwd_keys(
    dout_ptr, x_ptr, v1_ptr, k2_ptr, v2_ptr, gate_ptr, mask_ptr, dx_ptr, dv1_ptr, dk2_ptr, dv2_ptr, statistics_ptr,
    tokens, context, stride_statistic, stride_ob, stride_ot,
    stride_xb, stride_xt, stride_xh, stride_v1b, stride_v1t, stride_v1h, stride_k2b, stride_k2t, stride_k2h,
    stride_v2b, stride_v2t, stride_v2h, stride_mask,
    score1: tl.float32, score2: tl.float32, scale1: tl.float32, scale2: tl.float32,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, COMPUTE1: tl.constexpr, COMPUTE2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    own_tiles = tl.cdiv(tokens, KEYS)
    tiles = own_tiles + tl.cdiv(context, KEYS)
    sample, key_head = (program // tiles // K).to(tl.int64), program // tiles % K
    tile = program % tiles
    head = key_head * (H // K)
    q1_ptr, k1_ptr, v1_ptr, q2_ptr, k2_ptr, v2_ptr = heads_of(
        x_ptr, v1_ptr, k2_ptr, v2_ptr, sample, head, key_head,
        stride_xb, stride_xh, stride_v1b, stride_v1h, stride_k2b, stride_k2h, stride_v2b, stride_v2h, H, K, D, PACKED,
    )  # fmt: skip
    mask_ptr = mask_ptr + sample * stride_mask if MASKED else mask_ptr
    dout_ptr += sample * stride_ob + head * D
    statistics_ptr += (sample * H + head) * tokens
    stride_head = D if PACKED else stride_xh
    if tile < own_tiles:
        dk1_ptr = dx_ptr + sample * tokens * ((H + K + H) * D) + (H + key_head) * D
        key_gradients(
            dout_ptr, q1_ptr, k1_ptr, v1_ptr, mask_ptr, gate_ptr,
            dk1_ptr, dv1_ptr + sample * tokens * (K * D) + key_head * D, statistics_ptr,
            tokens, tokens, tile * KEYS, stride_ot, D, stride_xt, stride_head, stride_xt, stride_v1t,
            (H + K + H) * D, K * D, stride_statistic, score1, scale1,
            H // K, D, BLOCK_D, QUERIES, KEYS, False, False, COMPUTE1, PRECISION,
        )  # fmt: skip
    else:
        keys = sample * context * (K * D) + key_head * D
        key_gradients(
            dout_ptr, q2_ptr, k2_ptr, v2_ptr, mask_ptr, gate_ptr + head,
            dk2_ptr + keys, dv2_ptr + keys, statistics_ptr + 3 * stride_statistic,
            tokens, context, (tile - own_tiles) * KEYS, stride_ot, D, stride_xt, stride_head, stride_k2t, stride_v2t,
            K * D, K * D, stride_statistic, score2, scale2,
            H // K, D, BLOCK_D, QUERIES, KEYS, MASKED, True, COMPUTE2, PRECISION,
        )  # fmt: skip
