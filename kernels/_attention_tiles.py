"""What the attention kernels share: how they are launched, and one attention of 64 queries to 64 keys as one tile.

    P = softmax(q k^T * scale),   exp2 of scores that carry scale * log2(e), multiplied in after the product, in fp32

A tile of scores is whole, so its softmax is one pass and nothing is kept for the backward, which makes P again. Lengths
other than 64 go tile by tile (`_attention_loops.py`).

Every product takes both operands in one dtype, COMPUTE: the widest of what an attention reads. fp32 is multiplied by
fused multiply-adds (`ieee`), or by tensor cores in TF32 where PyTorch may do so too; its operands lie in registers, so
that it always goes in small tiles.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _config
from blip3o_fast.kernels._config import next_power_of_2
from blip3o_fast.kernels._launch import with_unit_stride
from blip3o_fast.kernels._tl import tanh

TILE = 64
LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 128
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class AttentionConfig:
    """num_warps: of a program; queries, keys: tokens of a tile of scores; num_stages: of its loop over tiles."""

    num_warps: int
    queries: int
    keys: int
    num_stages: int = 1


def attention_config(kernel: str, *, head_dim: int, full_precision: bool, capability: int) -> AttentionConfig:
    """The launch of an attention kernel; never dependent on the batch, so one compiled kernel serves every batch size.

    kernel: "tile.forward" and "tile.backward" (64 queries to 64 keys, whose rows may be walked in blocks of `queries`),
    "forward", "query_gradients" and "key_gradients" (any length).
    full_precision: whether products take fp32 operands. Their tiles also keep below the 64 rows from which on Triton's
    compiler for sm_100 (3.7) gives some `ieee` products to its tensor cores, in TF32.
    """
    wide, wgmma = block_of(head_dim) > 64, capability // 10 in (9, 10)
    if full_precision:
        config = AttentionConfig(num_warps=8, queries=16, keys=32)
    elif kernel == "tile.forward":
        config = AttentionConfig(num_warps=4, queries=TILE, keys=TILE)
    elif kernel == "tile.backward":
        # whole tiles where accumulators have a memory of their own or warp groups; else they would fill the registers
        config = AttentionConfig(num_warps=8, queries=TILE if wgmma else 16, keys=TILE)
    elif kernel == "forward":
        stages = 1 if wide and not wgmma else 2
        config = AttentionConfig(num_warps=8 if wide else 4, queries=64, keys=64, num_stages=stages)
    elif wgmma:
        # heads above 64 leave too few registers (sm_90) or too little shared memory (sm_100) for more
        crowded, hopper = wide and kernel == "key_gradients", capability // 10 == 9
        queries, stages = (32 if crowded and hopper else 64), (1 if crowded and not hopper else 2)
        config = AttentionConfig(num_warps=8, queries=queries, keys=64, num_stages=stages)
    else:
        config = AttentionConfig(num_warps=8, queries=64, keys=32, num_stages=2)
    return replace(config, **_config.tuned(f"attention.{kernel}", head_dim, capability))


def block_of(head_dim: int) -> int:
    """Columns of a tile: tensor cores multiply no fewer than 16."""
    return max(16, next_power_of_2(head_dim))


def is_tile(tokens: int, context: int, head_dim: int, *dtypes: torch.dtype) -> bool:
    """Whether a whole attention is one tile of scores without anything to mask off; dtypes: of its products."""
    return tokens == TILE and context == TILE and head_dim == block_of(head_dim) and torch.float32 not in dtypes


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of what one attention multiplies."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def precision(*dtypes: torch.dtype) -> str:
    """How fp32 operands are multiplied; says nothing about the others."""
    # Not `allow_tf32`, which raises where the newer of PyTorch's two switches was used; this one answers for both.
    return "tf32" if torch.float32 in dtypes and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def packed(*tensors: Tensor) -> bool:
    """Whether the heads of each [B, T, heads, d] stand side by side: then their distance is known when compiling."""
    return all(t.stride(2) == t.shape[3] for t in tensors)


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask [B, tokens] as the bytes that kernels read."""
    return None if mask is None else with_unit_stride(mask.view(torch.uint8))


@triton.jit
def head_offset(head, stride, D: tl.constexpr, PACKED: tl.constexpr):
    return head * D if PACKED else head.to(tl.int64) * stride


@triton.jit
def load_rows(
    ptr, rows, stride, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr, COMPUTE: tl.constexpr
):
    """[rows, BLOCK_D] of one head in COMPUTE; zero where `seen` is false. ALL: nothing is masked off."""
    cols = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if ALL:
        return tl.load(at).to(COMPUTE)
    else:
        return tl.load(at, mask=seen[:, None] & (cols < D)[None, :], other=0.0).to(COMPUTE)


