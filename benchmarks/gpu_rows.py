"""A `Work` on a GPU as rows: every provider captured, its replayed values checked, then all timed in turns."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_timing import Clock, Replay, capture, prepared, written
from benchmarks.harness import broken
from benchmarks.work import Absent, Inputs, Values, Work

# Calls in one graph, for the time of a call among others: no gap of a graph's start in it, inputs in the cache.
CALLS_IN_GRAPH = 20


def measure(
    work: Work, modes: tuple[str, ...], clock: Clock, copy_gbps: float, *, rounds: int = 30, in_graph: bool = False
) -> Iterator[dict[str, Any]]:
    """A row per mode and provider. What is wrong has the reason and no time; the others go on.

    in_graph: also the time of one call among CALLS_IN_GRAPH in one graph.
    """
    inputs = work.inputs()
    gold = work.gold(inputs)
    replays: dict[str, dict[str, Replay]] = {mode: {} for mode in modes}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    baseline: Values = {}
    for name, provider in work.providers.items():
        for mode in modes:
            row: dict[str, Any] = {"suite": work.suite, "case": work.case, "mode": mode, "provider": name}
            row |= {"detail": work.details.get(name), "status": "ok", "reason": None, "inexact": None, "errors": {}}
            rows[mode, name] = row
            if isinstance(provider, Absent):
                row |= {"status": "absent", "reason": provider.reason}
                continue
            try:
                replay = capture(prepared(provider, inputs, mode), clock.device)
                got = written(replay, inputs)
            except Exception as error:  # a provider that breaks is a row of the result, not the end of the run
                row |= broken(error)
                continue
            if name == next(iter(work.providers)):
                baseline |= got
            _check(work, name, got, baseline, gold, row)
            if row["status"] == "ok":
                replays[mode][name] = replay
    del gold, baseline
    for mode in modes:
        made = _timed(work, mode, replays[mode], inputs, clock, rounds, in_graph)
        for name in work.providers:
            row = rows[mode, name]
            row |= _figures(made, name, work, mode, copy_gbps)
            yield row


def _check(work: Work, name: str, got: Values, baseline: Values, gold: Values, row: dict[str, Any]) -> None:
    """The rule of the harness: ours keeps the contract, a peer is right."""
    if not set(got) <= set(baseline):
        row |= {"status": "FAILED", "reason": "the first provider has no values to compare with"}
        return
    verdict = work.judge(got, {n: baseline[n] for n in got}, {n: gold[n] for n in got})
    # JSON knows no nan
    row["errors"] = {k: e if math.isfinite(e) else str(e) for k, e in verdict.errors.items()}
    row["inexact"] = verdict.inexact
    failure = verdict.wrong or (None if name in work.peers else verdict.inexact)
    if failure is not None:
        row |= {"status": "FAILED", "reason": failure}


def _timed(
    work: Work, mode: str, replays: dict[str, Replay], inputs: Inputs, clock: Clock, rounds: int, in_graph: bool
) -> dict[str, Any]:
    if not replays:
        return {"alone": {}, "among": {}}
    alone = clock.in_turns(replays, rounds)
    among = {}
    if in_graph:
        many = {}
        for name in replays:
            provider = work.providers[name]
            assert not isinstance(provider, Absent)
            many[name] = capture(prepared(provider, inputs, mode), clock.device, calls=CALLS_IN_GRAPH)
        among = clock.in_turns(many, rounds, cold=False)
    return {"alone": alone, "among": among}


def _figures(made: dict[str, Any], name: str, work: Work, mode: str, copy_gbps: float) -> dict[str, Any]:
    """Times of a row, None where there are none. Speed-ups are medians of the ratios within a round."""
    names = "median_us p20_us p80_us rounds speedup gbps fraction_of_copy in_graph_us bytes".split()
    timing = made["alone"].get(name)
    if timing is None:
        return dict.fromkeys(names)
    first = made["alone"].get(next(iter(work.providers)))
    moved = least_bytes(work, mode)
    gbps = None if moved is None else moved / timing.median * 1e-9
    among = made["among"].get(name)
    figures = [
        *(value * 1e6 for value in (timing.median, timing.p20, timing.p80)),
        len(timing.samples),
        None if first is None else timing.speedups(first).median,
        gbps,
        None if gbps is None else gbps / copy_gbps,
        None if among is None else among.median * 1e6 / CALLS_IN_GRAPH,
        moved,
    ]
    return dict(zip(names, figures, strict=True))


def least_bytes(work: Work, mode: str) -> int | None:
    """Of a mode as it is timed here: a forward that autograd records may have more to write (the loss's gradient)."""
    if mode == "forward" and {"both", "backward"} <= set(work.bytes_moved):
        return work.bytes_moved["both"] - work.bytes_moved["backward"]
    return work.bytes_moved.get(mode)


def release(device: str) -> None:
    """Memory of graphs that are gone back to the device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def line(row: dict[str, Any]) -> str:
    """One row as it is measured."""
    case = " ".join(f"{k}={v}" for k, v in row["case"].items())
    if row["status"] != "ok":
        return f"{row['suite']} {case} {row['mode']} {row['provider']}: {row['status']}: {row['reason']}"
    share = "" if row["fraction_of_copy"] is None else f", {100 * row['fraction_of_copy']:.0f} % of copy"
    return (
        f"{row['suite']} {case} {row['mode']} {row['provider']}: {row['median_us']:.1f} us"
        f" ({_number(row['speedup'], '.2f')}x{share})"
    )


def table(rows: list[dict[str, Any]], goals: list[dict[str, Any]], left_out: list[str]) -> Iterator[str]:
    """Ours beside eager and torch.compile, a line per case and mode; the goals; what was left out."""
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        variant = next((k for k in ("masked", "noise") if row["case"].get(k) in (True, "seed")), "")
        key = (row["suite"], row["case"]["dtype"], str(row["case"]["batch"]), variant, row["mode"])
        found.setdefault((*key, str(row["case"].get("layers", ""))), {})[row["provider"]] = row
    yield (
        f"{'op':24} {'dtype':9} {'batch':>5} {'mode':10} {'ours us':>9} {'of copy':>7}"
        f" {'x eager':>7} {'x compile':>9} {'in graph us':>11}"
    )
    for (suite, dtype, batch, variant, mode, layers), by_name in found.items():
        name = " ".join(filter(None, (suite, variant, layers and f"{layers}L")))
        for provider in ("ours", "ours, condition prepared"):
            ours, compiled = by_name.get(provider), by_name.get("compile", {})
            if ours is None:
                continue
            head = f"{name + ('' if provider == 'ours' else ' prepared'):24} {dtype:9} {batch:>5} {mode:10}"
            if ours["status"] != "ok":
                yield f"{head} {ours['status']}"
                continue
            theirs, own = compiled.get("median_us"), ours["median_us"]
            share = ours["fraction_of_copy"]
            yield (
                f"{head} {own:9.1f} {_number(None if share is None else 100 * share, '6.0f')}%"
                f" {_number(ours['speedup'], '7.2f'):>7} {_number(theirs and theirs / own, '9.2f'):>9}"
                f" {_number(ours['in_graph_us'], '11.2f'):>11}"
            )
    told = [goal for goal in goals if goal["met"] is not None]
    yield f"goals: {sum(goal['met'] for goal in told)} of {len(told)} met, {len(goals) - len(told)} not measured"
    for goal in told:
        if not goal["met"]:
            yield (
                f"  missed {goal['op']} {goal['mode']} {goal['at']}: {goal['reached']:.2f} where {goal['goal']:.2f} is"
                " the goal"
            )
    for what in left_out:
        yield f"left out: {what}"
