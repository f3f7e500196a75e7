"""Misuse of the extension is a Python exception: no call crashes the process or writes beside its outputs.

The calls are made by fuzz_kernels.py, in processes of their own and without torch.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_fast import _ext

FUZZ = Path(__file__).with_name("fuzz_kernels.py")


def fuzz(examples: int) -> str:
    if _ext.C is None:
        pytest.skip(_ext.ERROR)
    done = subprocess.run(
        [sys.executable, FUZZ, _ext.C.__file__, str(examples)], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_any_call_runs_or_raises() -> None:
    report = fuzz(200)
    for name in _ext.C.signatures:
        assert f"{name}: fine" in report


@pytest.mark.slow
def test_any_call_runs_or_raises_thoroughly() -> None:
    fuzz(3000)


def test_every_kernel_tells_its_arguments() -> None:
    if _ext.C is None:
        pytest.skip(_ext.ERROR)
    kernels = {name for name in vars(_ext.C) if callable(getattr(_ext.C, name)) and name[0] != "_"}
    assert set(_ext.C.signatures) == kernels - {"runs_here", "pool_name", "LargeBlock", "large_blocks"}
    for name, arguments in _ext.C.signatures.items():
        assert arguments, name
        assert {kind for _, kind in arguments} <= {"tensor", "int", "float", "bool"}, name
        assert len({argument for argument, _ in arguments}) == len(arguments), name