@triton.jit
def store_rows(ptr, value, rows, stride, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if ALL:
        tl.store(at, value.to(ptr.dtype.element_ty))
    else:
        tl.store(at, value.to(ptr.dtype.element_ty), mask=seen[:, None] & (cols < D)[None, :])


@triton.jit
def total(x, N: tl.constexpr):
    """The sum of x [N], as [1]: what sums to a scalar here breaks Triton's compiler for sm_100 (3.7)."""
    return tl.sum(tl.reshape(x, (1, N)), axis=1)


@triton.jit
def group_gate(gate_ptr, GROUP: tl.constexpr):
    """The largest |tanh(gate)| of a group of query heads; of a group of one its tanh(gate)."""
    if GROUP == 1:
        return tanh(tl.load(gate_ptr).to(tl.float32))
    else:
        members = tl.arange(0, triton.next_power_of_2(GROUP))
        gates = tl.load(gate_ptr + members, mask=members < GROUP, other=0.0).to(tl.float32)
        return tl.max(tl.abs(tanh(gates)), axis=0)


@triton.jit
def gate_share(g, largest):
    """g / largest, in [-1, 1]; 0 where all gates of the group are closed."""
    return tl.where(largest > 0, g / tl.where(largest > 0, largest, 1.0), 0.0)


@triton.jit
def tile_probabilities(q, k, visible, score: tl.float32, MASKED: tl.constexpr):
    """exp2(scores - row maximum) and the reciprocal of its row sums, both fp32; 0 and 1 where a row sees nothing."""
    scores = tl.dot(q, tl.trans(k)) * score
    if MASKED:
        scores = tl.where(visible[None, :], scores, -float("inf"))
    largest = tl.max(scores, axis=1)
    if MASKED:
        largest = tl.where(largest == -float("inf"), 0.0, largest)
    p = tl.exp2(scores - largest[:, None])
    # a row that sees something has exp2(0) in its sum
    return p, 1.0 / tl.maximum(tl.sum(p, axis=1), 1.0)


@triton.jit
def tile_attend(
    q_ptr, k_ptr, v_ptr, mask_ptr, rows, stride_q, stride_k, stride_v, score: tl.float32,
    D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """P v of some rows of one head, fp32. The pointers are those of the sample and the head."""
    tokens = tl.arange(0, TILE)
    visible = tl.load(mask_ptr + tokens) != 0 if MASKED else tokens >= 0
    q = load_rows(q_ptr, rows, stride_q, rows, D, D, True, COMPUTE)
    k = load_rows(k_ptr, tokens, stride_k, tokens, D, D, True, COMPUTE)
    p, inverse = tile_probabilities(q, k, visible, score, MASKED)
    v = load_rows(v_ptr, tokens, stride_v, tokens, D, D, True, COMPUTE)
    return tl.dot(p.to(COMPUTE), v) * inverse[:, None]


@triton.jit
def tile_gradients(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, gate_ptr, dq_ptr, dk_ptr, dv_ptr, gate_sums_ptr,
    stride_dout, stride_dout_head, stride_q, stride_q_head, stride_k, stride_v, stride_dq, stride_dk, stride_dv,
    score: tl.float32, scale: tl.float32,
    GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    GATED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All gradients of one key head and the GROUP query heads that read it, which are added up in their order.

    The pointers are those of the sample and of the (first) head. GATED: the attention's share of the output is
    tanh(gate) * P v; then sum(P * dP) = sum(dout * P v), from which the gate learns, goes to gate_sums, per query head.
    """
    tokens = tl.arange(0, TILE)
    visible = tl.load(mask_ptr + tokens) != 0 if MASKED else tokens >= 0
    k = load_rows(k_ptr, tokens, stride_k, tokens, D, D, True, COMPUTE)
    v = load_rows(v_ptr, tokens, stride_v, tokens, D, D, True, COMPUTE)
    dk, dv = tl.zeros((TILE, D), tl.float32), tl.zeros((TILE, D), tl.float32)
    # Gates are applied in fp32: a product of a small gate and P may have no half-precision digits left. What a group
    # adds up is weighted by gate / largest gate of the group, which leaves digits to all that matters in the sum.
    factor = group_gate(gate_ptr, GROUP) if GATED else 1.0
    for member in range(GROUP):
        g = tanh(tl.load(gate_ptr + member).to(tl.float32)) if GATED else 1.0
        gate_sums = tl.zeros((ROWS,), tl.float32)
        for first in range(0, TILE, ROWS):
            rows = first + tl.arange(0, ROWS)
            q = load_rows(q_ptr + member * stride_q_head, rows, stride_q, rows, D, D, True, COMPUTE)
            dout = load_rows(dout_ptr + member * stride_dout_head, rows, stride_dout, rows, D, D, True, COMPUTE)
            p, inverse = tile_probabilities(q, k, visible, score, MASKED)
            p = p * inverse[:, None]
            share = gate_share(g, factor) if GATED and GROUP > 1 else 1.0
            # in this order of the products the compiler for mma.sync spreads the narrow ones over all warps
            dv = tl.dot(tl.trans((p * share).to(COMPUTE)), dout, dv)
            dp = tl.dot(dout, tl.trans(v))
            delta = tl.sum(p * dp, axis=1)
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans((ds * share).to(COMPUTE)), q, dk)
            dq = tl.dot(ds.to(COMPUTE), k) * (scale * g)
            store_rows(dq_ptr + member * D, dq, rows, stride_dq, rows, D, D, True)
            gate_sums += delta
        if GATED:
            tl.store(gate_sums_ptr + member + tl.arange(0, 1), total(gate_sums, ROWS))
    store_rows(dk_ptr, dk * (scale * factor), tokens, stride_dk, tokens, D, D, True)
    store_rows(dv_ptr, dv * factor, tokens, stride_dv, tokens, D, D, True)
