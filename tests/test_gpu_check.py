"""scripts/gpu_check.py in a dry run: the whole logic on a CPU, for one op."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def run(path: Path, *arguments: str) -> tuple["subprocess.CompletedProcess[str]", dict]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--output", str(path), *arguments],
        cwd=path.parent, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return result, json.loads(path.read_text()) if path.is_file() else {}


def script():
    spec = importlib.util.spec_from_file_location("gpu_check_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_tests_and_times_one_op(tmp_path):
    result, data = run(tmp_path / "out.json", "--only", "ode_step", "--commit", "abc")
    assert result.returncode == 0, result.stdout + result.stderr
    assert data["kind"] == "gpu-check" and data["commit"] == "abc" and data["finished"] and data["copy_gbps"] > 0
    tests = data["tests"]
    assert tests["ok"] and tests["finished"] and tests["passed"] > 20 and not tests["failed"]
    assert {row["outcome"] for row in tests["problems"]} == {"skipped"}  # streams
    assert all("CUDA itself" in row["reason"] for row in tests["problems"])
    rows = [row for row in data["rows"] if row["provider"] == "ours"]
    expected = {(dtype, mode) for dtype in ("float32", "float16") for mode in ("forward", "backward")}
    assert {(row["case"]["dtype"], row["mode"]) for row in rows} == expected
    assert all(row["status"] == "ok" and row["median_us"] > 0 and row["detail"] == "triton" for row in rows)
    assert f"tests: {tests['passed']} passed" in result.stdout and "ode_step" in result.stdout
    assert not list(tmp_path.glob("*.part"))


def test_what_does_not_fit_into_the_time_is_named(tmp_path):
    result, data = run(tmp_path / "out.json", "--only", "ode_step", "--skip-tests", "--budget", "0.001")
    assert result.returncode == 0, result.stdout + result.stderr
    assert data["rows"] == [] and data["tests"] is None
    assert data["left_out"] == ["times of ode_step batch 2 float32", "times of ode_step batch 2 float16"]
    assert "left out: times of ode_step batch 2 float16" in result.stdout


def test_tests_that_are_cut_off_are_no_success():
    made = script()
    result = made.run_tests(made.parse(["--dry-run", "--only", "ode_step"]), seconds=0.5)
    assert not result["ok"] and not result["finished"] and result["exit_status"] != 0


@pytest.mark.parametrize(
    ("status", "provider", "bad"),
    [
        ("ok", "ours", False),
        ("FAILED", "ours", True),
        ("FAILED", "compile", True),
        ("error", "eager", True),
        ("error", "compile", False),
        ("absent", "xformers", False),
    ],
)
def test_which_rows_fail_the_run(status, provider, bad):
    assert bool(script().bad_rows([{"status": status, "provider": provider}])) is bad


def test_without_a_device_it_says_so(monkeypatch, capsys):
    import torch

    made = script()
    monkeypatch.setattr(made, "install", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert made.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().out


def test_a_case_that_cannot_be_made_is_a_row(tmp_path):
    made, options = script(), script().parse(["--dry-run"])
    report = made.Report(tmp_path / "out.json", {})

    def broken():
        raise MemoryError("too large\nand a long story")

    clock = type("Clock", (), {"device": "cpu"})
    made.measure_into(report, "swiglu", broken, ("forward", "backward"), clock, options)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["status"] == "error" and row["reason"] == "MemoryError: too large"
    assert made.bad_rows([row])
