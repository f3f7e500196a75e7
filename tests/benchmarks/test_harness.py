"""The benchmark harness: order, statistics, what a wrong, broken or missing provider becomes, and the rows."""

import math
import time

import pytest
import torch
from torch import Tensor

from benchmarks import harness, machine, rows, table
from benchmarks.harness import Settings, measure
from benchmarks.work import Absent, Inputs, Work, gold_by, judge_by_contract

QUICK = Settings(min_rounds=3, max_rounds=3, max_time=0.001, min_time=1e-9, warmup=1)


def square(x: Tensor, weight: Tensor) -> Tensor:
    return x * x * weight


def slightly_off(x: Tensor, weight: Tensor) -> Tensor:
    return x * x * weight * 1.0001


def inexact(x: Tensor, weight: Tensor) -> Tensor:
    return x * x * weight * (1 + 16 * torch.finfo(torch.float32).eps)  # right, and worse than twice eager's error


def wrong_gradient(x: Tensor, weight: Tensor) -> Tensor:
    return (x * x * weight).detach() + (x * weight) - (x * weight).detach()


def not_a_number(x: Tensor, weight: Tensor) -> Tensor:
    return x * x * weight * math.nan


def wrong_shape(x: Tensor, weight: Tensor) -> Tensor:
    return (x * x * weight)[:1]


def crashes(x: Tensor, weight: Tensor) -> Tensor:
    raise ZeroDivisionError("no such kernel\nand a long story")


def make_inputs() -> Inputs:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    return Inputs((x, weight), {"x": x, "weight": weight}, torch.randn(4, 6))


def make_work(providers, **changes) -> Work:
    values = {
        "suite": "square",
        "case": {"rows": 4, "dtype": "float32"},
        "inputs": make_inputs,
        "providers": providers,
        "gold": gold_by(square),
        "bytes_moved": {"forward": 1000, "backward": 2000, "both": 3000},
        "flops": {"forward": 48, "backward": 96, "both": 144},
        "rotate": False,
    }
    return Work(**{**values, **changes})


def run(providers, settings=QUICK, **changes):
    """{mode: {provider: row}}"""
    measured = measure(make_work(providers, **changes), settings)
    return {made[0]["mode"]: {row["provider"]: row for row in made} for made, _ in measured}


def test_right_providers_get_a_time_in_every_mode():
    results = run({"eager": square, "ours": lambda x, w: x * (x * w)})
    assert list(results) == ["forward", "backward", "both"]
    for mode, (bytes_moved, flops) in {"forward": (1000, 48), "backward": (2000, 96), "both": (3000, 144)}.items():
        for row in results[mode].values():
            assert row["status"] == "ok" and row["reason"] is None and row["inexact"] is None
            assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert row["rounds"] == 3 and row["calls"] == 1
            assert row["gbps"] == pytest.approx(bytes_moved / row["median_s"] * 1e-9)
            assert row["gflops"] == pytest.approx(flops / row["median_s"] * 1e-9)
            assert set(row["errors"]) == ({"y"} if mode == "forward" else {"y", "dx", "dweight"})
        assert results[mode]["eager"]["speedup"] == 1
        assert results[mode]["ours"]["speedup"] > 0


