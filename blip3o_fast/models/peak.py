"""How many bytes a call allocates at its height, above what was allocated before it."""

from collections.abc import Callable
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = height = 0
    for _, change in changes:
        live += change
        height = max(height, live)
    return height
