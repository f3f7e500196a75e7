"""scripts/tune.py in a dry run: what it searches, what it keeps, what it writes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import OPS, WITHOUT_KERNELS, module_of
from benchmarks.gpu_timing import Clock
from blip3o_fast.kernels import _config
from blip3o_fast.kernels._launch import recording

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "tune.py"


@pytest.fixture
def tune():
    spec = importlib.util.spec_from_file_location("tune_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_searches_both_directions(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"80": {"kept": {"1": {"num_warps": 2}}}}))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--only", "layer_norm_modulate", "--output", str(path)],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for direction in ("forward", "backward"):
        for batch in (1, 2):
            assert f"layer_norm_modulate.{direction} width 32 batch {batch}, us by warps: default " in result.stdout
    assert "of 2 launches are faster otherwise" in result.stdout
    table = json.loads(path.read_text())
    assert table["80"] == {"kept": {"1": {"num_warps": 2}}}
    assert set(table) <= {"80", "90"}


def test_choices_reach_the_launch_and_end_with_the_block(tune):
    key, before = ("op.forward", 1792, 90), _config.tuned
    with tune.chosen_by(tune.with_warps(key, 2)) as asked:
        assert _config.launch_config("op.forward", width=1792).num_warps == 2
        assert _config.launch_config("op.backward", width=1792).num_warps == 4
        assert _config.launch_config("op.forward", width=3584).num_warps == 8
    assert asked[0] == key and len(asked) == 3
    assert _config.tuned is before


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_KERNELS])
def test_a_choice_of_each_op_reaches_its_launches(tune, op, mode):
    """Every kernel that is searched is launched as it is told; flow_interpolate has no gradient to tune."""
    sizes = module_of(op).SMALL
    candidates = tune.Candidates(op, mode, 2, sizes, Clock("cpu"), torch.float16)
    keys = candidates.keys()
    assert keys, "there is nothing to choose"
    for key in keys:
        with tune.chosen_by(tune.with_warps(key, 1)), recording() as one:
            candidates._capture()
        with tune.chosen_by(tune.with_warps(key, 16)), recording() as many:
            candidates._capture()
        warps = [(a.options["num_warps"], b.options["num_warps"]) for a, b in zip(one, many, strict=True)]
        assert (1, 16) in warps, key


def test_only_what_is_clearly_faster_at_all_batches_is_kept(tune):
    base = {"default": 1.0}
    assert tune.better([base | {"2": 0.5}, base | {"2": 0.9}]) == ("2", pytest.approx((2 / 0.9) ** 0.5))
    assert tune.better([base | {"2": 0.98}, base | {"2": 0.98}]) is None  # 2 %
    assert tune.better([base | {"2": 0.5}, base]) is None  # wrong or not launched at one batch
    assert tune.better([base | {"2": 0.5}, base | {"2": 2.5}]) is None
    assert tune.better([{"2": 0.5}]) is None and tune.better([]) is None


def test_the_table_is_read_as_it_is_written(tune, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    searched = {("90", "op.forward", "1792"), ("90", "op.backward", "1792")}
    tune.save(path, {"90": {"op.forward": {"1792": {"num_warps": 16}}}}, searched)
    monkeypatch.setattr(_config, "TABLE", path)
    _config._table.cache_clear()
    try:
        assert _config.launch_config("op.forward", width=1792).num_warps == 16
        assert _config.launch_config("op.forward", width=1792, capability=80).num_warps == 4
    finally:
        _config._table.cache_clear()
    tune.save(path, {}, searched)  # searched again, nothing better: the entry goes
    assert json.loads(path.read_text()) == {}
