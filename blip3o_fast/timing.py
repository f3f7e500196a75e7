"""Time several functions that do the same work side by side: one sample of each in turn, round after round.

Clock speed, cache state and neighbours drift while a program runs. Interleaved (A B A B), the drift hits every
provider alike, and the ratio of two samples of one round is nearly free of it; timed one after the other (A A B B), it
ends up in the ratio. Standard library only.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def percentile(samples: Sequence[float], percent: float) -> float:
    """The percent-th percentile, linear between the two nearest samples (numpy's default)."""
    if not samples:
        raise ValueError("samples is empty: there is no percentile of nothing")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: one sample per round, in the order of the rounds, each the mean over `calls` calls."""

    samples: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        return percentile(self.samples, 20)

    @property
    def p80(self) -> float:
        return percentile(self.samples, 80)

    def speedups(self, baseline: "Timing") -> "Timing":
        """How many times faster than `baseline`, round by round: the samples are ratios, not seconds."""
        return Timing(tuple(b / s for b, s in zip(baseline.samples, self.samples, strict=True)), self.calls)


def _nothing() -> None:
    return None


def interleaved(
    providers: Mapping[str, Callable[..., Any]],
    *,
    rounds: int,
    warmup: int = 1,
    calls: int | Mapping[str, int] = 1,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
    between: Callable[[], Any] = _nothing,
    synchronize: Callable[[], Any] = _nothing,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """One timed sample of each provider in turn, `rounds` times, after `warmup` rounds that are thrown away.

    calls: how often a sample calls its provider (one number, or one per provider), for work too short for one call.
    prepare: per provider, what must happen before a call but is not to be timed (a forward before a backward): it runs
    `calls` times before the clock starts, and each result is given to one call.
    between: runs after each round, unless it is the last. synchronize: waits for the device, on both ends of a sample
    (`torch.cuda.synchronize`). Python's garbage collector is off while the clock runs.
    Raises ValueError for no providers, rounds or calls below 1, a negative warmup, names that are not providers.
    """
    if not providers:
        raise ValueError("providers is empty: nothing to time")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    counts = dict.fromkeys(providers, calls) if isinstance(calls, int) else dict(calls)
    preparations = dict(prepare or {})
    for name, given in (("calls", counts), ("prepare", preparations)):
        unknown = sorted(set(given) - set(providers))
        if unknown:
            raise ValueError(f"{name} names {', '.join(unknown)}; the providers are {', '.join(providers)}")
    counts = {name: counts.get(name, 1) for name in providers}
    if min(counts.values()) < 1:
        raise ValueError(f"calls must be at least 1, got {counts}")

    samples: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(warmup + rounds):
        for name, function in providers.items():
            seconds = _sample(function, preparations.get(name), counts[name], synchronize, timer)
            if turn >= warmup:
                samples[name].append(seconds / counts[name])
        if turn < warmup + rounds - 1:
            between()
    return {name: Timing(tuple(values), counts[name]) for name, values in samples.items()}


def _sample(
    function: Callable[..., Any],
    prepare: Callable[[], Any] | None,
    calls: int,
    synchronize: Callable[[], Any],
    timer: Callable[[], float],
) -> float:
    """Seconds of `calls` calls. Results are dropped one by one, so memory is reused as in a real loop."""
    states = [(prepare(),) for _ in range(calls)] if prepare is not None else [()] * calls
    states.reverse()
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        start = timer()
        while states:
            function(*states.pop())
        synchronize()
        return timer() - start
    finally:
        if collecting:
            gc.enable()