@pytest.mark.parametrize(
    ("provider", "status", "reason"),
    [
        (slightly_off, "FAILED", "y: relative L2 error 1.0"),
        (inexact, "FAILED", "y: max abs error"),
        (not_a_number, "FAILED", "y: relative L2 error nan"),
        (wrong_shape, "FAILED", r"y: shape (1, 6) instead of (4, 6)"),
        (crashes, "error", "ZeroDivisionError: no such kernel"),
        (Absent("needs a moon"), "absent", "needs a moon"),
    ],
)
def test_a_provider_that_fails_has_a_reason_and_no_time(provider, status, reason):
    results = run({"eager": square, "ours": provider, "other": square}, modes=("forward",))["forward"]
    row = results["ours"]
    assert row["status"] == status
    assert row["reason"].startswith(reason) and "\n" not in row["reason"]
    assert row["median_s"] is row["p20_s"] is row["p80_s"] is row["speedup"] is row["gbps"] is row["gflops"] is None
    for name in ("eager", "other"):  # the others go on
        assert results[name]["status"] == "ok" and results[name]["median_s"] > 0


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("where", ["forward", "gradient"])
def test_a_provider_that_breaks_while_it_is_timed_has_a_row_and_the_others_a_time(mode, where):
    calls = [0]

    def tired(x: Tensor, weight: Tensor) -> Tensor:
        calls[0] += 1
        y = x * x * weight
        if calls[0] > 2 and where == "gradient" and y.requires_grad:
            y.register_hook(lambda gradient: crashes(x, weight))
        elif calls[0] > 2:
            crashes(x, weight)
        return y

    row = run({"eager": square, "ours": tired, "other": square}, modes=(mode,))[mode]
    assert row["ours"]["status"] == "error" and row["ours"]["reason"] == "ZeroDivisionError: no such kernel"
    assert row["ours"]["median_s"] is row["ours"]["speedup"] is None
    for name in ("eager", "other"):
        assert row[name]["status"] == "ok" and row[name]["median_s"] > 0


def test_a_wrong_gradient_fails_where_gradients_are_asked_for():
    results = run({"eager": square, "ours": wrong_gradient})
    assert results["forward"]["ours"]["status"] == "ok"
    for mode in ("backward", "both"):
        assert results[mode]["ours"]["status"] == "FAILED"
        assert results[mode]["ours"]["reason"].startswith("dx: relative L2 error")
        assert results[mode]["ours"]["median_s"] is None


def test_a_peer_that_is_right_but_inexact_is_timed_and_says_so():
    row = run({"eager": square, "compile": inexact}, modes=("forward",))["forward"]["compile"]
    assert row["status"] == "ok" and row["median_s"] > 0
    assert row["inexact"].startswith("y: max abs error")
    assert run({"eager": square, "compile": slightly_off})["forward"]["compile"]["status"] == "FAILED"


def test_nothing_is_proven_by_a_wrong_baseline():
    results = run({"eager": slightly_off, "ours": slightly_off}, modes=("forward",))["forward"]
    assert [row["status"] for row in results.values()] == ["FAILED", "FAILED"]
    results = run({"eager": slightly_off, "ours": square}, modes=("forward",))["forward"]
    assert "first provider itself is off" in results["ours"]["reason"]
    assert results["ours"]["speedup"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_judge_sees_one_more_rounding_but_not_a_bug(dtype):
    torch.manual_seed(1)
    exact = torch.randn(1000, dtype=torch.float64)
    stock = {"y": exact.to(dtype)}
    rounded = {"y": exact.to(dtype)}
    assert judge_by_contract(rounded, stock, {"y": exact}).wrong is None
    assert judge_by_contract(rounded, stock, {"y": exact}).inexact is None
    broken = {"y": (exact * (1 + 20 * torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1))).to(dtype)}
    assert "relative L2" in judge_by_contract(broken, stock, {"y": exact}).wrong


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_providers_are_timed_in_turns(mode):
    calls = []

    def named(name):
        def provider(x: Tensor, weight: Tensor) -> Tensor:
            calls.append(name)
            return x * x * weight

        return provider

    settings = Settings(min_rounds=4, max_rounds=4, max_time=1e-9, min_time=1e-12, warmup=2)
    list(measure(make_work({"A": named("A"), "B": named("B"), "C": named("C")}, modes=(mode,)), settings))
    # one checked call each, 2 rounds of warm-up, 2 to see how long it takes, 4 that count, one for the memory
    assert calls == ["A", "B", "C"] * 10


