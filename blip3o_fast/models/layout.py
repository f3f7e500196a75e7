"""Where the weights lie: those that one GEMM reads are neighbours in one buffer.

`ops.merged_linear` runs one GEMM where its weights are adjacent in memory and one GEMM per weight where they are not,
so this layout is a matter of speed, never of meaning. Only `param.data` is replaced: every parameter stays the same
object, so optimizers, EMA, hooks and names know nothing of it.
"""

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn

from blip3o_fast.ops.merged_linear import adjacent


def lay_side_by_side(linears: Sequence[nn.Module], keep: Set[int] = frozenset()) -> bool:
    """Move the weights of these Linear layers into one buffer, in this order. Returns whether they now lie so.

    Left as they are: layers that are not plain `nn.Linear` (a LoRA), weights that are no plain parameters (shards,
    quantised), that differ in dtype, device or in_features, that another process shares, or whose id is in `keep`.
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    weights: list[nn.Parameter] = [linear.weight for linear in linears]  # type: ignore[misc]
    first = weights[0]
    for weight in weights:
        if type(weight) is not nn.Parameter or weight.layout != torch.strided:
            return False
        if (weight.dtype, weight.device, weight.shape[1]) != (first.dtype, first.device, first.shape[1]):
            return False
    if adjacent(weights):
        return True
    if len({id(weight) for weight in weights}) < len(weights) or any(id(weight) in keep for weight in weights):
        return False  # tied: they cannot lie in two places
    if any(weight.device.type == "cpu" and weight.is_shared() for weight in weights):
        return False
    with torch.no_grad():
        buffer = torch.cat([weight.data for weight in weights])
        row = 0
        for weight in weights:
            weight.data = buffer[row : row + weight.shape[0]]
            row += weight.shape[0]
    return True


def projection_groups(block: Any) -> tuple[tuple[Any, ...], ...]:
    """The layers of a block that read the same input: (q1, k1, q2, v1), (k2, v2), (w1, w3)."""
    attn1, attn2, feed_forward = block.attn1, block.attn2, block.feed_forward
    return (
        (attn1.to_q, attn1.to_k, attn2.to_q, attn1.to_v),
        (attn2.to_k, attn2.to_v),
        (feed_forward.linear_1, feed_forward.linear_3),
    )


def lay_out(block: Any, keep: Set[int] = frozenset()) -> None:
    """Lay every projection group of the block side by side, without what is in `keep`."""
    for group in projection_groups(block):
        lay_side_by_side(group, keep)


def tied(model: nn.Module) -> set[int]:
    """The ids of the parameters that several modules use, and of those whose memory another parameter uses too.

    To move one of the first would leave a hole in another group's buffer; to move one of the second would untie it.
    """
    parameters = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    uses = Counter(id(p) for p in parameters)
    found = {key for key, count in uses.items() if count > 1}
    plain = {id(p): p for p in parameters if type(p) is nn.Parameter and p.device.type != "meta" and p.numel()}
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, key) for key, p in plain.items() if p.is_contiguous())
    end, last = 0, 0
    for start, stop, key in spans:
        if start < end:
            found |= {key, last}
        if stop > end:
            end, last = stop, key
    return found
