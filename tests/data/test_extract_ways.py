"""The ways of extraction: int8, precision, compilation, shares of several processes, speed and the question."""

import io
import math
import os
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from blip3o_fast.data import throughput
from blip3o_fast.data.encoders import Encoder
from blip3o_fast.data.extract import extract
from blip3o_fast.data.images import Picture, Skipped, find_sources, write_tars
from blip3o_fast.data.int8_report import measure
from blip3o_fast.data.preprocessing import Preprocessing
from blip3o_fast.data.ranks import Share, this_share
from blip3o_fast.data.reader import open_conditions
from blip3o_fast.data.shards import EncoderInfo, read_shards
from blip3o_fast.data.stored import quantize, to_float
from blip3o_fast.data.throughput import Progress, flops_per_picture
from blip3o_fast.models.device_flops import peak_of

ROOT = Path(__file__).resolve().parents[2]


def encoder(dim: int) -> Encoder:
    torch.manual_seed(dim)
    preprocess = Preprocessing(32, (127.0,) * 3, (64.0,) * 3, crop=False)
    return Encoder(EncoderInfo(f"side {dim}", dim), preprocess, nn.Conv2d(3, dim, 4, 4), lambda model, x: model(x))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    def png(seed: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)).save(out, "PNG")
        return out.getvalue()

    write_tars((Picture(f"k{i}", "", png(i), ".png") for i in range(12)), tmp_path / "tars", 6)
    return tmp_path / "tars"


def run(tars: Path, out: Path, **options):
    return extract(tars, out, condition_encoder=encoder(6), target_encoder=encoder(5), batch_size=2, **options)


def test_int8_is_within_half_a_step_of_every_token(tars: Path, tmp_path: Path) -> None:
    run(tars, tmp_path / "full")
    result = run(tars, tmp_path / "int8", dtype="int8")
    full, int8 = read_shards(tmp_path / "full"), read_shards(tmp_path / "int8")
    for exact, rounded in ((full.condition, int8.condition), (full.target, int8.target)):
        half_a_step = exact.abs().amax(-1, keepdim=True) / 127 / 2
        assert bool(((rounded - exact).abs() <= half_a_step * (1 + 1e-5)).all()) and not torch.equal(rounded, exact)
    stored = load_file(tmp_path / "int8" / "shard-00000.safetensors")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "eva": (torch.int8, (6, 64, 6)),
        "eva_scale": (torch.float32, (6, 64)),
        "clip": (torch.int8, (6, 64, 5)),
        "clip_scale": (torch.float32, (6, 64)),
    }
    reader = open_conditions(tmp_path / "int8")  # slices of shards are dequantised too
    assert torch.equal(reader.read(4, 9), int8.condition[4:9])
    lines = str(result).splitlines()
    error = float(((int8.condition - full.condition).norm(dim=-1) / full.condition.norm(dim=-1)).mean())
    assert lines[1].startswith(f"int8 condition: {1 - 10 / 24:.0%} fewer bytes than float32, {1 - 10 / 12:.0%} than")
    assert f"error per token {error:.2%}," in lines[1] and "recall@1 100.00%" in lines[1] and "int8 target" in lines[2]


def test_int8_of_zeros_and_its_report(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 3, 4)
    stored, scale = quantize(zeros)
    assert torch.equal(to_float(stored, scale), zeros) and float(scale.abs().max()) == 0
    with pytest.raises(ValueError, match=r"scale: got None; int8 features \(2, 3, 4\) need one scale per token"):
        to_float(stored)
    features = torch.randn(40, 3, 4)
    stored, scale = quantize(features)
    assert measure(features, stored, scale)["recall_at_1"] == 1.0
    found = measure(features, stored.roll(1, 0), scale.roll(1, 0))  # every picture is stored as its neighbour
    assert found["recall_at_1"] == 0.0 and found["neighbours"] < 0.5 and found["error"] > 1


def test_bf16_and_compiled_encoders(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tars, tmp_path / "fp32")
    run(tars, tmp_path / "bf16", precision="bf16")
    exact, rounded = read_shards(tmp_path / "fp32").condition, read_shards(tmp_path / "bf16").condition
    assert torch.equal(rounded, rounded.bfloat16().float())  # the products really are in bf16
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 2**-8
    compiled = []  # the slow test below compiles; importing the compiler alone takes seconds
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    run(tars, tmp_path / "compiled", compile_encoders=True)
    assert len(compiled) == 2 and torch.equal(read_shards(tmp_path / "compiled").condition, exact)