def test_rounds_and_calls_follow_the_clock():
    ticks = {"slow": 0.1, "fast": 0.001}
    time = [0.0]

    def provider(name):
        def work(x: Tensor, weight: Tensor) -> Tensor:
            time[0] += ticks[name]
            return x * x * weight

        return work

    settings = Settings(min_rounds=5, max_rounds=101, max_time=2.0, min_time=0.01, timer=lambda: time[0])
    work = make_work({"slow": provider("slow"), "fast": provider("fast")}, modes=("forward",))
    ((made, timings),) = measure(work, settings)
    assert timings["slow"].calls == 1 and timings["fast"].calls == 10
    assert len(timings["slow"].samples) == len(timings["fast"].samples) == int(2 * 2.0 / 0.11)
    assert made[0]["median_s"] == pytest.approx(0.1) and made[1]["median_s"] == pytest.approx(0.001)
    assert made[1]["speedup"] == pytest.approx(100)


def samples_of(providers, **settings):
    """{provider: the fastest sample} of five: what others do on this machine only ever adds to a sample."""
    five = Settings(min_rounds=5, max_rounds=5, max_time=1e-9, min_time=1e-9, **settings)
    ((_, timings),) = measure(make_work(providers, modes=("forward",)), five)
    return {name: min(timing.samples) for name, timing in timings.items()}


def test_known_sleeps_are_timed_right():
    def sleeps(seconds):
        def provider(x: Tensor, weight: Tensor) -> Tensor:
            time.sleep(seconds)
            return x * x * weight

        return provider

    found = samples_of({"eager": sleeps(0.08), "ours": sleeps(0.01)})
    assert 0.08 <= found["eager"] < 0.16 and 0.01 <= found["ours"]
    assert 2 < found["eager"] / found["ours"] <= 8.5  # 8, less what waking up takes


@pytest.fixture
def one_thread():
    """A second one waits for its core on a busy machine, spinning, whatever the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_known_copies_are_timed_right(one_thread):
    """By the processor's clock, which stands still while others have the core."""
    source, targets = torch.ones(1 << 23), {"eager": torch.empty(1 << 23), "ours": torch.empty(1 << 20)}

    def copies(target):
        return lambda x, weight: (target.copy_(source[: len(target)]), x * x * weight)[1]

    found = samples_of({name: copies(target) for name, target in targets.items()}, timer=time.process_time)
    assert found["eager"] > 3 * found["ours"]  # eight times as much
    rate = 2 * targets["eager"].nbytes / found["eager"] * 1e-9
    assert 0.2 < rate < 1000  # GB/s: no memory is further off


def test_long_calls_have_no_trial():
    calls = []

    def slow(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(1)
        return square(x, weight)

    settings = Settings(min_rounds=3, max_time=100.0, min_time=0)
    rows = run({"eager": slow}, modes=("forward",), settings=settings)["forward"]
    assert rows["eager"]["rounds"] == 3 and rows["eager"]["calls"] == 1
    assert len(calls) == 1 + 3 + 1  # the check, the rounds, the memory


def test_memory_at_its_height():
    def temporary(x: Tensor, weight: Tensor) -> Tensor:
        return x * x * weight + torch.zeros(1 << 18).sum()

    for mode in ("forward", "both", "backward"):
        rows = run({"eager": square, "ours": temporary}, modes=(mode,))[mode]
        assert 0 < rows["eager"]["peak_bytes"] < 4096
        assert (1 << 20) <= rows["ours"]["peak_bytes"] < (1 << 20) + 4096 or mode == "backward"
        assert rows["ours"]["host_s"] is None  # a GPU's
    failed = run({"eager": square, "ours": crashes}, modes=("forward",))["forward"]["ours"]
    assert failed["peak_bytes"] is None


def test_the_host_is_timed_beside_a_device(monkeypatch):
    """By stand-ins of CUDA: what the host takes is the time until the call returns, without the wait for the device."""
    clock, waits = [0.0], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(clock[0]))
    monkeypatch.setattr(harness, "peak_bytes", lambda call, device: call())

    def queue(state: str) -> int:
        assert state == "prepared"
        clock[0] += 0.25
        return 7

    cuda = torch.device("cuda")
    assert harness._beside(queue, lambda: "prepared", cuda, lambda: clock[0]) == {
        "peak_bytes": 7,
        "host_s": 0.25,
        "device_s": None,  # measured apart, of all providers in turns
    }
    assert len(waits) == 5


