"""A shuffle for sets that lie on a disk: blocks in random order, pictures in random order within a window of blocks.

An epoch's order is made in two steps, both from the seed and the epoch alone:

1. the ``n`` pictures, as they lie, are cut into blocks of ``block`` neighbours, and the blocks are permuted;
2. every ``window`` blocks of that order are joined, and their pictures are permuted among each other.

So all reads of a stretch of training fall into ``window`` stretches of the disk, each read once, yet neighbours on the
disk are seldom neighbours in the order (`quality` measures it). The order of one window costs one permutation of
``block * window`` numbers, so any position of any epoch is found without walking there: continuing a run is O(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK, WINDOW = 32, 256  # 5 + 3 MB of one file at the default sizes in bf16; 8192 pictures, 2.1 GB, are mixed


class BlockOrder:
    """Position in the endless stream -> picture, for ``n`` pictures: what `training.stream.SampleOrder` does for sets
    in memory, with the same stream of epochs and no short batch at the seams.

    n: pictures, at least 1. seed: of every order. block: neighbours that stay together on the way from the disk.
    window: blocks that are mixed with each other.
    """

    def __init__(self, n: int, seed: int, *, block: int = BLOCK, window: int = WINDOW) -> None:
        for name, value in (("n", n), ("block", block), ("window", window)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}; a whole number >= 1 is needed")
        self.n, self.seed, self.block, self.window = n, seed, block, window
        self.blocks = -(-n // block)
        # Two of each: who reads ahead asks for the next one in turn with the present one.
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}
        self._windows: dict[tuple[int, int], Tensor] = {}

    def pictures(self, start: int, count: int) -> Tensor:
        """int64 ``[count]``: the pictures at stream positions start .. start + count - 1."""
        parts = [torch.empty(0, dtype=torch.int64)]
        while count > 0:
            epoch, offset = divmod(start, self.n)
            window = self._window_at(epoch, offset)
            order = self._window(epoch, window)
            begin = offset - self._window_start(epoch, window)
            part = order[begin : begin + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _blocks(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's order of blocks, and int64 ``[blocks + 1]``: where each begins in the epoch."""
        if epoch not in self._epochs:
            order = torch.randperm(self.blocks, generator=_generator(self.seed, epoch, 0))
            sizes = torch.full((self.blocks,), self.block)
            sizes[order == self.blocks - 1] = self.n - self.block * (self.blocks - 1)
            _keep_two(self._epochs)[epoch] = order, torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        return self._epochs[epoch]

    def _window_at(self, epoch: int, offset: int) -> int:
        starts = self._blocks(epoch)[1]
        return (int(torch.searchsorted(starts, offset, right=True)) - 1) // self.window

    def _window_start(self, epoch: int, window: int) -> int:
        return int(self._blocks(epoch)[1][window * self.window])

    def _window(self, epoch: int, window: int) -> Tensor:
        """The pictures of one window, mixed."""
        if (epoch, window) not in self._windows:
            blocks = self._blocks(epoch)[0][window * self.window : (window + 1) * self.window]
            pictures = (blocks[:, None] * self.block + torch.arange(self.block)).flatten()
            pictures = pictures[pictures < self.n]  # the last block of the set may be short
            mix = torch.randperm(len(pictures), generator=_generator(self.seed, epoch, window + 1))
            _keep_two(self._windows)[epoch, window] = pictures[mix]
        return self._windows[epoch, window]


def _keep_two(cache: dict[Any, Any]) -> dict[Any, Any]:
    """The cache with room for one more."""
    while len(cache) > 1:
        del cache[next(iter(cache))]
    return cache


def _generator(seed: int, epoch: int, window: int) -> torch.Generator:
    # Three mixed words: sums would make one run's second epoch another run's first.
    mixed = seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + window * 0x8CB92BA72F3D8DD7 + 1
    return torch.Generator().manual_seed(mixed % 2**63)


@dataclass(frozen=True)
class Quality:
    """How near an order is to a full shuffle. A full shuffle has displacement 1/3, and the other two as written.

    displacement: mean |place in the order - place on the disk| / n.
    correlation: between the places on the disk of two pictures that follow each other in the order; 0.
    same_block: share of the pictures of a batch that have another one of their own disk block in the batch, and
    same_block_full: this share in a full shuffle (about ``batch * block / n``).
    """

    displacement: float
    correlation: float
    same_block: float
    same_block_full: float


def quality(order: Tensor, block: int, batch: int) -> Quality:
    """Measured on one epoch's order, int64 ``[n]``."""
    n = len(order)
    place = order.double()
    displacement = float((place - torch.arange(n)).abs().mean() / n)
    pair = torch.stack([place[:-1], place[1:]])
    full = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    shares = [_shared(some, block, batch) for some in (order, full)]
    return Quality(displacement, float(torch.corrcoef(pair)[0, 1]), *shares)


def _shared(order: Tensor, block: int, batch: int) -> float:
    batches = (order[: len(order) // batch * batch] // block).view(-1, batch)
    same = batches[:, :, None] == batches[:, None, :]
    return float((same.sum(-1) > 1).double().mean())
