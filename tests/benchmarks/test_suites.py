"""The command, on a small benchmark file of the test's own; and the real files with small sizes, without timing."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.normalization import RMSNorm

from benchmarks import __main__ as command
from benchmarks import model_block, rows
from benchmarks.harness import Settings, measure
from benchmarks.ops import rms_norm_modulate
from benchmarks.work import Absent, Inputs, Work
from blip3o_fast.models import BLIP3oConfig
from blip3o_fast.testing import relative_l2

ROOT = Path(__file__).resolve().parents[2]

FILE = '''
"""A file of the test's own."""
import pytest, torch
from benchmarks.work import Absent, Inputs, Work, gold_by

def square(x):
    return x * x

def wrong(x):
    return x * x + 0.001

def crashes(x):
    raise RuntimeError("boom")

@pytest.mark.parametrize("name", NAMES)
def bench_square(compare, bench_device, name):
    if name == "interrupt":
        raise KeyboardInterrupt
    def inputs():
        x = torch.randn(8, 8, requires_grad=True)
        return Inputs((x,), {"x": x}, torch.randn(8, 8))
    providers = {"eager": square, "ours": {"right": square, "wrong": wrong, "crashes": crashes}[name]}
    compare(Work(
        suite="square", case={"name": name}, inputs=inputs, providers={**providers, "peer": Absent("not here")},
        gold=gold_by(square), bytes_moved={"forward": 512}, flops={"forward": 64}, modes=("forward", "both"),
    ))
