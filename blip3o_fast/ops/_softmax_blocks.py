"""The attention of the reference backend: probabilities of one block at a time, forward and backward.

A block is some samples, some heads and some query rows. Only its probabilities exist at any time, so memory stays
bounded at every length. Inside a block everything is [n*h, rows, d], "heads first": n samples times h query heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Probabilities held at once. On a CPU a block should stay in the cache (1 MiB of L2; forward and backward of 4096
# tokens, fp32, one head: 2^16 280 ms, 2^18 239, 2^19 234, 2^20 234, 2^22 313, 2^24 349); elsewhere few launches matter.
_CPU_BLOCK = 1 << 19
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

    def store_queries(self, target: Tensor, rows: slice, value: Tensor) -> None:
        place = target[self.samples, rows, self.queries]
        place.copy_(value.unflatten(0, (place.shape[0], place.shape[2])).transpose(1, 2))

    def store_keys(self, target: Tensor, value: Tensor) -> None:
        """The gradient of a repeated key head is the sum over its group."""
        place = target[self.samples, :, self.keys]
        if self.group > 1:
            value = value.unflatten(0, (-1, self.group)).sum(1)
        place.copy_(value.unflatten(0, (place.shape[0], place.shape[2])).transpose(1, 2))


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


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale), [n*h, rows, L]. Uniform for a sample that sees nothing; `values` makes it count zero."""
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        # the lowest number and not -inf, with which a row that sees nothing would be NaN
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)


class Gradient:
    """The gradients of one attention, block of rows by block of rows."""

    def __init__(self, keys: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
        self.keys, self.values, self.mask, self.scale = keys, values(v, mask), mask, scale
        self._dkeys: Tensor | None = None
        self._dvalues: Tensor | None = None

    def add(self, q: Tensor, dout: Tensor) -> Tensor:
        """Take these rows into the gradients of keys and values; returns dq, [n*h, rows, d]."""
        p = probabilities(q, self.keys, self.mask, self.scale)
        dp = torch.bmm(dout, self.values.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp)) in one pass
        dkeys, dvalues = torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), dout)
        # added apart: a product that starts from the sum so far loses low bits at every step
        self._dkeys = dkeys if self._dkeys is None else self._dkeys.add_(dkeys)
        self._dvalues = dvalues if self._dvalues is None else self._dvalues.add_(dvalues)
        return torch.bmm(ds, self.keys).mul_(self.scale)

    def of_keys_and_values(self) -> tuple[Tensor, Tensor]:
        """dk and dv of all rows, [n*h, L, d]."""
        if self._dkeys is None or self._dvalues is None:
            return torch.zeros_like(self.keys), torch.zeros_like(self.values)
        return self._dkeys.mul_(self.scale), values(self._dvalues, self.mask)
