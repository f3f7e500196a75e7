"""The calls of the CUDA kernels of `qk_norm_rope`, csrc/cuda: three groups of heads at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_fast.ops import _cuda

# What one call of the kernels serves, and the most columns of a group that their blocks hold.
_GROUPS, _COLUMNS = 3, 8192
# Chunks of tokens whose sums for dweight and dbias are kept apart: about so many, of at most so many tokens.
_CHUNKS, _TOKENS = 256, 64


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the kernels can run on x [B, T, columns], weights, biases and rope, else the reason."""
    for t in others:
        if t is not None and t.ndim == 1 and t.shape[0] > _COLUMNS:
            return f"its cuda kernel normalises up to {_COLUMNS} columns at once, got {int(t.shape[0])}"
    return _cuda.refusal(x, *others)


def _three(values: Sequence[Tensor | None], first: int) -> list[Tensor | None]:
    """The parameters of three groups from the first on, None for those that are not there."""
    own = [None if t is None else t.contiguous() for t in values[first : first + _GROUPS]]
    return own + [None] * (_GROUPS - len(own))


def _three_heads(heads: list[int], first: int) -> list[int]:
    """Heads of these groups, 0 for those that are not there; the index of the first; the heads before it."""
    own = heads[first : first + _GROUPS]
    return [*own, *[0] * (_GROUPS - len(own)), first, sum(heads[:first])]


def forward(
    x: Tensor,
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    rope: Tensor | None,
    heads: list[int],
    head_dim: int,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fill y [B, T, sum(heads), d], mean and rstd [B, T, groups] (fp32), all contiguous."""
    x, rope = _cuda.with_unit_stride(x), None if rope is None else rope.contiguous()
    for first in range(0, len(heads), _GROUPS):
        parameters, groups = (*_three(weights, first), *_three(biases, first)), _three_heads(heads, first)
        _cuda.call("qk_norm_rope_fwd", x, *parameters, rope, y, mean, rstd, *groups, head_dim, eps)


def backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor | None],
    rope: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    heads: list[int],
    head_dim: int,
    dx: Tensor,
    daffine: Tensor,
) -> None:
    """Fill dx [B, T, sum(heads)*d] and, unless no group has a norm, daffine [2, sum(heads)*d], both contiguous."""
    # read where it lies if the heads of a token are neighbours in memory, whatever is between two tokens
    if dy.stride(-1) != 1 or (dy.shape[2] > 1 and dy.stride(2) != head_dim):
        dy = dy.contiguous()
    x, rope = _cuda.with_unit_stride(x), None if rope is None else rope.contiguous()
    partial, rows = None, x.shape[0] * x.shape[1]
    if daffine.numel() > 0:
        per_chunk = min(-(-rows // _CHUNKS), _TOKENS) or 1
        partial = x.new_empty((-(-rows // per_chunk), *daffine.shape), dtype=torch.float32)
    for first in range(0, len(heads), _GROUPS):
        parameters, groups = _three(weights, first), _three_heads(heads, first)
        _cuda.call("qk_norm_rope_bwd", dy, x, *parameters, rope, mean, rstd, dx, partial, *groups, head_dim)
    if partial is not None:
        _cuda.call("qk_norm_rope_bwd_finish", partial, daffine)
