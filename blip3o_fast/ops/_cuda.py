"""The door to the CUDA C++ kernels: whether they can run here, and how a tensor is handed over.

The extension is loaded at the first question, never with the package. The tests put an emulation of the kernels in its
place, which takes CPU tensors (`emulate`).
"""

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.ops._cpu import CODES, FLOATS

MINIMUM_CAPABILITY = (8, 0)
MOST_WIDTH = 16384
Row = TypeVar("Row", Tensor, Tensor | None)

_emulation: Any = None


def emulate(module: Any) -> None:
    """From here on run `module`, blip3o_fast._cuda compiled for the host, on CPU tensors; None ends it."""
    global _emulation
    _emulation = module


@functools.cache
def extension() -> tuple[Any, str]:
    """The extension or None, and the reason why it is None."""
    return _ext.load("_cuda", "cuda")


def why_not(device_type: str, index: int | None = None) -> str | None:
    """The reason why the kernels cannot run on a device, or None. "not available" where installing would mend it."""
    if device_type == "cpu" and _emulation is not None:
        return None
    if device_type != "cuda":
        return f"it needs cuda tensors, got {device_type}"
    module, error = extension()
    if module is None:
        return error
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "it needs an NVIDIA GPU, and PyTorch sees none"
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        needed, given = (".".join(map(str, c)) for c in (MINIMUM_CAPABILITY, capability))
        return f"it needs compute capability {needed} or newer, {torch.cuda.get_device_name(index)} has {given}"
    return None


# What `torch.compiler.assume_constant_result` sets, without its import of dynamo: a trace asks and looks no further.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the kernels can run an op on these tensors, else the reason; integer and bool tensors may be any."""
    reason = why_not(x.device.type, x.device.index)
    if reason is not None:
        return reason
    tensors = [x, *(t for t in others if t is not None)]
    wrong = sorted({str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype not in FLOATS})
    return f"its cuda kernel takes float32, bfloat16 and float16, got {', '.join(wrong)}" if wrong else None


def row_refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """`refusal` of a norm over the last dimension."""
    if x.shape[-1] > MOST_WIDTH:
        return f"its cuda kernel takes rows of up to {MOST_WIDTH}, got {int(x.shape[-1])}"
    return refusal(x, *others)


def with_unit_stride(x: Row) -> Row:
    """The tensor itself where its last dimension is contiguous, else a copy: kernels walk rows by address."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def chunks(batch: int, tokens: int) -> int:
    """Into how many parts the backward of a norm cuts a sample's tokens: each a block, which leaves one row of sums."""
    rows = min(max(batch * tokens // 512, 4), 16)
    return -(-tokens // rows)


def call(name: str, *args: Any) -> None:
    """Launch the kernels of `name` on the current stream of the first tensor's device.

    Tensors are described, None and numbers go as they are. Raises ValueError naming the argument that is refused.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    described = [
        (arg.data_ptr(), CODES[arg.dtype], arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg for arg in args
    ]
    if device.type == "cpu":
        getattr(_emulation, name)(0, 0, *described)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(extension()[0], name)(device.index, stream, *described)
