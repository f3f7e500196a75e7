"""The environment report and the one place where variables are read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip3o_fast import _ext, env
from blip3o_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent


def test_the_report_names_versions_and_every_backend() -> None:
    report = env.report()
    assert torch.__version__ in report
    for word in ("python", "cpu", "memory", "gpu", "reference", "triton", "cuda", "sdpa", "flash-attn", "xformers"):
        assert re.search(rf"^  {word} ", report, re.MULTILINE), word


def test_the_backend_lines_are_what_the_backends_do() -> None:
    """`works` means that an op really runs there when it is asked for by name, `no` that it refuses."""
    from blip3o_fast import ops

    x, weight = torch.randn(2, 3, 16), torch.ones(16)
    for name, state in env.backends().items():
        assert state.startswith(("works", "no: ")), state
        if state.startswith("works") and name in ("reference", "cpu", "triton"):
            with ops.use_backend(name):
                assert ops.rms_norm_modulate(x, weight).shape == x.shape
        elif state.startswith("no"):
            with ops.use_backend(name), pytest.raises(RuntimeError, match="rms_norm_modulate"):
                ops.rms_norm_modulate(x, weight)


def test_the_attention_lines_are_what_the_choices_do() -> None:
    from blip3o_fast import ops

    q = torch.randn(1, 4, 2, 8)
    for name, state in env.attention().items():
        if state == "works":
            with ops.use_attention(name):
                assert ops.flash_attention(q, q, q).shape == q.shape
            continue
        # what is not installed at the door, what cannot run here when it is called
        with pytest.raises((ImportError, RuntimeError), match=name), ops.use_attention(name):
            ops.flash_attention(q, q, q)


def test_a_missing_extension_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "ERROR", "not available: the C++ extension is not built (no such file)")
    assert env.backends()["cpu"] == "no: not available: the C++ extension is not built (no such file)"


def test_the_native_lines_are_what_runs() -> None:
    from blip3o_fast.ops import _cpu

    told = env.native()
    if _ext.C is None:
        assert told == {"none": _ext.ERROR}
        return
    assert set(told) == {"built", "usable", "active", "threads"}
    assert told["built"].split()[0] == told["usable"].split()[0] == "generic"
    assert set(told["usable"].split()) <= set(told["built"].split())
    assert told["active"] == told["usable"].split()[-1]
    with _cpu.use_isa("generic"):
        assert env.native()["active"] == "generic"
    threads, pool = told["threads"].split(", of ")
    assert int(threads) == torch.get_num_threads()
    assert pool == "std::thread" or Path(pool).name.startswith(("libgomp", "libomp", "libiomp"))


def test_without_the_extension_the_native_lines_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "C", None)
    monkeypatch.setattr(_ext, "ERROR", "not available: the C++ extension is not built (no such file)")
    assert env.native() == {"none": "not available: the C++ extension is not built (no such file)"}


def test_both_ways_to_ask_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "blip3o_fast.env"], capture_output=True, text=True, check=True)
    assert main(["env"]) == 0
    mine = capsys.readouterr().out

    def stable(text: str) -> list[str]:
        """Without what may change between the two: the variables of the test run, a commit made meanwhile."""
        return [line for line in text.split("environment variables")[0].splitlines() if "  version " not in line]

    assert stable(done.stdout) == stable(mine)


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_show")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_do_not_show")
    assert "do_not_show" not in env.report()


def test_read_takes_documented_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert env.read("WANDB_MODE") == "offline"
    monkeypatch.setenv("WANDB_MODE", "")
    assert env.read("WANDB_MODE") is None
    with pytest.raises(AssertionError, match="SOME_NAME"):
        env.read("SOME_NAME")


def test_a_child_inherits_everything_but_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_NAME", "kept")
    child = env.inherited(LC_ALL="C")
    assert (child["SOME_NAME"], child["LC_ALL"]) == ("kept", "C")


def test_every_variable_is_documented() -> None:
    text = (ROOT / "docs" / "environment.md").read_text()
    for name in env.VARIABLES:
        assert f"`{name}`" in text, f"docs/environment.md does not mention {name}"