def test_whole_work_has_no_gradients_and_counts_items():
    seen = []

    def provider(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x * x * weight

    rows = run({"eager": provider, "ours": crashes}, modes=("whole",), items=(8, "pictures"))["whole"]
    assert not any(seen) and set(rows["eager"]["errors"]) == {"y"}
    assert rows["eager"]["items_per_s"] == pytest.approx(8 / rows["eager"]["median_s"])
    assert rows["eager"]["item"] == "pictures" and rows["ours"]["items_per_s"] is None


def test_inputs_in_rotation_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 10 * (4 * 6 + 6) * 4)
    seen = []

    def provider(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(x.data_ptr())
        return x * x * weight

    settings = Settings(min_rounds=40, max_rounds=40, max_time=1e-9, min_time=1e-12)
    results = run({"eager": provider}, settings, modes=("forward",), rotate=True)
    assert results["forward"]["eager"]["inputs_in_rotation"] == 20
    timed = seen[1:]  # after the check
    assert len(set(timed)) == 20
    assert timed[:20] == timed[20:40]


def test_correctness_alone_times_nothing():
    results = run({"eager": square, "ours": slightly_off}, Settings(timed=False))
    assert results["forward"]["eager"]["status"] == "ok" and results["forward"]["eager"]["median_s"] is None
    assert results["forward"]["ours"]["status"] == "FAILED"


def test_compile_is_absent_without_a_compiler(monkeypatch):
    monkeypatch.setattr(machine, "compiler", lambda: None)
    from benchmarks.work import compiled

    provider = compiled(square)
    assert isinstance(provider, Absent) and "g++" in provider.reason
    assert harness._why_absent(RuntimeError("fatal error: Python.h: No such file")).startswith("torch.compile needs")
    assert harness._why_absent(RuntimeError("something else")) is None


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="modes must be among forward, backward, both, whole, got sideways"):
        list(measure(make_work({"eager": square}, modes=("sideways",)), QUICK))


# ---- rows and table ------------------------------------------------------------------------------------------------


def measured_rows():
    providers = {"eager": square, "ours": slightly_off, "compile": inexact, "peer": Absent("not installed")}
    return [row for made, _ in measure(make_work(providers, details={"eager": "stock"}), QUICK) for row in made]


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "device" / "run.jsonl"
    writer = rows.Writer(path, run="r1")
    made = [*measured_rows(), *run({"eager": square, "ours": not_a_number})["both"].values()]
    for row in made:
        writer.append("time", row)
    assert rows.load(path) == [{"schema": rows.SCHEMA, "kind": "time", "run": "r1", **row} for row in made]
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"schema": 0}', "line 2: row of schema 0, this version reads schema 1"), ("{", "line 2: not")],
)
def test_rows_of_another_schema_are_refused(tmp_path, line, message):
    path = tmp_path / "run.jsonl"
    rows.Writer(path, "r1").append("machine", {})
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        rows.load(path)


