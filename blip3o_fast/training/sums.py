"""Means of the loss's metrics between two logs, kept on the device and free of bad micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class MetricSums:
    """`add` per micro-batch, `log` at a log. A micro-batch whose loss is not finite goes in as zeros, uncounted."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """loss and metrics: 0-d, of one micro-batch. Nothing waits for the device."""
        finite = torch.isfinite(loss.detach())
        for name, value in {**metrics, "finite": finite}.items():
            value = torch.where(finite, value.detach(), 0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.count += 1

    def log(self, logs: dict[str, float], mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add the means over the good micro-batches to the Trainer's logs, and begin anew; one transfer for all.

        The Trainer's own mean loss counts a bad micro-batch as a zero and is put right;
        where there was no good one, it goes. A gradient norm that is not finite goes too: JSON has no NaN.
        """
        names = [name for name in self._sums if name != "loss"]
        values = torch.stack([self._sums[name].float().reshape(()) for name in names]) / self.count
        means = dict(zip(names, mean_over_ranks(values).tolist(), strict=True))
        self.count, self._sums = 0, {}
        finite = means.pop("finite")
        if finite == 1.0:
            logs.update(means)
        elif finite > 0.0:
            logs["loss"] /= finite
            logs.update({name: value / finite for name, value in means.items()})
        else:
            del logs["loss"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]
