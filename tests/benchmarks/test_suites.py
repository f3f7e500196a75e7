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
from benchmarks import cases, model_block, model_forward, model_step, rows
from benchmarks.cases import OPS, module_of
from benchmarks.harness import Settings, measure
from benchmarks.ops import flow_interpolate, rms_norm_modulate
from benchmarks.work import Absent, Inputs, Work
from blip3o_fast.models import BLIP3oConfig
from blip3o_fast.ops._philox import normal_noise
from blip3o_fast.testing import relative_l2

ROOT = Path(__file__).resolve().parents[2]

FILE = '''
"""A file of the test's own."""
import os, signal, time
import pytest, torch
from benchmarks.work import Absent, Inputs, Work, gold_by

def square(x):
    return x * x

def wrong(x):
    return x * x + 0.001

def crashes(x):
    raise RuntimeError("boom")

def interrupted(x):
    if torch.is_grad_enabled():  # its forward is measured by then
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
        time.sleep(60)
    return x * x

@pytest.mark.parametrize("name", NAMES)
def bench_square(compare, bench_device, name):
    if name == "unmade":
        raise RuntimeError("cannot be made")
    def inputs():
        x = torch.randn(8, 8, requires_grad=True)
        return Inputs((x,), {"x": x}, torch.randn(8, 8))
    providers = {"eager": square, "ours": globals().get(name, square)}
    compare(Work(
        suite="square", case={"name": name}, inputs=inputs, providers={**providers, "peer": Absent("not here")},
        gold=gold_by(square), bytes_moved={"forward": 512}, flops={"forward": 64}, modes=("forward", "both"),
    ))
'''