def test_table_has_a_line_per_row_and_no_time_where_it_failed():
    made = measured_rows()
    limits = {
        "copy_gbps": 20.0, "copy_probes": 20, "copy_bytes": 2e8, "fma_gflops": 200.0, "fma_gflops_one_core": None,
        "fma_probes": 20, "fma_probe": "test",
    }  # fmt: skip
    text = "\n".join(table.lines(made, limits))
    assert "\033" not in text
    assert text.count("FAILED") == 6 and text.count("inexact  ") == 0  # status and verdict of `ours` in three modes
    for line in text.splitlines():
        if " FAILED" in line and "ours" in line:
            assert " us" not in line and " ms" not in line and "GB" not in line
    assert "compile: right, but beyond the contract: y: max abs error" in text
    assert "peer: not installed" in text
    assert "eager (stock)" in text
    assert "3 of 12 rows are wrong or broken" in text
    assert "copy ceiling  20.0 GB/s" in text and "FMA ceiling   200.0 GFLOP/s" in text
    assert table.RED in "\n".join(table.lines(made, limits, colour=True))
    assert "ours FAILED" in table.progress_line(made[:4]) and "peer absent" in table.progress_line(made[:4])
    right = [row for row in made if row["provider"] != "ours"]
    assert "all 6 rows that ran are correct; 3 rows of absent providers" in "\n".join(table.lines(right, {}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (0.000999951, "1000 us"), (4.2e-6, "4.20 us"), (3e-8, "0.03 us")],
)
def test_seconds_are_readable(value, text):
    assert table.seconds(value) == text


# ---- machine -------------------------------------------------------------------------------------------------------

X86 = """processor\t: 0
model name\t: Example(R) CPU @ 2.60GHz
cpu family\t: 6
model\t\t: 85
stepping\t: 7
flags\t\t: fpu fma avx2 avx512f something
physical id\t: 0
core id\t\t: 0

processor\t: 1
model name\t: Example(R) CPU @ 2.60GHz
physical id\t: 0
core id\t\t: 0
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd bf16 i8mm
"""


def test_cpuinfo_of_x86_arm_and_nothing(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(X86)
    assert machine.cpuinfo(path) == {
        "model": "Example(R) CPU @ 2.60GHz",
        "family_model_stepping": "6/85/7",
        "flags": ["avx2", "fma", "avx512f"],
        "physical_cores": 1,
    }
    path.write_text(ARM)
    assert machine.cpuinfo(path)["flags"] == ["asimd", "bf16", "i8mm"]
    nowhere = machine.cpuinfo(tmp_path / "nothing")
    assert nowhere["flags"] == [] and nowhere["physical_cores"] is None and nowhere["model"]


def test_slug_and_cache(tmp_path):
    cpu = {"model": "Example(R) CPU Gold @ 2.60GHz"}
    assert machine.slug({"cpu": cpu, "threads": 2}) == "example-gold-2t"
    assert machine.slug({"cpu": cpu, "threads": 2, "gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"
    for index, size in enumerate(("32K", "1024K", "3M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert machine.cache_bytes(tmp_path) == 3 << 20
    assert machine.cache_bytes(tmp_path / "nothing") == machine.DEFAULT_CACHE


def test_stamp_says_what_it_ran_on():
    stamp = machine.stamp()
    assert stamp["threads"] == torch.get_num_threads()
    assert stamp["versions"]["torch"] == torch.__version__
    assert set(stamp["versions"]) >= {"python", "torch", "triton", "diffusers", "blip3o_fast"}
    assert "\n".join(table.header(stamp)).count("\n") >= 3


@pytest.mark.parametrize("compiler", [True, False], ids=["C probe", "no C compiler"])
def test_ceilings_are_the_best_of_twenty_probes(monkeypatch, compiler):
    if not compiler:
        monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    elif machine.build_fma_probe() is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)
    monkeypatch.setattr(machine.Ceilings, "MIN_COPY", 1 << 20)
    before = machine.affinity()
    ceilings = machine.Ceilings()
    ceilings.fma()
    limits = ceilings.finish()
    assert machine.affinity() == before  # the pinning does not outlive the probe
    assert limits["fma_probes"] == limits["copy_probes"] == 20
    assert limits["fma_gflops"] == max(ceilings.fma_all) > 0 and limits["copy_gbps"] == max(ceilings.copies) > 0
    assert limits["fma_probe"].startswith("C loop" if compiler else "torch.mm")
    assert ceilings.finish() == limits
