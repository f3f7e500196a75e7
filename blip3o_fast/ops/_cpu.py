"""The door to the C++ kernels: which instruction set runs, and how a tensor is handed over.

The extension holds every kernel once per instruction set. The best that the machine runs is what runs;
`use_isa` forces another, so that one machine can test all that it has.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.ops._switch import State, Switch

CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.uint8: 4,
    torch.bool: 4,
    torch.int8: 5,
    torch.int32: 6,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# The instruction sets of this build that this machine runs, slowest first; empty without the extension.
ISAS: tuple[str, ...] = (
    () if _ext.C is None else tuple(name for i, name in enumerate(_ext.C.isas) if _ext.C.runs_here(i))
)
_ISA_NUMBERS: dict[str, int] = {} if _ext.C is None else {name: i for i, name in enumerate(_ext.C.isas)}


class use_isa(Switch):
    """Run the C++ kernels with one instruction set: `use_isa("avx2")` from here on, `with use_isa("avx2"):` inside.

    name: one of `ISAS`, or "auto" (the default: the last of them). Raises ValueError for a name that this machine or
    this build does not have.
    """

    state = State("auto")

    def __init__(self, name: str) -> None:
        if name not in ("auto", *ISAS):
            raise ValueError(f"isa must be one of {', '.join(('auto', *ISAS))} on this machine, got {name!r}")
        super().__init__(name)


def active_isa() -> str:
    """The instruction set that a kernel called now would run with."""
    return ISAS[-1] if use_isa.state.active == "auto" else use_isa.state.active


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the extension can run an op on these tensors, else the reason; integer and bool tensors may be any."""
    if _ext.C is None:
        return _ext.ERROR
    tensors = [x, *(t for t in others if t is not None)]
    wrong = sorted({str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype not in FLOATS})
    return f"its cpu kernel takes float32, bfloat16 and float16, got {', '.join(wrong)}" if wrong else None


def elementwise_refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """`refusal` of an op that takes x of any number of dimensions."""
    return "its cpu kernel takes at most 6 dimensions" if x.dim() > 6 else refusal(x, *others)


# A tensor as the kernels take it: address, dtype, shape and strides.
Described: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def describe(tensor: Tensor) -> Described:
    """For `call`, where the same tensor goes to it often. It keeps nothing alive."""
    return tensor.data_ptr(), CODES[tensor.dtype], tensor.shape, tensor.stride()


def call(name: str, *args: Any) -> Any:
    """Run the kernel `name` on torch's number of threads. Tensors are described; what else is given goes as it is.

    Raises ValueError naming the argument that the kernel refuses.
    """
    isa = _ISA_NUMBERS[active_isa()]
    described = [
        (arg.data_ptr(), CODES[arg.dtype], arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg for arg in args
    ]
    return getattr(_ext.C, name)(isa, torch.get_num_threads(), *described)


# The C library mostly keeps what is smaller for the next allocation, with its pages.
_LARGE = 8 << 20


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU. What is large, csrc's pool gives: freed, it waits for the next of its size."""
    count = math.prod(shape)
    if count * dtype.itemsize <= _LARGE or torch._C._autograd._profiler_enabled():  # which sees PyTorch's memory alone
        return torch.empty(shape, dtype=dtype)
    # The tensor keeps the block alive.
    return torch.frombuffer(_ext.C.LargeBlock(count * dtype.itemsize), dtype=dtype).view(shape)