def bench(
    tmp_path: Path, names: list[str], *arguments: str, report: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    path = tmp_path / "square_file.py"
    path.write_text(FILE.replace("NAMES", repr(names)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # xdist's would disable timing
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--file", str(path), "--rounds", "3", "--seconds", "0.01"]
        + ["--results", str(tmp_path / "results"), *([] if report else ["--no-report"]), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    files = list((tmp_path / "results").rglob("*.jsonl"))
    return result, rows.load(files[0]) if files else []


def test_right_providers_exit_zero_with_table_rows_and_pytest_benchmarks_json(tmp_path):
    saved = tmp_path / "saved.json"
    result, made = bench(tmp_path, ["right"], "--", f"--benchmark-json={saved}", report=True)
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
    (page,) = (tmp_path / "results").rglob("report.html")
    assert page.parent.name == made[0]["run"] and f"report: {os.path.relpath(page, ROOT)}" in result.stdout
    assert "left out: breakdown: needs the suites cpu_block" in result.stdout
    # pytest-benchmark holds the very same samples
    entries = {(b["extra_info"]["mode"], b["name"]): b for b in json.loads(saved.read_text())["benchmarks"]}
    assert set(entries) == {(mode, name) for mode in ("forward", "both") for name in ("eager", "ours")}
    for row in timed:
        if row["status"] == "ok":
            stats = entries[row["mode"], row["provider"]]["stats"]
            assert stats["median"] == pytest.approx(row["median_s"], rel=1e-9)
            assert stats["rounds"] == row["rounds"] and stats["iterations"] == row["calls"]


def test_a_wrong_provider_prints_failed_and_exits_non_zero(tmp_path):
    result, made = bench(tmp_path, ["unmade", "wrong", "crashes", "right"], report=True)
    assert result.returncode == 1, result.stdout + result.stderr
    states = {(r["case"]["name"], r["mode"], r["provider"]): r for r in made if r["kind"] == "time"}
    assert len(states) == 3 * 2 * 3 + 1  # the run went on
    unmade, timed = states["unmade", "case", "all"], states["right", "both", "ours"]
    assert unmade["status"] == "error" and unmade["reason"] == "RuntimeError: cannot be made"
    assert unmade.keys() == timed.keys()
    (page,) = tmp_path.rglob("report.html")
    assert "RuntimeError: cannot be made" in page.read_text()
    for mode in ("forward", "both"):
        assert states["wrong", mode, "ours"]["status"] == "FAILED"
        assert states["wrong", mode, "ours"]["median_s"] is None
        assert states["crashes", mode, "ours"]["status"] == "error"
        assert states["right", mode, "ours"]["status"] == "ok"
    assert "FAILED: y: relative L2 error" in result.stdout
    assert "5 of 19 rows are wrong or broken" in result.stdout


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    """By the signal itself, in the middle of a case: the modes that were done are in the file, and it is named."""
    result, made = bench(tmp_path, ["right", "interrupted", "wrong"], report=True)
    assert result.returncode == 2
    assert [row["kind"] for row in made] == ["machine", *["time"] * 9, "ceilings"]
    assert [(r["case"]["name"], r["mode"]) for r in made[7:10]] == [("interrupted", "forward")] * 3
    assert "all 6 rows that ran are correct" in result.stdout
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    told = (
        f"interrupted: the 9 rows measured so far are there; python -m benchmarks.report {os.path.relpath(path, ROOT)}"
    )
    assert told in result.stdout
    assert not list(tmp_path.rglob("report.html"))


def test_a_file_of_long_cases_says_how_to_run_them():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "benchmarks", "--op", "compile_time", "--no-save"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 5 and "--set full" in result.stdout


def test_list_and_bad_arguments(capsys):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "rms_norm_modulate" in listed and "model_block" in listed
    for arguments, message in (
        (["--op", "rms_norm"], "no benchmark 'rms_norm'; there are: dual_attention, "),
        (["--set", "ful"], "argument --set: invalid choice: 'ful' (choose from"),
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
        missing = {name for name, p in work.providers.items() if isinstance(p, Absent)}
        assert missing <= work.peers  # what others made need not be installed
        providers = {
            name: p for name, p in work.providers.items() if name not in missing and not name.startswith("compile")
        }
        work = Work(**{**vars(work), "providers": providers})
        for made, _ in measure(work, Settings(timed=False)):
            for row in made:
                assert row["status"] == "ok", row
                assert row["bytes"] > 0 and row["flops"] > 0


VARIANTS = [
    *((op, {}) for op in OPS),
    ("flash_attention", {"masked": True}),
    ("dual_attention", {"masked": True}),
    ("flow_interpolate", {"seeded": True}),
    ("flow_matching_loss", {"seeded": True}),
    ("ode_step", {"guided": False}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "more"), VARIANTS, ids=str)
def test_op(op, more, dtype):
    module = module_of(op)
    work = cases.work(module.case, 2, dtype, "cpu", compile=False, **module.SMALL, **more)
    check([work])
    # read once, written once: what the call is given and what it answers, in the forward
    case = module.case(2, dtype, "cpu", **module.SMALL, **more)
    tensors = [t for t in case.inputs.values() if t is not None]
    tensors += {"flow_matching_loss": [], "qk_norm_rope": []}.get(op, list(case.upstream))
    read = {"qk_norm_rope": ["rope"], "flow_matching_loss": ["data", *([] if more else ["noise"])]}.get(op, [])
    tensors += [case.given[name] for name in read]
    expected = sum(t.numel() * t.element_size() for t in tensors)
    expected += case.upstream[0].numel() * dtype.itemsize if op == "qk_norm_rope" else 0
    expected += 4 * 2 if op == "flow_interpolate" else 0  # sigma
    assert case.bytes_moved["forward"] == expected


def test_every_op_has_a_benchmark():
    names = {p.stem for p in (ROOT / "blip3o_fast" / "ops").glob("*.py") if not p.stem.startswith("_")}
    # packed_linear has no gradients: its file describes its work without a `Case`
    assert (
        {*OPS, "packed_linear"}
        == names - {"rope_table"}
        == {p.stem for p in (ROOT / "benchmarks" / "ops").glob("*.py")}
    )


def test_a_wrong_op_breaks_the_contract(monkeypatch):
    """Both kinds of judgement can fail: by the contract, and of a sum."""
    for op, message in (("swiglu", "error"), ("flow_matching_loss", "y: max abs error")):
        module = module_of(op)
        case = module.case(2, torch.float32, **module.SMALL)
        cases.assert_case(case)
        with pytest.raises(AssertionError, match=message):
            cases.assert_case(case, ours=lambda case=case, **inputs: 1.001 * case.bound(case.ours)(**inputs))


def test_the_judge_of_sums():
    work = cases.work(module_of("flow_matching_loss").case, 2, torch.bfloat16, "cpu", compile=False, tokens=4, width=8)
    gold = {"y": torch.tensor(1.5).double(), "dpred": torch.randn(3).double()}
    stock = {"y": torch.tensor(1.5 + 1e-5), "dpred": gold["dpred"].bfloat16()}
    assert work.judge(stock, stock, gold).inexact is work.judge(stock, stock, gold).wrong is None
    for change, kind in ((1e-6, None), (1e-4, "inexact"), (0.1, "wrong"), (torch.nan, "wrong")):
        verdict = work.judge(stock | {"y": torch.tensor(1.5 + change)}, stock, gold)
        assert (verdict.wrong is not None) == (kind == "wrong"), change
        assert (verdict.inexact is not None) == (kind == "inexact"), change
    assert work.judge(stock | {"dpred": 2 * stock["dpred"]}, stock, gold).wrong.startswith("dpred")


def test_exact_noise_is_the_noise():
    seed = torch.tensor([5, 17])
    for shape in ((3, 5, 7), (0, 4, 4), (2, 64)):
        exact = flow_interpolate.exact_noise(seed, shape)
        assert exact.dtype == torch.float64 and exact.shape == shape
        torch.testing.assert_close(exact, normal_noise(seed, shape).double(), rtol=0, atol=2e-6)


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


def test_model_step():
    config = BLIP3oConfig.preset("tiny")
    for dtype in (torch.float32, torch.bfloat16):
        work = model_step.work(2, dtype, "cpu", config, compile=False)
        assert "ours, condition prepared" in work.providers
        check([work])


TINY = {"hidden_size": 64, "in_channels": 4, "num_attention_heads": 4, "num_kv_heads": 2, "cross_attention_dim": 24}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", ["blip3o", "lumina"])
def test_model_forward(size, training):
    """Every provider is right by fp64 stock, over the same parameters; successive calls differ in the rotary table."""
    work = model_forward.work(
        size, 1, torch.bfloat16, training=training, **TINY, multiple_of=32, sample_size=8, context=6
    )
    check([work])
    tables = [work.inputs().args[4] for _ in range(2)]
    assert tables[0].shape == tables[1].shape and not torch.equal(*tables)
    stock, fused = (dict(work.providers[name].named_parameters()) for name in ("eager", "fused"))
    assert stock.keys() == fused.keys()
    assert all(stock[name] is fused[name] for name in stock)


def test_model_forward_has_luminas_own_sizes():
    """`lumina` is diffusers' class by its defaults, but for the key heads, which it cannot do without."""
    import inspect

    from diffusers import LuminaNextDiT2DModel

    defaults = {n: p.default for n, p in inspect.signature(LuminaNextDiT2DModel.__init__).parameters.items()}
    for name, value in model_forward.SIZES["lumina"].items():
        if name not in ("num_kv_heads", "context", "context_projection"):
            assert value == defaults[name], name


def test_model_block_in_half_precision():
    config = BLIP3oConfig.preset("tiny", num_layers=1)
    work = model_block.work(2, torch.bfloat16, "cpu", config, compile=False)
    check([work])
    given = work.inputs()
    gold = work.gold(given)
    stock = {name: value.bfloat16() for name, value in gold.items()}
    for name in ("y", "dgate", "dattn1.to_q.weight"):
        broken = stock | {name: (1.2 * gold[name]).bfloat16()}
        assert work.judge(stock, stock, gold).inexact is None
        assert work.judge(broken, stock, gold).inexact.startswith(f"{name}: |value - gold|")


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
