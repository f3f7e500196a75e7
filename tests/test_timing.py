"""The interleaved timer: the order of its calls, its statistics against numpy, with a clock that the test turns."""

import gc

import numpy as np
import pytest

from blip3o_fast.timing import Timing, interleaved, percentile


class Clock:
    """Time passes only where a provider says so; every event is written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def __call__(self) -> float:
        return self.now

    def provider(self, name: str, *durations: float):
        left = list(durations)

        def run(*state: object) -> None:
            self.events.append("".join([name, *map(str, state)]))
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def note(self, name: str, seconds: float = 0.0):
        def happen() -> str:
            self.events.append(name)
            self.now += seconds
            return f"({name})"

        return happen


def test_providers_take_turns():
    clock = Clock()
    times = interleaved(
        {"A": clock.provider("A", 9, 1, 2, 3), "B": clock.provider("B", 9, 10, 20, 30)}, rounds=3, timer=clock
    )
    assert clock.events == ["A", "B"] * 4  # one round of warm-up, three that count
    assert times["A"].samples == (1, 2, 3)
    assert times["B"].samples == (10, 20, 30)
    assert times["B"].median == 20


def test_speedups_pair_the_samples_of_a_round():
    # the second round is disturbed for both alike: paired, the ratio does not notice
    slow, fast = Timing((4.0, 400.0, 4.0)), Timing((2.0, 200.0, 2.0))
    assert fast.speedups(slow).samples == (2.0, 2.0, 2.0)
    assert slow.speedups(slow).median == 1
    with pytest.raises(ValueError):
        Timing((1.0,)).speedups(slow)


def test_several_calls_make_one_sample():
    clock = Clock()
    times = interleaved(
        {"A": clock.provider("A", 2), "B": clock.provider("B", 5)},
        rounds=2,
        warmup=0,
        calls={"A": 3},
        timer=clock,
    )
    assert clock.events == ["A", "A", "A", "B"] * 2
    assert times["A"] == Timing((2.0, 2.0), 3)
    assert times["B"] == Timing((5.0, 5.0), 1)


def test_what_is_prepared_between_or_waited_for_outside_is_not_timed():
    clock = Clock()
    times = interleaved(
        {"A": clock.provider("A", 1), "B": clock.provider("B", 2)},
        rounds=2,
        warmup=0,
        calls=2,
        prepare={"A": clock.note("p", seconds=50)},
        between=clock.note("|", seconds=70),
        timer=clock,
    )
    assert clock.events == ["p", "p", "A(p)", "A(p)", "B", "B", "|", "p", "p", "A(p)", "A(p)", "B", "B"]
    assert times["A"].samples == (1, 1)
    assert times["B"].samples == (2, 2)


def test_synchronize_is_inside_the_end_and_outside_the_start():
    clock = Clock()
    waits = iter([100, 3, 100, 3])

    def wait() -> None:
        clock.now += next(waits)

    times = interleaved({"A": clock.provider("A", 1)}, rounds=2, warmup=0, synchronize=wait, timer=clock)
    assert times["A"].samples == (4, 4)


def test_garbage_collector_is_off_inside_and_as_before_outside():
    seen = []
    for enable in (gc.enable, gc.disable):
        enable()
        try:
            before = gc.isenabled()
            interleaved({"A": lambda: seen.append(gc.isenabled())}, rounds=1)
            assert gc.isenabled() == before
        finally:
            gc.enable()
    assert seen == [False] * 4

    def fails() -> None:
        raise RuntimeError("provider")

    with pytest.raises(RuntimeError, match="provider"):
        interleaved({"A": fails}, rounds=1)
    assert gc.isenabled()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 101])
def test_statistics_are_numpys(count):
    samples = np.random.default_rng(count).lognormal(size=count)
    timing = Timing(tuple(samples.tolist()))
    for percent in (0, 20, 50, 80, 100):
        assert percentile(timing.samples, percent) == pytest.approx(np.percentile(samples, percent), rel=1e-12)
    assert timing.median == pytest.approx(np.median(samples), rel=1e-12)
    assert timing.p20 == pytest.approx(np.percentile(samples, 20), rel=1e-12)
    assert timing.p80 == pytest.approx(np.percentile(samples, 80), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"providers": {}, "rounds": 1}, "providers is empty"),
        ({"providers": {"A": int}, "rounds": 0}, "rounds must be at least 1.*got 0 and 1"),
        ({"providers": {"A": int}, "rounds": 1, "warmup": -1}, "warmup at least 0, got 1 and -1"),
        ({"providers": {"A": int}, "rounds": 1, "calls": 0}, "calls must be at least 1, got {'A': 0}"),
        ({"providers": {"A": int}, "rounds": 1, "calls": {"B": 1}}, "calls names B; the providers are A"),
        ({"providers": {"A": int}, "rounds": 1, "prepare": {"B": int}}, "prepare names B; the providers are A"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        interleaved(arguments.pop("providers"), **arguments)
    with pytest.raises(ValueError, match="samples is empty"):
        percentile([], 50)
