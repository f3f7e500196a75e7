"""The calls of the C++ kernels of `qk_norm_rope`, csrc/cpu: three groups of heads at a time."""

from collections.abc import Iterator

from torch import Tensor

from blip3o_fast.ops import _cpu

# What one call of the kernels serves: the queries and keys of a block.
_GROUPS = 3


def _calls(heads: list[int], *per_group: list[Tensor | None]) -> Iterator[tuple[list[Tensor | None], tuple[int, ...]]]:
    """For each call: its tensors, group by group, and the heads of its groups, its first group and its first head."""
    for first in range(0, len(heads), _GROUPS):
        groups = range(first, min(first + _GROUPS, len(heads)))
        absent = _GROUPS - len(groups)
        tensors = [tensors[i] for i in groups for tensors in per_group] + [None] * (absent * len(per_group))
        yield tensors, (*heads[first : first + _GROUPS], *[0] * absent, first, sum(heads[:first]))


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
    for affine, groups in _calls(heads, weights, biases):
        _cpu.call("qk_norm_rope_fwd", x, *affine, rope, y, mean, rstd, *groups, head_dim, eps)


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
    """Fill dx [B, T, columns] and daffine [2, columns] (or [2, 0] where no group has a norm), both contiguous."""
    given = daffine if daffine.shape[1] == x.shape[2] else None
    for scales, groups in _calls(heads, weights):
        _cpu.call("qk_norm_rope_bwd", dy, x, *scales, rope, mean, rstd, dx, given, *groups, head_dim)