'''


def bench(tmp_path: Path, names: list[str], *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    path = tmp_path / "square_file.py"
    path.write_text(FILE.replace("NAMES", repr(names)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # xdist's would disable timing
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--file", str(path), "--rounds", "3", "--seconds", "0.01"]
        + ["--results", str(tmp_path / "results"), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    files = list((tmp_path / "results").rglob("*.jsonl"))
    return result, rows.load(files[0]) if files else []


def test_right_providers_exit_zero_with_table_rows_and_pytest_benchmarks_json(tmp_path):
    saved = tmp_path / "saved.json"
    result, made = bench(tmp_path, ["right"], "--", f"--benchmark-json={saved}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["kind"] for row in made] == ["machine", *["time"] * 6, "ceilings"]
    assert made[0]["commit"] and made[0]["cpu"]["model"] and made[-1]["fma_probes"] >= 20
    assert len({row["run"] for row in made}) == 1
    timed = [row for row in made if row["kind"] == "time"]
    assert [(r["mode"], r["provider"], r["status"]) for r in timed] == [
        (mode, provider, "absent" if provider == "peer" else "ok")
        for mode in ("forward", "both")
        for provider in ("eager", "ours", "peer")
    ]
    assert "all 4 rows that ran are correct; 2 rows of absent providers" in result.stdout
    assert "peer: not here" in result.stdout and "\033" not in result.stdout
    # pytest-benchmark holds the very same samples
    entries = {(b["extra_info"]["mode"], b["name"]): b for b in json.loads(saved.read_text())["benchmarks"]}
    assert set(entries) == {(mode, name) for mode in ("forward", "both") for name in ("eager", "ours")}
    for row in timed:
        if row["status"] == "ok":
            stats = entries[row["mode"], row["provider"]]["stats"]
            assert stats["median"] == pytest.approx(row["median_s"], rel=1e-9)
            assert stats["rounds"] == row["rounds"] and stats["iterations"] == row["calls"]


def test_a_wrong_provider_prints_failed_and_exits_non_zero(tmp_path):
    result, made = bench(tmp_path, ["wrong", "crashes", "right"])
    assert result.returncode == 1, result.stdout + result.stderr
    states = {(r["case"]["name"], r["mode"], r["provider"]): r for r in made if r["kind"] == "time"}
    assert len(states) == 3 * 2 * 3  # the run went on
    for mode in ("forward", "both"):
        assert states["wrong", mode, "ours"]["status"] == "FAILED"
        assert states["wrong", mode, "ours"]["median_s"] is None
        assert states["crashes", mode, "ours"]["status"] == "error"
        assert states["right", mode, "ours"]["status"] == "ok"
    assert "FAILED: y: relative L2 error" in result.stdout
    assert "4 of 18 rows are wrong or broken" in result.stdout


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    result, made = bench(tmp_path, ["right", "interrupt", "wrong"])
    assert result.returncode == 2
    assert [row["kind"] for row in made] == ["machine", *["time"] * 6, "ceilings"]
    assert "all 4 rows that ran are correct" in result.stdout


def test_list_and_bad_arguments(capsys):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "rms_norm_modulate" in listed and "model_block" in listed
    for arguments, message in (
        (["--op", "rms_norm"], "no benchmark 'rms_norm'; there are: rms_norm_modulate, model_block"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
        (["--seconds", "0"], "must be above 0, got 0.0"),
        (["--file", "nothing.py"], "nothing.py is not a file"),
    ):
        with pytest.raises(SystemExit) as error:
            command.main(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_sets_name_files_that_exist():
    assert set(command.QUICK) <= set(command.suites())
    quick = command.selected(command.parse(["--set", "quick"]))
    assert [path.stem for path in quick] == list(command.QUICK)
    assert set(quick) <= set(command.selected(command.parse(["--set", "full"])))
    assert command.parse(["--op", "model_block", "--", "-x", "--op"]).pytest == ["-x", "--op"]


# ---- the real files ------------------------------------------------------------------------------------------------


def check(works: list[Work], **expected: str) -> None:
    """Every provider but torch.compile, which takes long and is not ours, gives the right values."""
    for work in works:
        providers = {name: p for name, p in work.providers.items() if name != "compile"}
        assert not any(isinstance(p, Absent) for p in providers.values())
        work = Work(**{**vars(work), "providers": providers})
        for made, _ in measure(work, Settings(timed=False)):
            for row in made:
                assert row["status"] == "ok", row
                assert row["bytes"] > 0 and row["flops"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_modulate(monkeypatch, dtype):
    monkeypatch.setattr(rms_norm_modulate, "WIDTH", 96)
    works: list[Work] = []
    rms_norm_modulate.bench_rms_norm_modulate(works.append, "cpu", 2, dtype)
    check(works)
    given = works[0].inputs()
    x, weight, scale = given.args
    # read once, written once: exactly the tensors of the call
    forward = sum(t.numel() for t in (x, weight, scale, given.upstream)) * dtype.itemsize
    assert rms_norm_modulate.bytes_moved(2, dtype.itemsize)["forward"] == forward
    backward = forward + sum(t.numel() for t in (x, weight, scale)) * dtype.itemsize + 4 * 2 * 64
    assert rms_norm_modulate.bytes_moved(2, dtype.itemsize)["backward"] == backward


def test_rms_norm_modulate_eager_is_diffusers(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, scale = torch.randn(2, 5, 48).to(dtype), torch.randn(48).to(dtype), torch.randn(2, 48).to(dtype)
        norm = RMSNorm(48, eps=1e-5).to(dtype)
        norm.load_state_dict({"weight": weight})
        expected = norm(x) * (1 + scale[:, None])
        assert torch.equal(rms_norm_modulate.eager(x, weight, scale), expected)


def test_model_block(monkeypatch):
    config = BLIP3oConfig.preset("tiny", num_layers=1)
    monkeypatch.setattr(model_block, "BLIP3oConfig", lambda num_layers: config)
    works: list[Work] = []
    model_block.bench_model_block(works.append, "cpu", 2)
    check(works)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        given = works[0].inputs()
        works[0].providers["eager"](*given.args)
    # torch's counter sees the GEMMs; on a CPU it may not know its fused attention
    attention = 4 * 2 * config.num_tokens * config.hidden_size * (config.num_tokens + model_block.CONTEXT_TOKENS)
    expected = model_block.flops(config, 2)["forward"]
    assert counter.get_total_flops() in (expected, expected - attention)


def test_model_blocks_gold_is_stocks_sequence_in_fp64(monkeypatch):
    config = BLIP3oConfig.preset("tiny", num_layers=1)
    block = model_block.make_block(config, torch.Generator().manual_seed(0))
    shapes = ((2, config.num_tokens, config.hidden_size), (2, 64, config.context_dim), (2, config.conditioning_dim))
    args = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    wrt = {**dict(zip(model_block.GRADIENTS_BY_CONTRACT, args, strict=True)), **dict(block.named_parameters())}
    given = Inputs(args, wrt, torch.randn(shapes[0]))
    gold = model_block.exact(block, config, given, "cpu")
    assert set(gold) == {"y", *(f"d{name}" for name in wrt)}
    assert {value.dtype for value in gold.values()} == {torch.float64}
    # our forward in fp64 agrees to fp64: nothing in the gold was rounded to fp32 on its way
    ours = model_block.our_provider(copy.deepcopy(block).double(), config, "cpu")(*(arg.double() for arg in args))
    assert relative_l2(ours, gold["y"]) <= 1e-12

    def broken(*args):
        raise AssertionError("the gold leans on what it judges")

    monkeypatch.setattr(type(block), "forward", broken)
    assert torch.equal(model_block.exact(block, config, given, "cpu")["y"], gold["y"])
