"""`debug_ops`: run every fused op beside its reference and stop at the first that disagrees."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops._switch import State, Switch

# Two correct implementations differ by rounding: the last bit of each element, and in sums over rows the root of
# their number of bits. A wrong kernel differs by far more.
_ALLOWED = 256


class debug_ops(Switch):
    """Check each call of an op against its reference: `debug_ops()` from here on, `with debug_ops():` inside.

    Slow: every op of another backend runs a second time through PyTorch. Raises FloatingPointError naming the op, the
    output and the difference where a result is further from the reference than rounding explains, or not finite
    where the reference is. Calls that run on the reference anyway are not checked.
    """

    state = State(False)

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(enabled)


def checked(op: str, implementation: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
    """Compare a raw op's result with what its implementation gives on the reference backend (its last argument).

    An op without that argument (`merged_linear`) has one implementation: nothing to compare with.
    """
    if not debug_ops.state.active or not isinstance(args[-1], str) or args[-1] == "reference":
        return
    expected = implementation(*args[:-1], "reference")
    ours, theirs = (_tensors(value) for value in (result, expected))
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        limit = _ALLOWED * eps * (b.abs().max().item() if b.numel() else 0.0)
        difference = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        if not difference <= limit:
            raise FloatingPointError(
                f"{op} on backend {args[-1]!r}: output {index} of shape {tuple(a.shape)} differs from the reference by "
                f"{difference:.3e} (allowed {limit:.3e})"
            )


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, Tensor)]
