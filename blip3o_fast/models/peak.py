"""How many bytes a call allocates at its height, above what was allocated before it."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Of one call: on CUDA what the allocator counts; on a CPU the sum of what PyTorch's allocator gave and took back,
    as its profiler records it, so that a temporary inside an operation counts. Scratch memory of libraries (MKL) does
    not. None on other devices, and where a profiler runs already.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or torch._C._autograd._profiler_enabled():
        return None
    return sum(max(accumulate(changes, initial=0)) for changes in _changes(call))


def _changes(call: Callable[[], Any]) -> list[list[int]]:
    """Per thread, the bytes of each allocation and, negative, of each return, in order.

    By the recorder beneath `torch.autograd.profiler_legacy`: the newer one writes lines of its own to stderr.
    """
    recorder: Any = torch.autograd  # its stubs know neither the recorder's functions nor what they return
    settings = (False, True, False, False, False, torch._C._profiler._ExperimentalConfig())  # the second: of memory
    recorder._enable_profiler_legacy(recorder.ProfilerConfig(recorder.ProfilerState.CPU, *settings))
    try:
        call()
    finally:
        threads = recorder._disable_profiler_legacy()
    return [[e.cpu_memory_usage() for e in events if e.kind() == "memory_alloc"] for events in threads]
