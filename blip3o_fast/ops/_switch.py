"""A process-wide setting that is also a context manager, like `torch.set_grad_enabled`."""

from types import TracebackType
from typing import Any, ClassVar, Self


class Switch:
    """`switch(value)` from here on; `with switch(value):` inside the block. Each subclass is one setting.

    The value is a class attribute, which torch.compile guards on: a graph traced under one value is not reused under
    another.
    """

    active: ClassVar[Any]

    def __init__(self, value: Any) -> None:
        self.previous = type(self).active
        type(self).active = value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        type(self).active = self.previous
