"""The GPU's timing on a CPU, where a replay is the plain call: rows, what is wrong, goals."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import goals, gpu_rows, gpu_timing
from benchmarks.gpu_timing import Clock, capture, prepared, renewed, written
from benchmarks.work import Absent, Inputs, Work, gold_by


def square(x, weight):
    return x * x * weight


def make_inputs() -> Inputs:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    return Inputs((x, weight), {"x": x, "weight": weight}, torch.randn(4, 6))


def make_work(**providers) -> Work:
    return Work(
        suite="square",
        case={"batch": 4, "dtype": "float32"},
        inputs=make_inputs,
        providers={"eager": square, **providers},
        gold=gold_by(square),
        bytes_moved={"forward": 1000, "backward": 2000, "both": 3500},
        flops={},
        peers=frozenset({"peer"}),
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "both", "inference"])
def test_a_replay_writes_the_values_of_its_mode(mode):
    inputs = make_inputs()
    replay = capture(prepared(square, inputs, mode), "cpu", calls=3)
    got = written(replay, inputs)
    x, weight = inputs.args
    expected = {"y": square(x, weight).detach()} if mode != "backward" else {}
    if mode in ("backward", "both"):
        grads = torch.autograd.grad(square(x, weight), (x, weight), inputs.upstream)
        expected |= dict(zip(("dx", "dweight"), grads, strict=True))
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]) and not value.requires_grad


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_the_devices_time_of_the_harness_modes(mode):
    def broken(x, weight):
        raise RuntimeError("cannot be captured")

    def sleeps(x, weight):
        time.sleep(0.002)
        return square(x, weight)

    providers = {"eager": square, "broken": broken, "sleeps": sleeps}
    found = gpu_timing.device_seconds(providers, mode, make_inputs(), Clock("cpu"), rounds=5)
    assert list(found) == list(providers) and found["broken"] is None
    assert found["eager"] > 0
    assert found["sleeps"] >= 0.002 or mode == "backward"  # whose forward has run before
    assert set(gpu_timing.device_seconds(providers, "whole", make_inputs(), Clock("cpu")).values()) == {None}


def test_renewed_leaves_share_memory_and_leave_weights_alone():
    x, weight = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    given = Inputs((x, None), {"x": x, "weight": weight}, torch.randn(3))
    fresh = renewed(given)
    assert fresh.args[0] is not x and fresh.args[0].data_ptr() == x.data_ptr() and fresh.args[0].is_leaf
    assert fresh.wrt["x"] is fresh.args[0] and fresh.wrt["weight"] is weight and fresh.args[1] is None


def test_rows_have_times_where_the_values_are_right():
    providers = {
        "ours": lambda x, w: x * (x * w),
        "wrong": lambda x, w: x * x * w * 1.001,
        "broken": lambda x, w: 1 / 0,
        "peer": Absent("not here"),
    }
    rows = list(gpu_rows.measure(make_work(**providers), ("forward", "backward"), Clock("cpu"), 10.0, rounds=6))
    assert [row["mode"] for row in rows] == ["forward"] * 5 + ["backward"] * 5
    for row in rows:
        status = {"wrong": "FAILED", "broken": "error", "peer": "absent"}.get(row["provider"], "ok")
        assert row["status"] == status
        assert (row["median_us"] is not None) == (status == "ok")
        if status == "ok":
            moved = {"forward": 1500, "backward": 2000}[row["mode"]]  # a forward with all that it saves
            assert row["bytes"] == moved and 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
            assert row["gbps"] == pytest.approx(moved / row["median_us"] * 1e-3)
            assert row["fraction_of_copy"] == pytest.approx(row["gbps"] / 10)
    assert rows[3]["reason"].startswith("ZeroDivisionError") and "relative L2" in rows[2]["reason"]
    text = "\n".join([*map(gpu_rows.line, rows), *gpu_rows.table(rows, [], ["the rest"])])
    assert "FAILED" in text and "left out: the rest" in text


def test_one_call_among_many():
    (row,) = gpu_rows.measure(make_work(), ("forward",), Clock("cpu"), 10.0, rounds=5, in_graph=True)
    assert row["in_graph_us"] > 0


def test_in_turns_gives_a_sample_of_each_per_round():
    order = []
    replays = {n: capture(lambda n=n: lambda: order.append(n) or {}, "cpu") for n in "abc"}
    order.clear()
    timings = Clock("cpu").in_turns(replays, rounds=6)
    assert all(len(timing.samples) == 6 for timing in timings.values())
    assert ["".join(order[i : i + 3]) for i in range(0, 9, 3)] == ["abc", "bca", "cab"]


def test_goals_are_reached_or_missed_or_unknown():
    def row(batch, **figures):
        case = {"batch": batch, "dtype": "bfloat16"}
        return {"suite": "swiglu", "mode": "forward", "provider": "ours", "case": case, **figures}

    made = goals.reached([row(32, fraction_of_copy=0.76), row(256, fraction_of_copy=0.91), row(1, in_graph_us=2.4)])
    told = {(g["op"], g["mode"], g["at"]): g["met"] for g in made}
    assert told["swiglu", "forward", "32"] is True and told["swiglu", "forward", "256"] is False
    assert told["swiglu", "forward", "in_graph_us"] is True and told["swiglu", "backward", "32"] is None


def test_a_graph_that_writes_nothing_fails(monkeypatch):
    """Stand-ins for CUDA's stream, graph and event: a replay that does nothing leaves the NaN it was given."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            pass

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    def on_cpu(*args, device, **kwargs):
        return empty(*args, **kwargs)

    empty, quiet = torch.empty, lambda *args: None
    stand_ins = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "Event": Event,
        "current_device": lambda: -1,
        "current_stream": Stream,
        "set_stream": quiet,
        "synchronize": quiet,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph, stream: nullcontext(),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", on_cpu)
    monkeypatch.setattr(gpu_timing, "_FLUSH", 1 << 10)
    clock = Clock("cuda")
    assert clock.buffer.numel() == 1 << 10
    modes = ("forward", "backward", "both", "inference")
    rows = list(gpu_rows.measure(make_work(ours=square), modes, clock, 10.0, rounds=5))
    assert len(rows) == 8
    for row in rows:
        assert row["status"] == "FAILED" and "nan" in row["reason"] and row["median_us"] is None
    replay = capture(prepared(square, make_inputs(), "both"), "cuda")
    timing = clock.in_turns({"a": replay}, rounds=5)["a"]
    assert len(timing.samples) == 5 and timing.median > 0
