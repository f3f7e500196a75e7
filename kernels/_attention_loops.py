"""Attention of any length, tile of scores by tile of scores, without atomics.

    forward:   an online softmax over the tiles of keys
    backward:  `query_gradients` walks the keys twice for its queries: first for the row statistics (maximum, reciprocal
               sum, sum(P * dP)), then for dq. `key_gradients` walks the queries of all heads that read its keys, in
               their order, for dk and dv.

The statistics are kept between those two kernels as they are: exp2(score - maximum) * reciprocal has no rounding of a
logarithm in it, as exp2(score - lse) would.
"""

import triton
import triton.language as tl

from blip3o_fast.kernels._attention_tiles import gate_share, group_gate, load_rows, store_rows
from blip3o_fast.kernels._tl import tanh


@triton.jit
def seen_keys(mask_ptr, rows, keys, MASKED: tl.constexpr):
    """Which of these key rows exist and may be seen."""
    seen = rows < keys
    if MASKED:
        seen = seen & (tl.load(mask_ptr + rows, mask=seen, other=0) != 0)
    return seen


@triton.jit
def finite(largest):
    """The maximum of a row, 0 where it has seen nothing yet: -inf - -inf would be NaN."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def attend(
    q, k_ptr, v_ptr, mask_ptr, keys, stride_k, stride_v, score: tl.float32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P v of the queries q, fp32; zero where they see nothing."""
    largest, total = tl.full((QUERIES,), -float("inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for first in range(0, keys, KEYS):
        rows = first + tl.arange(0, KEYS)
        seen = seen_keys(mask_ptr, rows, keys, MASKED)
        k = load_rows(k_ptr, rows, stride_k, rows < keys, D, BLOCK_D, False, COMPUTE)
        v = load_rows(v_ptr, rows, stride_v, rows < keys, D, BLOCK_D, False, COMPUTE)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = finite(new_largest)
        p, shrink = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(COMPUTE), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    # a row that sees something has exp2(0) in its sum
    return acc * (1.0 / tl.maximum(total, 1.0))[:, None]


@triton.jit
def query_gradients(
    q, dout, k_ptr, v_ptr, mask_ptr, keys, stride_k, stride_v, score: tl.float32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """maximum, reciprocal sum and sum(P * dP) of each query's row of P, and dq without the scale, all fp32."""
    largest, total = tl.full((QUERIES,), -float("inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    delta = tl.zeros((QUERIES,), tl.float32)
    for first in range(0, keys, KEYS):
        rows = first + tl.arange(0, KEYS)
        seen = seen_keys(mask_ptr, rows, keys, MASKED)
        k = load_rows(k_ptr, rows, stride_k, rows < keys, D, BLOCK_D, False, COMPUTE)
        v = load_rows(v_ptr, rows, stride_v, rows < keys, D, BLOCK_D, False, COMPUTE)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = finite(new_largest)
        p, shrink = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        total = total * shrink + tl.sum(p, axis=1)
        delta = delta * shrink + tl.sum(p * dp, axis=1)
        largest = new_largest
    largest = finite(largest)
    inverse = 1.0 / tl.maximum(total, 1.0)
    delta = delta * inverse
    dq = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for first in range(0, keys, KEYS):
        rows = first + tl.arange(0, KEYS)
        seen = seen_keys(mask_ptr, rows, keys, MASKED)
        k = load_rows(k_ptr, rows, stride_k, rows < keys, D, BLOCK_D, False, COMPUTE)
        v = load_rows(v_ptr, rows, stride_v, rows < keys, D, BLOCK_D, False, COMPUTE)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * score, -float("inf"))
        p = tl.exp2(scores - largest[:, None]) * inverse[:, None]
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dq = tl.dot((p * (dp - delta[:, None])).to(COMPUTE), k, dq, input_precision=PRECISION)
    return largest, inverse, delta, dq


@triton.jit
def key_gradients(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, gate_ptr, dk_ptr, dv_ptr, statistics_ptr,
    queries, keys, first_key, stride_dout, stride_dout_head, stride_q, stride_q_head, stride_k, stride_v,
    stride_dk, stride_dv, stride_statistic, score: tl.float32, scale: tl.float32,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, GATED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of one key head, stored. Scores stand transposed: a row for each key.

    The pointers are those of the sample and of the (first) head. statistics: three arrays stride_statistic apart, each
    [GROUP, queries] from here on.
    """
    rows = first_key + tl.arange(0, KEYS)
    seen = seen_keys(mask_ptr, rows, keys, MASKED)
    k = load_rows(k_ptr, rows, stride_k, rows < keys, D, BLOCK_D, False, COMPUTE)
    v = load_rows(v_ptr, rows, stride_v, rows < keys, D, BLOCK_D, False, COMPUTE)
    dk, dv = tl.zeros((KEYS, BLOCK_D), tl.float32), tl.zeros((KEYS, BLOCK_D), tl.float32)
    # as in `tile_gradients`
    factor = group_gate(gate_ptr, GROUP) if GATED else 1.0
    for member in range(GROUP):
        g = tanh(tl.load(gate_ptr + member).to(tl.float32)) if GATED else 1.0
        for first in range(0, queries, QUERIES):
            tokens = first + tl.arange(0, QUERIES)
            real = tokens < queries
            at = statistics_ptr + member * queries + tokens
            largest = tl.load(at, mask=real, other=0.0)
            inverse = tl.load(at + stride_statistic, mask=real, other=0.0)
            delta = tl.load(at + 2 * stride_statistic, mask=real, other=0.0)
            q = load_rows(q_ptr + member * stride_q_head, tokens, stride_q, real, D, BLOCK_D, False, COMPUTE)
            dout = load_rows(
                dout_ptr + member * stride_dout_head, tokens, stride_dout, real, D, BLOCK_D, False, COMPUTE
            )
            if GATED and GROUP > 1:
                inverse = inverse * gate_share(g, factor)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score
            p = tl.exp2(tl.where(seen[:, None], scores, -float("inf")) - largest[None, :]) * inverse[None, :]
            dv = tl.dot(p.to(COMPUTE), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = (p * (dp - delta[None, :])).to(COMPUTE)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    store_rows(dk_ptr, dk * (scale * factor), rows, stride_dk, rows < keys, D, BLOCK_D, False)
    store_rows(dv_ptr, dv * factor, rows, stride_dv, rows < keys, D, BLOCK_D, False)
