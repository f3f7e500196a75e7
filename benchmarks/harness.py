"""One case of work, measured: every provider checked against the fp64 gold, then timed in turns with the others.

A benchmark file describes a `Work` (work.py: inputs, providers, gold, minimal bytes and FLOPs) and hands it to
`measure` through the `compare` fixture of plugin.py. There is no other timing code: a new claim is a new provider or a
new `Work`.

What is timed: the call as a user makes it, on the host's clock up to the end of the device's work. Python and dispatch
overhead is included, for every provider alike; input creation, compilation and the warm-up are not. On a GPU the time
of the device alone stands beside it: CUDA graphs with a cold L2 (gpu_timing.py).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_timing, machine
from benchmarks.work import MODES, WITH_GRADIENTS, Absent, Inputs, Values, Work, gradients_of, values
from blip3o_fast.models.peak import peak_bytes
from blip3o_fast.timing import Timing, interleaved

# What is measured beside the time, where it is not.
NOT_BESIDE = {"peak_bytes": None, "host_s": None, "device_s": None}


@dataclass(frozen=True)
class Settings:
    """min_rounds and max_time (timed seconds per provider and mode) bound the rounds, min_time the calls per sample.

    min_time 0: calls of seconds, each from scratch. No trial and no warm-up then, but min_rounds of one call.
    """

    min_rounds: int = 7
    max_rounds: int = 101
    max_time: float = 1.0
    min_time: float = 1e-3
    warmup: int = 1
    timed: bool = True  # False: only the correctness
    timer: Callable[[], float] = time.perf_counter


def _why_absent(error: BaseException) -> str | None:
    """A reason where the machine lacks a tool and the provider is not to blame."""
    text = f"{type(error).__name__}: {error}"
    if "InvalidCxxCompiler" in text:
        return "no working C++ compiler for torch.compile"
    if "Python.h" in text:
        return "torch.compile needs Python.h (Debian: apt-get install python3-dev)"
    return None


def _check(work: Work, mode: str, inputs: Inputs, gold: Values) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each provider: status ok, FAILED, absent or error, with the reason, the errors and the first call's time."""
    baseline: Values | None = None
    for name, provider in work.providers.items():
        row: dict[str, Any] = {"status": "ok", "reason": None, "errors": {}, "inexact": None, "first_call_s": None}
        if isinstance(provider, Absent):
            row |= {"status": "absent", "reason": provider.reason}
        else:
            start = time.perf_counter()
            try:
                got = values(provider, inputs, gradients=mode in WITH_GRADIENTS)
            except Exception as error:  # a peer that breaks is a row of the result, not the end of the run
                row |= broken(error)
            else:
                row["first_call_s"] = time.perf_counter() - start
                baseline = got if baseline is None else baseline
                verdict = work.judge(got, baseline, gold)
                # JSON knows no nan
                row["errors"] = {k: e if math.isfinite(e) else str(e) for k, e in verdict.errors.items()}
                row["inexact"] = verdict.inexact
                failure = verdict.wrong or (None if name in work.peers else verdict.inexact)
                if failure is not None:
                    row |= {"status": "FAILED", "reason": failure}
        yield name, row


class Broke(Exception):
    """A provider that gave right values broke while it was timed; __cause__ says how."""

    def __init__(self, provider: str) -> None:
        super().__init__(provider)
        self.provider = provider


