"""The CPU engine's benchmarks with small sizes, without timing, and the goals that are read off their rows."""

import dataclasses

import pytest
import torch

from benchmarks import cpu_block, cpu_goals, sampling_run, storage_quality, table
from benchmarks.harness import Settings, measure
from benchmarks.ops import packed_linear
from benchmarks.work import Absent, Work
from blip3o_fast import _ext
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT

needs_extension = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")
DTYPES = [torch.float32, torch.bfloat16]


def status(work: Work) -> dict[str, str]:
    return {row["provider"]: row["status"] for rows, _ in measure(work, Settings(timed=False)) for row in rows}


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_checked_in_every_storage(monkeypatch, dtype):
    monkeypatch.setattr(packed_linear, "PRODUCTS", {"small": (48, 96)})
    monkeypatch.setattr(packed_linear.machine, "cache_bytes", lambda: 1 << 16)
    work = packed_linear.work(8, "small", dtype)
    found = status(work)
    assert set(found) == {"eager", "onednn", "bf16", "int8", *(["fp32"] if dtype == torch.float32 else [])}
    assert all(value == "ok" for name, value in found.items() if name != "onednn")
    wrong = dataclasses.replace(work, providers={**work.providers, "bf16": lambda x: 1.1 * work.providers["eager"](x)})
    assert status(wrong)["bf16"] == "FAILED"


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_is_checked_in_every_storage(dtype):
    work = cpu_block.work(2, dtype, BLIP3oConfig.preset("tiny"))
    left_out = {name: Absent("takes long") for name in ("compile", "frozen")}
    found = status(dataclasses.replace(work, providers={**work.providers, **left_out}))
    assert {name for name, value in found.items() if value != "ok"} == set(left_out)
    assert {"eager", "ours", "fp32", "bf16", "int8"} <= set(found)


def row(suite: str, provider: str, speedup: float, **fields: object) -> dict[str, object]:
    given = {"suite": suite, "provider": provider, "speedup": speedup, "mode": "forward", "status": "ok"}
    return {**given, "median_s": 1e-3 / speedup, "gflops": 100.0, "detail": None, "case": {}, **fields}


def test_goals_are_ratios_of_one_case():
    case = {"dtype": "float32", "batch": 1}
    rows = [row("cpu_block", name, gain, case=case) for name, gain in (("eager", 1), ("frozen", 2), ("fp32", 3.3))]
    found = {goal.what: goal for goal in cpu_goals.goals(rows, {}, "avx512")}
    assert found["block, float32, batch 1: fp32 over eager"].met is True
    assert found["block, float32, batch 1: fp32 over frozen"].reached == pytest.approx(1.65)
    assert found["block, float32, batch 4: fp32 over eager"].met is None
    bounded = cpu_goals.goals(rows, {"fma_gflops": 500.0}, "avx512")[0]
    assert bounded.bound == pytest.approx(5)  # all of them do 100
    assert "(at the FMA ceiling: 5.00)" in "".join(cpu_goals.lines(rows, {"fma_gflops": 500.0}, "avx512"))
    assert not list(cpu_goals.lines([row("swiglu", "ours", 3, case=case)], {}, "avx512"))
    assert list(cpu_goals.lines(rows, {}, "avx512"))[-1] == "  2 of 2 reached"


def test_more_than_the_ceiling_is_impossible():
    limits = {"fma_gflops": 90.0, "bf16_gflops": 180.0}
    cases = [{"dtype": "float32"}, {"dtype": "bfloat16"}]
    rows = [row("packed_linear", name, 1, case=case) for case in cases for name in ("fp32", "int8")]
    (claim,) = table.impossible(rows, limits)  # of the fp32 product alone: 8 bits have no ceiling
    assert "float32" in claim and claim.endswith("fp32: 100.0 of 90.0 GFLOP/s")


@needs_extension
def test_storages_are_judged_side_by_side(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    condition, target = (torch.randn(30, 16, width, generator=generator) for width in (10, 4))
    names = [str(i) for i in range(30)]
    meta = Meta(EncoderInfo("c", 10), EncoderInfo("t", 4), tokens=16)
    ShardWriter(tmp_path / "embeddings", meta).write(0, condition, target, names, names, "made up")
    config = BLIP3oConfig.preset("tiny", in_channels=4, cross_attention_dim=10, sample_size=4)
    model = BLIP3oDiT(config, generator=generator)
    with torch.no_grad():
        model.norm_out.linear_2.weight.normal_(generator=generator)  # untrained it answers zero
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--embeddings_path", str(tmp_path / "embeddings")]
    assert storage_quality.main([*arguments, "--rounds", "1", "--eval_split", "0.2"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[3:]}
    forward, sampled = ({name: float(row[i]) for name, row in rows.items()} for i in (1, 2))
    for distance in (forward, sampled):
        assert 0 == distance["fp32"] < distance["bf16"] < distance["int8"] < 0.2
    with pytest.raises(SystemExit):
        storage_quality.main([*arguments, "--rounds", "0"])


@needs_extension
@pytest.mark.filterwarnings("ignore:hidden_size 64 is narrower")
def test_sampling_runs_give_the_same_samples(capsys):
    arguments = ["--layers", "2", "--width", "64", "--steps", "2", "--rounds", "1"]
    assert sampling_run.main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    distance = {tuple(line[:2]): float(line[line.index("distance") + 1]) for line in lines}
    sides = ("stock", "call", "sample", "Sampler")
    assert set(distance) == {(dtype, side) for dtype in ("fp32", "bf16") for side in sides}
    assert distance["fp32", "stock"] == 0 < distance["fp32", "Sampler"] < 1e-4
    assert max(distance["bf16", "sample"], distance["bf16", "Sampler"]) <= 2 * distance["bf16", "stock"]
    with pytest.raises(SystemExit):
        sampling_run.main(["--width", "100"])
