"""The one door through which kernels are launched, so that launches can be counted, recorded and compiled ahead.

On meta tensors nothing runs: the launch is only recorded, with everything that decides what Triton would compile
(`_compile.py` takes it from there). Under TRITON_INTERPRET=1 kernels run in Python, on CPU tensors.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

# What kernels are configured for where there is no device to ask: meta tensors and the interpreter.
_DEFAULT_CAPABILITY = 90

_recorders: list["list[Launch]"] = []
_call_recorders: list["list[Call]"] = []
_assumed: list[int] = []


@dataclass(frozen=True)
class Launch:
    """One launch. args: the kernel's runtime arguments in order; constants: its constexprs; options: num_warps etc."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def module(self) -> str:
        """The file that holds the kernel, which has the op's name."""
        return self.kernel.fn.__module__.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Call:
    """One call of a raw op and its launches. minimum_bytes: its inputs read once and its results written once."""

    op: str
    minimum_bytes: int
    launches: tuple[Launch, ...]

    @property
    def moved_bytes(self) -> int:
        """What the launches read and write, each tensor once per launch: scratch and what is read again included."""
        return sum(bytes_of(launch.args) for launch in self.launches)


def bytes_of(values: Any) -> int:
    """Of the tensors in a (nested) sequence."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(bytes_of, values)) if isinstance(values, list | tuple) else 0


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Launch a `@triton.jit` function on the current stream of its tensors' device; an empty grid launches nothing."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if _recorders:
        launched = Launch(kernel, grid, tuple(map(_without_data, args)), constants, options)
        for recorder in _recorders:
            recorder.append(launched)
    first = next(a for a in args if isinstance(a, Tensor))
    if is_hollow(first):
        return
    device = first.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no data: nothing can be launched on it, only recorded."""
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def _without_data(argument: Any) -> Any:
    """Fake tensors as meta tensors, which have the (null) address that the specialisation asks for."""
    if not isinstance(argument, FakeTensor):
        return argument
    with unset_fake_temporarily():
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects every launch made inside, in order."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        # By identity: equal lists (two empty ones, say) are not the same recorder.
        _recorders[:] = [r for r in _recorders if r is not launches]


@contextmanager
def recording_calls() -> Iterator[list[Call]]:
    """Collects the calls of raw ops on tensors without data, each with its launches."""
    calls: list[Call] = []
    _call_recorders.append(calls)
    try:
        with recording():
            yield calls
    finally:
        _call_recorders[:] = [r for r in _call_recorders if r is not calls]


def recorded_call(op: str, implementation: Any, args: tuple[Any, ...]) -> Any:
    """Run a raw op's implementation on tensors without data and note the call."""
    with recording() as launches:
        result = implementation(*args)
    made = Call(op, bytes_of(args) + bytes_of(result), tuple(launches))
    for recorder in _call_recorders:
        recorder.append(made)
    return result


def is_recording() -> bool:
    return bool(_recorders)


@contextmanager
def assumed_capability(capability: int) -> Iterator[None]:
    """Launches made inside are configured for this architecture (90 is sm_90), whatever device there is."""
    _assumed.append(capability)
    try:
        yield
    finally:
        _assumed.pop()


def capability_of(tensor: Tensor) -> int:
    """The architecture that a tensor's kernels are configured for: 90 is sm_90."""
    if _assumed:
        return _assumed[-1]
    if tensor.device.type != "cuda":
        return _DEFAULT_CAPABILITY
    return _capability_of_device(tensor.device.index)


@functools.cache
def _capability_of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy: kernels walk rows by address."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
