"""The time of the steps: how long, waiting for what, and which rank is the slow one. Nothing here waits for the device.

Between two logs a step costs a few marks: readings of the clock on a CPU, recorded events on a GPU, whose distances are
read with the next log, which waits for the device anyhow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a log says of the machine rather than of the training: two equal runs differ in these.
MEASURED = frozenset(
    {
        "seconds", "samples_per_second", "tokens_per_second", "mfu", "memory_gb", "data_wait", "step_seconds",
        "step_seconds_max", "slowest_rank", "slowest_rank_seconds",
    }
)  # fmt: skip


@dataclass(frozen=True)
class StepCost:
    """What a sample costs, for tokens per second and MFU.

    tokens: of the target. flops: of forward and backward (`models.flops`). peak: FLOP/s of one process's device.
    """

    tokens: int
    flops: int
    peak: float


class StepClock:
    """Times of one rank's steps since the last log, without evaluations and checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin: Any = None  # of the present step; None outside of training
        self._own: list[tuple[Any, Any]] = []  # of the present step: its forward passes
        self._own_host = 0.0  # of the present step: waiting for data
        self._steps: list[tuple[Any, Any, list[tuple[Any, Any]], float]] = []
        self._window_begun, self._excluded, self._waited, self._samples = 0.0, 0.0, 0.0, 0

    def start(self, samples: int) -> None:
        """The first step begins now; samples: those of the steps before a continuation."""
        self._begin = self._mark()
        self._open_window(samples)

    def _open_window(self, samples: int) -> None:
        self._window_begun, self._excluded, self._waited, self._samples = time.perf_counter(), 0.0, 0.0, samples
        self._steps.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the loader: the host's time, which on a GPU may still hide behind the device's."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            waited = time.perf_counter() - begun
            self._waited += waited
            self._own_host += waited

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass: what a rank does alone. In the backward all wait for the slowest."""
        begun = self._mark()
        try:
            yield
        finally:
            self._own.append((begun, self._mark()))

    def step(self) -> None:
        """An optimizer step has ended, and the next begins."""
        now = self._mark()
        if self._begin is not None:
            self._steps.append((self._begin, now, self._own, self._own_host))
        self._begin, self._own, self._own_host = now, [], 0.0

    @contextmanager
    def excluding(self) -> Iterator[None]:
        """Around what is no training: evaluations and checkpoints."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - begun
            self._begin = self._mark()

    def read(self, samples: int, gather: Callable[[Tensor], Tensor] | None, cost: StepCost | None) -> dict[str, float]:
        """The window's numbers over all ranks, and a new window. Called with a log: it may wait for the device.

        samples: seen by all ranks so far. gather: [1, 5] of this rank to [ranks, 5]; None: alone. cost: None leaves
        tokens and MFU out.

        Returns some of MEASURED:
            step_seconds: the median step (over the window, then over the ranks); step_seconds_max: the longest one;
            slowest_rank, slowest_rank_seconds: the rank that takes longest until its backward begins (waiting for
            data, and the forward), and its median time for that. All else a rank does while the others wait for it.
            data_wait: the share of the time in which the host waited for data, of the rank where it is largest.
            memory_gb: the largest peak so far (allocated on a GPU, resident on a CPU), in 2^30 bytes.
        """
        elapsed = max(time.perf_counter() - self._window_begun - self._excluded, 1e-9)
        rate = (samples - self._samples) / elapsed
        seconds = [self._between(begin, end) for begin, end, _, _ in self._steps] or [elapsed]
        own = [waited + sum(self._between(*pair) for pair in forwards) for _, _, forwards, waited in self._steps] or [
            0.0
        ]
        median = statistics.median
        mine = torch.tensor(
            [median(seconds), max(seconds), median(own), self._waited / elapsed, memory_gb(self.device)],
            dtype=torch.float64,
        )
        ranks = (mine[None] if gather is None else gather(mine.to(self.device)[None])).cpu()
        medians, longest, alone, waited, memory = ranks.unbind(1)
        slowest = int(alone.argmax())
        numbers = {
            "samples_per_second": rate,
            "step_seconds": median(medians.tolist()),
            "step_seconds_max": float(longest.max()),
            "slowest_rank": slowest,
            "slowest_rank_seconds": float(alone[slowest]),
            "data_wait": float(waited.max()),
            "memory_gb": float(memory.max()),
        }
        if cost is not None:
            numbers["tokens_per_second"] = rate * cost.tokens
            numbers["mfu"] = rate * cost.flops / (cost.peak * len(ranks))
        self._open_window(samples)
        return {name: value if name == "slowest_rank" else float(f"{value:.4g}") for name, value in numbers.items()}

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def memory_gb(device: torch.device) -> float:
    """The peak since the process began: allocated by torch on a GPU, resident on a CPU; in 2^30 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
