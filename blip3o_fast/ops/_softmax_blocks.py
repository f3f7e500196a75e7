"""The attention of the reference backend: probabilities of one block at a time, forward and backward.

A block is some samples, some heads and some query rows. Only its probabilities exist at any time, so memory stays
bounded at every length. Inside a block everything is [n*h, rows, d], "heads first": n samples times h query heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Probabilities held at once. On a CPU a block should stay in the cache; elsewhere few launches matter more.
_CPU_BLOCK = 1 << 20
_DEVICE_BLOCK = 1 << 27


class Heads(NamedTuple):
    """The samples and heads of some blocks; query head j reads key head j // group, as diffusers repeats them."""

    samples: slice
    keys: slice
    queries: slice
    group: int

    def of_queries(self, x: Tensor, rows: slice, acc: torch.dtype) -> Tensor:
        """[B, T, H, d] -> [n*h, rows, d]; a view where there is one sample and nothing to convert."""
        return x[self.samples, rows, self.queries].to(acc).transpose(1, 2).flatten(0, 1)

    def of_keys(self, x: Tensor, acc: torch.dtype) -> Tensor:
        """[B, L, K, d] -> [n*h, L, d], each key head repeated for its group of query heads."""
        x = x[self.samples, :, self.keys].to(acc).transpose(1, 2)
        return (x if self.group == 1 else x.repeat_interleave(self.group, dim=1)).flatten(0, 1)

    def of_mask(self, mask: Tensor) -> Tensor:
        """bool [B, L] -> [n*h, 1, L]."""
        mask, count = mask[self.samples], self.queries.stop - self.queries.start
        return mask[:, None].expand(-1, count, -1).flatten(0, 1)[:, None]

    def of_gate(self, g: Tensor, batch: int) -> Tensor:
        """[H] -> [n*h, 1, 1] for the samples of a batch of this size."""
        count = min(self.samples.stop, batch) - self.samples.start
        return g[self.queries].repeat(count)[:, None, None]

    def of_statistics(self, lse: Tensor, rows: slice) -> Tensor:
        """[B, H, T] -> [n*h, rows, 1]."""
        return lse[self.samples, self.queries, rows].flatten(0, 1)[..., None]

    def store_queries(self, target: Tensor, rows: slice, value: Tensor) -> None:
        place = target[self.samples, rows, self.queries]
        place.copy_(value.unflatten(0, (place.shape[0], place.shape[2])).transpose(1, 2))

    def store_keys(self, target: Tensor, value: Tensor) -> None:
        """The gradient of a repeated key head is the sum over its group."""
        place = target[self.samples, :, self.keys]
        if self.group > 1:
            value = value.unflatten(0, (-1, self.group)).sum(1)
        place.copy_(value.unflatten(0, (place.shape[0], place.shape[2])).transpose(1, 2))

    def store_statistics(self, target: Tensor, rows: slice, value: Tensor) -> None:
        place = target[self.samples, self.queries, rows]
        place.copy_(value.view(place.shape))


def _reads_in_place(tensor: Tensor) -> bool:
    """Whether blocks have one sample: then batched products read q, k and v where they lie, without copies."""
    return tensor.device.type == "cpu"


def partition(query: Tensor, key_heads: int, context: int) -> tuple[list[Heads], list[slice]]:
    """Blocks of q [B, T, H, d] against K key heads of `context` tokens: as many heads as fit, then rows of queries."""
    batch, tokens, heads, _ = query.shape
    group, single = heads // key_heads, _reads_in_place(query)
    budget = _CPU_BLOCK if single else _DEVICE_BLOCK
    rows = max(1, min(tokens, budget // (group * context)))
    keys = max(1, min(key_heads, budget // (group * context * rows)))
    samples = 1 if single else max(1, budget // (group * context * rows * keys))
    by_heads = []
    for b in range(0, batch, samples):
        for k in range(0, key_heads, keys):
            last = min(k + keys, key_heads)
            by_heads.append(Heads(slice(b, b + samples), slice(k, last), slice(k * group, last * group), group))
    return by_heads, [slice(t, min(t + rows, tokens)) for t in range(0, tokens, rows)]


def seen(mask: Tensor | None) -> Tensor | None:
    """None where every token may be seen: without a mask the products are the same and one pass over them less."""
    if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
        return None
    return mask


def values(v: Tensor, mask: Tensor | None) -> Tensor:
    """v [n*h, L, d], zero where its sample sees no token at all: such a sample attends to nothing."""
    return v if mask is None else v.masked_fill(~mask.any(-1, keepdim=True), 0)


def probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, with_statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T scale) [n*h, rows, L], and the logarithm of each row's sum of exponentials (+inf: nothing seen).

    A row of a sample that sees nothing is uniform here; `values` makes its contribution zero.
    """
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        # the lowest number and not -inf, with which a row that sees nothing would be NaN
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, -1)
    if not with_statistics:
        return p, None
    # the row's largest probability is exp(largest score - lse)
    lse = scores.amax(-1) - p.amax(-1).log()
    return p, lse if mask is None else lse.masked_fill(~mask.any(-1), torch.inf)


def probabilities_again(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, lse: Tensor) -> Tensor:
    """The same probabilities from the saved row statistic, zero in rows that see nothing."""
    scores = torch.baddbmm(lse.neg(), q, k.transpose(1, 2), alpha=scale)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores.exp_()


class Gradient:
    """The gradients of one attention, block of rows by block of rows."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> None:
        self.keys, self.values, self.mask, self.scale = keys, values, mask, scale
        self.dkeys, self.dvalues = torch.zeros_like(keys), torch.zeros_like(values)

    def add(self, q: Tensor, dout: Tensor, lse: Tensor) -> Tensor:
        """Take these rows into dkeys and dvalues; returns dq, [n*h, rows, d]."""
        p = probabilities_again(q, self.keys, self.mask, self.scale, lse)
        self.dvalues.baddbmm_(p.transpose(1, 2), dout)
        dp = torch.bmm(dout, self.values.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp)) in one pass
        self.dkeys.baddbmm_(ds.transpose(1, 2), q, alpha=self.scale)
        return torch.bmm(ds, self.keys).mul_(self.scale)
