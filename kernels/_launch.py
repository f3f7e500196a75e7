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

# What kernels are configured for where there is no device to ask: meta tensors and the interpreter.
_DEFAULT_CAPABILITY = 90

_recorders: list["list[Launch]"] = []
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


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Launch a `@triton.jit` function on the current stream of its tensors' device; an empty grid launches nothing."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    for recorder in _recorders:
        recorder.append(Launch(kernel, grid, args, constants, options))
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "meta":
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


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
