"""Small parts of BLIP3oTrainer: what keeps the Trainer's constructor content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