def broken(error: BaseException) -> dict[str, Any]:
    """Status and reason of a row whose provider raised: broken, or absent where the machine lacks a tool."""
    reason = _why_absent(error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return {
        "status": "error" if reason is None else "absent",
        "reason": reason or f"{type(error).__name__}: {first_line}",
    }


def _runners(
    name: str, provider: Callable[..., Any], mode: str, pool: list[Inputs]
) -> tuple[Callable[..., Any], Callable[[], Any] | None]:
    """(what is timed, what is prepared before it or None), going round the pool."""
    turn = itertools.cycle(pool)

    def forward() -> Any:
        try:  # costs nothing where nothing is raised
            return provider(*next(turn).args)
        except Exception as error:
            raise Broke(name) from error

    def prepare() -> tuple[Any, Inputs]:
        inputs = next(turn)
        try:
            return provider(*inputs.args), inputs
        except Exception as error:
            raise Broke(name) from error

    def backward(state: tuple[Any, Inputs]) -> tuple[Tensor, ...]:
        try:
            return gradients_of(*state)
        except Exception as error:
            raise Broke(name) from error

    if mode not in WITH_GRADIENTS:
        return forward, None
    return (backward, prepare) if mode == "backward" else (lambda: backward(prepare()), None)


def _time(
    work: Work, mode: str, names: list[str], pool: list[Inputs], settings: Settings, ceilings: machine.Ceilings | None
) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """The timings, and what else is measured of each provider (`_beside`)."""
    runs, prepare = {}, {}
    for name in names:
        provider = work.providers[name]
        assert not isinstance(provider, Absent)
        runs[name], preparation = _runners(name, provider, mode, pool)
        if preparation is not None:
            prepare[name] = preparation
    on_gpu = any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in pool[0].args)
    device = next((arg.device for arg in pool[0].args if isinstance(arg, Tensor)), None)
    synchronize: Callable[[], Any] = torch.cuda.synchronize if on_gpu else (lambda: None)
    last = names[-1]

    def between() -> None:
        if ceilings is not None and ceilings.due():
            ceilings.fma()
            # The first provider must find the machine as it always does: just left by the last one.
            runs[last](*((prepare[last](),) if last in prepare else ()))

    common: dict[str, Any] = {"prepare": prepare, "synchronize": synchronize, "timer": settings.timer}
    with torch.set_grad_enabled(mode in WITH_GRADIENTS):
        calls, rounds = dict.fromkeys(runs, 1), settings.min_rounds
        if settings.min_time > 0:
            trial = interleaved(runs, rounds=2, warmup=settings.warmup, **common)
            calls = {
                name: min(1000, max(1, math.ceil(settings.min_time / max(timing.median, 1e-9))))
                for name, timing in trial.items()
            }
            round_time = sum(calls[name] * timing.median for name, timing in trial.items())
            affordable = int(len(names) * settings.max_time / max(round_time, 1e-9))
            rounds = min(settings.max_rounds, max(settings.min_rounds, affordable))
        timings = interleaved(runs, rounds=rounds, warmup=0, calls=calls, between=between, **common)
        beside = {name: _beside(run, prepare.get(name), device, settings.timer) for name, run in runs.items()}
    if on_gpu:
        named = {name: work.providers[name] for name in names}
        alone = gpu_timing.device_seconds(named, mode, pool[0], gpu_timing.Clock())  # type: ignore[arg-type]
        beside = {name: figures | {"device_s": alone[name]} for name, figures in beside.items()}
    return timings, beside


def _beside(
    run: Callable[..., Any],
    prepare: Callable[[], Any] | None,
    device: torch.device | None,
    timer: Callable[[], float],
) -> dict[str, Any]:
    """peak_bytes: what a call allocates at its height, above what there was (None where the inputs name no device).
    host_s, on a GPU: how long the host takes to queue a call, the median of five, of which the device sees nothing."""
    if device is None:
        return dict(NOT_BESIDE)

    def ready() -> tuple[Any, ...]:
        return () if prepare is None else (prepare(),)

    state, queued = ready(), []
    peak = peak_bytes(lambda: run(*state), device)
    for _ in range(5 if device.type == "cuda" else 0):
        state = ready()
        torch.cuda.synchronize(device)
        start = timer()
        run(*state)
        queued.append(timer() - start)
    return NOT_BESIDE | {"peak_bytes": peak, "host_s": Timing(tuple(queued)).median if queued else None}


