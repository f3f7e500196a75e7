"""The clock's numbers are those of the time that passed, MFU is that of the definition, the slow rank has its name."""

import pytest
import torch

from blip3o_fast.models import device_flops as peak
from blip3o_fast.training import clock as clocks
from blip3o_fast.training.clock import MEASURED, StepClock, StepCost

CPU = torch.device("cpu")


@pytest.fixture
def hand(monkeypatch):
    """A clock that goes when it is told to."""

    class Hand:
        now = 100.0

        def wait(self, seconds):
            self.now += seconds

    hand = Hand()
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: hand.now)
    return hand


def step(clock, hand, data, forward, backward):
    with clock.waiting():
        hand.wait(data)
    with clock.forward():
        hand.wait(forward)
    hand.wait(backward)
    clock.step()


def test_a_window_is_what_passed_in_it(hand):
    clock = StepClock(CPU)
    hand.wait(5)  # before the first step: importing, loading
    clock.start(samples=1000)
    step(clock, hand, 0.25, 1, 2)
    with clock.excluding():
        hand.wait(60)  # an evaluation
    step(clock, hand, 0.5, 1, 2)
    step(clock, hand, 0.75, 3, 4)
    cost = StepCost(tokens=64, flops=10**9, peak=1e11)
    found = clock.read(1000 + 3 * 32, None, cost)
    elapsed = 3.25 + 3.5 + 7.75
    assert found["samples_per_second"] == pytest.approx(96 / elapsed, rel=1e-3)
    assert found["tokens_per_second"] == pytest.approx(64 * 96 / elapsed, rel=1e-3)
    assert found["mfu"] == pytest.approx(96 * 1e9 / elapsed / 1e11, rel=1e-3)
    assert (found["step_seconds"], found["step_seconds_max"]) == (3.5, 7.75)
    assert found["data_wait"] == pytest.approx(1.5 / elapsed, rel=1e-3)
    assert (found["slowest_rank"], found["slowest_rank_seconds"]) == (0, 1.5)  # the median of 1.25, 1.5, 3.75
    assert found["memory_gb"] > 0.01
    assert set(found) == MEASURED - {"seconds"}

    # A new window, from the log on; what was seen before does not count again.
    step(clock, hand, 0, 1, 1)
    assert clock.read(1000 + 4 * 32, None, None)["samples_per_second"] == 16.0


def test_the_slowest_rank_is_the_one_that_the_others_wait_for(hand):
    # In the backward all take equally long: only what a rank does alone tells them apart.
    clock = StepClock(CPU)
    clock.start(0)
    step(clock, hand, 0.5, 1, 2.5)

    def gather(mine):
        assert mine.shape == (1, 5) and mine.dtype == torch.float64
        median, longest, own, waited, memory = mine[0].tolist()
        others = [[median + 1, longest, own + 3, 0.9, memory + 50], [median + 2, longest + 9, own - 1, 0.0, 0.0]]
        return torch.tensor([mine[0].tolist(), *others], dtype=torch.float64)

    found = clock.read(12, gather, StepCost(tokens=2, flops=4, peak=8.0))
    assert (found["slowest_rank"], found["slowest_rank_seconds"]) == (1, 4.5)
    assert (found["step_seconds"], found["step_seconds_max"]) == (5.0, 13.0)
    assert found["data_wait"] == 0.9 and found["memory_gb"] >= 50
    # 3 samples a second of 4 FLOP, on three processes of 8 FLOP/s
    assert found["mfu"] == pytest.approx(3 * 4 / 24, rel=1e-3)


def test_accumulated_forward_passes_belong_to_one_step(hand):
    clock = StepClock(CPU)
    clock.start(0)
    for _ in range(2):
        with clock.forward():
            hand.wait(1)
        hand.wait(2)
    clock.step()
    found = clock.read(8, None, None)
    assert (found["step_seconds"], found["slowest_rank_seconds"]) == (6.0, 2.0)
    assert "mfu" not in found and "tokens_per_second" not in found


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA A10", torch.bfloat16, 125),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch, name, dtype, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak.peak_of(torch.device("cuda"), dtype)
    assert found.flops == tera * 1e12 and name in found.source


def test_tf32_has_a_peak_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak.peak_of(torch.device("cuda")).flops == 495e12


def test_a_cpu_is_measured_once_and_no_random_number_is_drawn(monkeypatch):
    monkeypatch.setattr(peak, "_measured", {})
    monkeypatch.setattr(peak, "_SECONDS", 0.02)
    state = torch.get_rng_state()
    first = peak.peak_of(CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < first.flops < 1e14 and "measured" in first.source
    monkeypatch.setattr(peak, "_measure", lambda *a: pytest.fail("measured again"))
    assert peak.peak_of(CPU) == first