@pytest.mark.slow
def test_really_compiled_encoders(tars: Path, tmp_path: Path) -> None:
    run(tars, tmp_path / "eager")
    run(tars, tmp_path / "compiled", compile_encoders=True)
    a, b = (read_shards(tmp_path / name).condition for name in ("eager", "compiled"))
    assert float((a - b).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, Share(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Share(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Share(0, 1, 0)),  # in a batch script, without srun
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "2"}, Share(3, 4, 2)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9"} | {
            "SLURM_ARRAY_TASK_STEP": "2"}, Share(3, 5, 0)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "2", "RANK": "1", "WORLD_SIZE": "4"}, Share(5, 12, 0)),
    ],
)  # fmt: skip
def test_shares(variables: dict[str, str], share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_share() == share
    items = list(range(30))
    assert sorted(sum((Share(r, share.world).of(items) for r in range(share.world)), [])) == items


def test_a_task_of_datatrove_is_one_process_of_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """datatrove's Slurm executor counts its array in the rank: with the array counted again most tars were nobody's."""
    from types import ModuleType

    for name in ("datatrove", "datatrove.executor", "datatrove.pipeline", "datatrove.pipeline.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("LocalPipelineExecutor", "SlurmPipelineExecutor"):
        setattr(sys.modules["datatrove.executor"], name, object)
    sys.modules["datatrove.pipeline.base"].PipelineStep = object  # type: ignore[attr-defined]
    example = runpy.run_path(str(ROOT / "examples" / "extract_datatrove.py"))
    shares = []
    monkeypatch.setattr("blip3o_fast.data.extract.extract", lambda **settings: shares.append(this_share()))
    for rank in range(4):
        for name, value in {"ID": rank, "MIN": 0, "MAX": 3, "COUNT": 4}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, "")  # so that they are put back
        assert list(example["Extract"]().run(None, rank=rank, world_size=4)) == []
    assert shares == [Share(rank, 4, 0) for rank in range(4)]


def test_bad_shares_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE: the environment has 'two'; a whole number"):
        this_share()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK: got 2 of 2 processes"):
        this_share()


def test_flops_peak_and_the_bar(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a convolution with 4 x 4 patches: 8 x 8 places, dim outputs, 48 products each, 2 operations per product
    assert flops_per_picture((encoder(6), encoder(5))) == 2 * 64 * 48 * (6 + 5)
    peak = peak_of(torch.device("cpu")).flops
    assert peak is not None and 1e8 < peak < 1e14
    run(tars, tmp_path / "out", quiet=False)
    shown = capsys.readouterr().err
    assert "00001.tar (2 of 2)" in shown and "TFLOP/s, MFU" in shown and "images/s" in shown


def test_long_runs_on_a_cpu_are_asked_about(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(throughput, "LONG_HOURS", 0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    with pytest.raises(ValueError, match=r"yes: at this speed .* hours on this CPU; pass --yes \(yes=True\)"):
        run(tars, tmp_path / "out")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(KeyboardInterrupt):
        run(tars, tmp_path / "out")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run(tars, tmp_path / "out").pictures == 12
    monkeypatch.delattr("builtins.input")
    assert run(tars, tmp_path / "yes", yes=True).pictures == 12


def test_the_estimate_counts_pictures_by_bytes(tars: Path) -> None:
    sources = find_sources(tars)
    progress = Progress(sources, None, quiet=True, on_cpu=False, yes=True)
    assert progress.total() is None
    some = list(sources[0].pictures(Skipped()))[:3]
    progress.update(some, 3)
    assert math.isclose(progress.total() or 0, 12, abs_tol=5)
    assert Progress(sources, 2, quiet=True, on_cpu=False, yes=True).total() is None


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", ROOT / "examples" / "slurm" / "extract.sbatch"], check=True)


@pytest.mark.slow
def test_the_slurm_script_on_two_local_processes(tars: Path, tmp_path: Path) -> None:
    """With an `srun` of four lines that starts two processes as the real one would."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        '#!/bin/bash\nshift\nexport SLURM_STEP_NUM_TASKS=2\nSLURM_PROCID=1 "$@" &\nSLURM_PROCID=0 "$@" && wait $!\n'
    )
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    script, out = ROOT / "examples" / "slurm" / "extract.sbatch", tmp_path / "out"
    environment = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    flags = ["--condition_encoder", "efficientnet-lite0", "--target_encoder", "efficientnet-lite0", "--device", "cpu"]
    command = ["bash", str(script), str(tars), str(out), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6 pictures extracted" in done.stdout
    assert read_shards(out).keys == [f"k{i}" for i in range(12)]
