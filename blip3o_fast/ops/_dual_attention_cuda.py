"""The calls of the CUDA kernels of `dual_attention`, csrc/cuda."""

import torch
from torch import Tensor

from blip3o_fast.ops import _cuda

# The most numbers of a head that a block of the kernels holds, and the queries of which it leaves one sum for the gate.
_HEAD_DIM, _QUERIES = 128, 16


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the kernels can run on these tensors, else the reason; x: [..., d]."""
    if x.shape[-1] > _HEAD_DIM:
        return f"its cuda kernel takes heads of up to {_HEAD_DIM}, got {int(x.shape[-1])}"
    return _cuda.refusal(x, *others)


def forward(
    qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, mask: Tensor | None, scale: float, out: Tensor
) -> None:
    """Fill out [B, T, H*d], contiguous."""
    rows = (_cuda.with_unit_stride(t) for t in (qkq, v1, k2, v2))
    _cuda.call("dual_attention_fwd", *rows, gate.contiguous(), mask, out, scale)


def backward(
    dout: Tensor,
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scale: float,
    *gradients: Tensor,
) -> None:
    """Fill the gradients of qkq, v1, k2, v2 and gate, contiguous, each of its input's shape."""
    (batch, tokens), heads = qkq.shape[:2], gate.shape[0]
    gate_sums = qkq.new_empty((batch * -(-tokens // _QUERIES), heads), dtype=torch.float32)
    # for the kernels that take any length; where each attention is one tile nothing is written here
    statistics = qkq.new_empty((6, batch, heads, tokens), dtype=torch.float32)
    rows = (_cuda.with_unit_stride(t) for t in (dout, qkq, v1, k2, v2))
    _cuda.call("dual_attention_bwd", *rows, gate.contiguous(), mask, *gradients, gate_sums, statistics, scale)
