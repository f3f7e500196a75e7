"""When Triton can run, when it cannot and what is said then: the reasons are those of real failures."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from blip3o_fast import env
from blip3o_fast.ops import _backend, _triton, rms_norm_modulate, use_backend

X, WEIGHT = torch.randn(2, 3, 16), torch.ones(16)


@pytest.fixture
def asked_anew(monkeypatch):
    """Nothing is remembered of what was found before."""
    monkeypatch.setattr(_triton, "_reasons", {})
    monkeypatch.setattr(_backend, "_warned", set())


@pytest.fixture
def an_h100(monkeypatch):
    """What PyTorch says where there is one, and no interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA H100")
    monkeypatch.setattr(_triton, "_interpreted", lambda: False)


def test_the_launcher_can_be_built_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert _triton.why_no_launcher.__wrapped__() is None
    assert list(tmp_path.rglob("blip3o_fast_probe*")), "it was really built"


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        ("/nowhere/cc", "the C compiler /nowhere/cc does not exist"),
        ("false", "the C compiler failed, most often for want of Python.h (Debian: apt-get install python3-dev)"),
    ],
)
def test_a_compiler_that_does_not_work_is_the_reason(tmp_path, monkeypatch, compiler, expected):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    reason = _triton.why_no_launcher.__wrapped__()
    assert reason.startswith("not available: Triton cannot build its launcher: ") and expected in reason


def test_no_compiler_at_all_is_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no C compiler (Debian: apt-get install gcc; or set CC)" in _triton.why_no_launcher.__wrapped__()


def test_a_cache_that_cannot_be_written_is_the_reason(tmp_path, monkeypatch):
    file = tmp_path / "cache"
    file.write_text("a file where a folder should be")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(file))
    reason = _triton.why_no_launcher.__wrapped__()
    assert f"its cache folder {file} cannot be written" in reason and "set TRITON_CACHE_DIR" in reason


def test_an_old_gpu_is_the_reason(asked_anew, an_h100, monkeypatch):
    assert _triton.why_not("cuda", 0) is None
    monkeypatch.setattr(_triton, "_reasons", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Tesla T4")
    expected = "not available: it needs compute capability 8.0 or newer, Tesla T4 has 7.5"
    assert _triton.why_not("cuda", 0) == expected


def test_no_nvidia_gpu_is_the_reason(asked_anew, an_h100, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _triton.why_not("cuda", 0) == "it needs an NVIDIA GPU, and PyTorch sees none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_fake_tensors_of_a_gpu_that_is_not_there_have_shapes(asked_anew, monkeypatch):
    monkeypatch.setattr(_triton, "_interpreted", lambda: False)
    with torch._subclasses.fake_tensor.FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 3, 16, device="cuda")
        assert rms_norm_modulate(x, torch.empty(16, device="cuda")).shape == x.shape


def test_a_missing_triton_is_the_reason(asked_anew, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    assert "Triton is not installed" in _triton.why_not("cuda", 0)


def test_a_broken_triton_is_the_reason(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: undefined symbol')")
    code = "from blip3o_fast.ops import _triton; print(_triton.why_not('cuda', 0))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = "not available: Triton cannot be imported (OSError: libtriton.so: undefined symbol)"
    assert done.stdout.strip() == expected


def test_the_probe_runs_once(asked_anew, monkeypatch):
    asked = []
    monkeypatch.setattr(_triton, "_why_not", lambda *device: asked.append(device))
    for _ in range(3):
        assert _triton.why_not("cuda", 0) is None
    assert asked == [("cuda", 0)]


def test_auto_goes_on_with_the_next_backend_and_warns_once(asked_anew, monkeypatch):
    reason = "not available: Triton cannot build its launcher: there is no C compiler"
    monkeypatch.setattr(_triton, "_why_not", lambda *device: reason)
    monkeypatch.setitem(_backend._PREFERRED, "cpu", ("triton",))
    with pytest.warns(UserWarning, match="blip3o_fast runs its PyTorch reference: backend 'triton' is not available"):
        first = rms_norm_modulate(X, WEIGHT)
    second = rms_norm_modulate(X, WEIGHT)  # a second warning would be an error
    with use_backend("reference"):
        assert torch.equal(first, rms_norm_modulate(X, WEIGHT)) and torch.equal(first, second)


def test_a_backend_asked_for_by_name_never_falls_back(asked_anew, monkeypatch):
    monkeypatch.setattr(_triton, "_why_not", lambda *device: "not available: Triton is not installed")
    message = "backend 'triton' cannot run rms_norm_modulate: not available: Triton is not installed"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        rms_norm_modulate(X, WEIGHT)


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    code = (
        "import torch; from blip3o_fast import ops\n"
        "try:\n"
        "    with ops.use_backend('triton'): ops.swiglu(torch.zeros(2, 4))\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "backend 'triton' cannot run swiglu: it needs cuda tensors, got cpu (TRITON_INTERPRET=1" in done.stdout


def test_the_environment_report_names_the_cause(monkeypatch, asked_anew):
    monkeypatch.setattr(_triton, "_interpreted", lambda: False)
    cause = "not available: Triton cannot build its launcher: there is no C compiler"
    monkeypatch.setattr(_triton, "why_no_launcher", lambda: cause)
    assert cause in env.backends()["triton"] and env.backends()["triton"].startswith("no: ")
    monkeypatch.setattr(_triton, "_reasons", {})
    monkeypatch.setattr(_triton, "_interpreted", lambda: True)
    assert env.backends()["triton"].startswith("works: ") and "rms_norm_modulate" in env.backends()["triton"]
