"""Small parts of BLIP3oTrainer: its throughput clock and what keeps the Trainer's constructor content."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Window:
    """Samples per second between two logs, without the time of evaluations and checkpoints."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.samples = 0
        self.excluded = 0.0

    def start(self, samples: int) -> None:
        self.begun, self.samples, self.excluded = time.perf_counter(), samples, 0.0

    def rate(self, samples: int) -> float:
        """Since `start` or the last call, which both begin a new window."""
        elapsed = time.perf_counter() - (self.begun or 0.0) - self.excluded
        rate = (samples - self.samples) / max(elapsed, 1e-9)
        self.start(samples)
        return round(rate, 3)

    @contextmanager
    def excluding(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.excluded += time.perf_counter() - begun


class Sized:
    """Stands for a data set where the Trainer only wants to know that there is one, and its length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        raise IndexError("the data comes from BLIP3oTrainer.get_train_dataloader and .validation")


@contextmanager
def without_config(model: nn.Module) -> Iterator[None]:
    """The Trainer's constructor writes ``use_cache`` into ``model.config``; ours is frozen and knows no such field."""
    hidden: dict[str, Any] = {name: vars(model).pop(name) for name in ("config", "_config") if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(hidden)
