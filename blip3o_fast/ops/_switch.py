"""A process-wide setting that is also a context manager, like `torch.set_grad_enabled`."""

from types import TracebackType
from typing import Any, ClassVar, Self


class State:
    """Holds a setting's value as an attribute of an instance, which torch.compile guards on: a graph traced under one
    value is not reused under another. On a class attribute PyTorch 2.11 puts no guard.
    """

    def __init__(self, value: Any) -> None:
        self.active = value


class Switch:
    """`switch(value)` from here on; `with switch(value):` inside the block. Each subclass is one setting."""

    state: ClassVar[State]

    def __init__(self, value: Any) -> None:
        self.previous = self.state.active
        self.state.active = value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state.active = self.previous