def measure(
    work: Work,
    settings: Settings,
    ceilings: machine.Ceilings | None = None,
    progress: Callable[[str], Any] = lambda text: None,
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Timing]]]:
    """Per mode: the rows of all providers (see `plugin.py` for what is added), and the timings of those that have one.

    A provider that is wrong, absent or broken has a row with the reason and no time; the others go on.
    """
    unknown = [mode for mode in work.modes if mode not in MODES]
    if unknown:
        raise ValueError(f"modes must be among {', '.join(MODES)}, got {', '.join(unknown)}")
    progress(f"{work.label}: inputs and fp64 gold")
    pool = [work.inputs()]
    if work.rotate and settings.timed:
        copies = math.ceil(2 * machine.cache_bytes() / max(1, pool[0].bytes()))
        pool += [work.inputs() for _ in range(min(copies, 512) - 1)]
    gold = work.gold(pool[0])
    checked: dict[bool, dict[str, dict[str, Any]]] = {}
    for mode in work.modes:
        gradients = mode in WITH_GRADIENTS
        if gradients not in checked:
            progress(f"{work.label} {mode}: correctness (and compilation)")
            checked[gradients] = dict(_check(work, mode, pool[0], gold))
        checks = dict(checked[gradients])
        names = [name for name, row in checks.items() if row["status"] == "ok"]
        timings: dict[str, Timing] = {}
        beside: dict[str, dict[str, Any]] = {}
        while settings.timed and names and not timings:
            progress(f"{work.label} {mode}: {', '.join(names)} in turns")
            if ceilings is not None:
                ceilings.copy()
            try:
                timings, beside = _time(work, mode, names, pool, settings, ceilings)
            except Broke as broke:  # the others take their turns again, without it
                assert broke.__cause__ is not None
                checks[broke.provider] = checks[broke.provider] | broken(broke.__cause__)
                names.remove(broke.provider)
        baseline = timings.get(next(iter(work.providers)))
        rows = []
        for name, check in checks.items():
            row: dict[str, Any] = {"suite": work.suite, "case": work.case, "mode": mode, "provider": name}
            row |= {"detail": work.details.get(name), **check, "inputs_in_rotation": len(pool)}
            row |= {"bytes": work.bytes_moved.get(mode), "flops": work.flops.get(mode)}
            figures = _figures(timings.get(name), baseline, row["bytes"], row["flops"])
            count, unit = work.items or (None, None)
            seconds = figures["median_s"]
            row |= {"items": count, "item": unit, **beside.get(name, NOT_BESIDE)}
            row |= {"items_per_s": None if count is None or seconds is None else count / seconds}
            rows.append(row | figures)
        yield rows, timings


def failed_row(suite: str, case: dict[str, Any], error: BaseException) -> dict[str, Any]:
    """The row of a case that could not even be made: every field of `measure`'s rows, and why."""
    row: dict[str, Any] = {"suite": suite, "case": case, "mode": "case", "provider": "all", "detail": None}
    row |= {"errors": {}, "inexact": None, "first_call_s": None, "inputs_in_rotation": 0} | broken(error)
    row |= {"bytes": None, "flops": None, "items": None, "item": None, "items_per_s": None, **NOT_BESIDE}
    return row | _figures(None, None, None, None)


def _figures(
    timing: Timing | None, baseline: Timing | None, bytes_moved: int | None, flops: int | None
) -> dict[str, Any]:
    """The numbers of a row; None throughout where nothing was timed. Speed-ups are medians of per-round ratios."""
    names = "median_s p20_s p80_s rounds calls speedup speedup_p20 speedup_p80 gbps gflops".split()
    if timing is None:
        return dict.fromkeys(names)
    speedups = None if baseline is None else timing.speedups(baseline)
    figures: list[float | None] = [timing.median, timing.p20, timing.p80, len(timing.samples), timing.calls]
    figures += [None] * 3 if speedups is None else [speedups.median, speedups.p20, speedups.p80]
    figures += [None if amount is None else amount / timing.median * 1e-9 for amount in (bytes_moved, flops)]
    return dict(zip(names, figures, strict=True))
