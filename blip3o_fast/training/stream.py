"""The order of the training data: a stateless stream, so a run can be continued at any step in no time.

The run consumes one endless stream of samples: epoch after epoch, each in an order of its own, without a short
batch at the seams. Position k of the stream is picture ``permutation(seed, k // n)[k % n]``, and k is also the
*global sample index* from which sigma, noise and condition dropout are drawn. So which pictures a step sees and
what is drawn for them depend on the seed and the step alone, never on the number of ranks, on gradient
accumulation or on how often the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from blip3o_fast.training.loader import NamingLoader


class SampleOrder:
    """Position in the stream -> picture, for ``n`` pictures."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1 picture, got {n}")
        self.n = n
        self.seed = seed
        self._cached: tuple[int, Tensor] | None = None

    def permutation(self, epoch: int) -> Tensor:
        """int64 ``[n]``: the order of one epoch."""
        if self._cached is None or self._cached[0] != epoch:
            # Two mixed words: seed + epoch alone would make run 1's second epoch run 2's first.
            mixed = (self.seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 1) % 2**63
            generator = torch.Generator().manual_seed(mixed)
            self._cached = epoch, torch.randperm(self.n, generator=generator)
        return self._cached[1]

    def pictures(self, start: int, count: int) -> Tensor:
        """int64 ``[count]``: the pictures at stream positions start .. start + count - 1."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.n)
            part = self.permutation(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


class BatchStream(Dataset):
    """Item k is the whole micro-batch k of one rank, gathered in two index operations."""

    def __init__(
        self, conditions: Tensor, targets: Tensor, order: SampleOrder, batch_size: int, *, rank: int, world_size: int
    ) -> None:
        self.conditions, self.targets, self.order = conditions, targets, order
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __getitem__(self, micro_batch: int) -> dict[str, Any]:
        start = (micro_batch * self.world_size + self.rank) * self.batch_size
        pictures = self.order.pictures(start, self.batch_size)
        return {
            "encoder_hidden_states": self.conditions[pictures],
            "target": self.targets[pictures],
            "sample_index": start,  # of the first; the others follow
        }


class _FromHere(Sampler[int]):
    """0 .. total - 1, beginning at ``first()`` when the iteration begins."""

    def __init__(self, total: int, first: Callable[[], int]) -> None:
        self.total, self.first = total, first

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first(), self.total))


def stream_loader(
    stream: BatchStream, total_batches: int, first_batch: Callable[[], int], *, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Loader over the rest of the run; ``first_batch`` is asked when iteration begins.

    Its length is that of the whole run, also when a continued run iterates over the end only: the Trainer
    derives the number of steps from it.
    """
    return NamingLoader(
        stream,
        first_batch=first_batch,
        batch_size=None,
        sampler=_FromHere(total_batches, first_batch),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
