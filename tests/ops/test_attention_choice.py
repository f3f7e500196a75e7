"""use_attention: who computes attention, asked for by name or chosen."""

import importlib
import re

import pytest
import torch

from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import (
    _cpu,
    attention_implementations,
    attention_rule,
    flash_attention,
    use_attention,
    use_backend,
    use_isa,
)

ATTENTION = importlib.import_module("blip3o_fast.ops._attention")
BACKEND = importlib.import_module("blip3o_fast.ops._backend")
FLASH = importlib.import_module("blip3o_fast.ops.flash_attention")


@pytest.fixture
def computed(monkeypatch):
    """The names of what computed each forward so far."""
    calls = []
    sdpa, reference = ATTENTION.sdpa, FLASH._FORWARD["reference"]
    monkeypatch.setattr(ATTENTION, "sdpa", lambda *a: calls.append("sdpa") or sdpa(*a))
    monkeypatch.setitem(FLASH._FORWARD, "reference", lambda *a: calls.append("reference") or reference(*a))
    return calls


def attend(dtype=torch.float32, requires_grad=False, tokens=5):
    q, k, v = torch.randn(3, 1, tokens, 1, 4, dtype=dtype)
    return flash_attention(q.requires_grad_(requires_grad), k, v)


def test_every_implementation_tells_whether_it_works():
    reasons = attention_implementations()
    assert list(reasons) == ["sdpa", "flash-attn", "xformers"]
    assert reasons["sdpa"] is None


def test_unknown_name():
    with pytest.raises(
        ValueError, match=re.escape("attention must be one of auto, sdpa, flash-attn, xformers, got 'f'")
    ):
        use_attention("f")


# dtype, tokens, gradients -> what was the faster of sdpa and what is there without it
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RULE = [
    (F32, 64, False, "sdpa"),
    (F32, 64, True, "sdpa"),
    (F32, 300, True, "sdpa"),
    (BF16, 64, False, "sdpa"),
    (BF16, 64, True, "ours"),
    (BF16, 300, False, "sdpa"),
    (BF16, 300, True, "sdpa"),
    (F16, 64, False, "ours"),
    (F16, 300, True, "ours"),
]


@pytest.mark.parametrize(("dtype", "tokens", "requires_grad", "faster"), RULE)
def test_auto_takes_what_was_faster(computed, monkeypatch, dtype, tokens, requires_grad, faster):
    """Of the two that need no extension."""
    monkeypatch.setitem(BACKEND._PREFERRED, "cpu", ())
    attend(dtype, requires_grad, tokens)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        attend(torch.float32, requires_grad, tokens)
    assert computed == [{"ours": "reference"}.get(faster, faster)] * 2


@pytest.mark.parametrize(("dtype", "tokens", "requires_grad", "faster"), RULE)
def test_auto_takes_sdpa_where_portable_kernels_lose(computed, cpu_calls, dtype, tokens, requires_grad, faster):
    with use_isa("generic"):
        attend(dtype, requires_grad, tokens)
        assert (cpu_calls, computed) == ((["flash_attention_fwd"], []) if faster == "ours" else ([], ["sdpa"]))
        with use_backend("cpu"):
            attend(dtype, requires_grad, tokens)
    assert cpu_calls[-1] == "flash_attention_fwd", "asked for by name it runs"


def test_the_rule_is_told(cpu_calls, monkeypatch):
    """`env` prints it; what it says is what the two tests above hold it to."""
    with use_isa("generic"):
        assert attention_rule()["cpu"].startswith(
            "sdpa; the C++ kernels in fp16, and to train in bf16 up to 32768 pairs"
        )
    if len(_cpu.ISAS) > 1:
        best = f"the C++ kernels ({_cpu.ISAS[-1]})"
        assert attention_rule()["cpu"] == f"{best}: as fast as stock or faster, within 5 %, at every size measured"
    monkeypatch.setattr(_cpu, "ISAS", ())
    assert attention_rule()["cpu"].startswith("sdpa; the reference in fp16, and to train in bf16 up to 8192 pairs")
    assert set(attention_rule()) == {"cpu", "cuda"}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 300])
def test_auto_takes_the_kernel_where_it_is_built(computed, cpu_calls, dtype, tokens, requires_grad):
    attend(dtype, requires_grad, tokens)
    assert cpu_calls == ["flash_attention_fwd"] and computed == []


def test_scopes_nest_and_end(computed):
    with use_attention("sdpa"):
        with use_attention("auto"), use_backend("reference"):
            attend()
        attend()
    with use_backend("reference"):
        attend()
    assert computed == ["reference", "sdpa", "reference"]
    assert ATTENTION.use_attention.state.active == "auto"


def test_without_a_scope_it_lasts(computed):
    chosen = use_attention("sdpa")
    try:
        attend()
    finally:
        use_attention("auto")
    assert chosen.previous == "auto"
    assert computed == ["sdpa"]


def test_the_name_counts_more_than_the_backend(computed):
    with use_backend("reference"), use_attention("sdpa"):
        attend()
    assert computed == ["sdpa"]


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu"])
def test_a_backend_by_name_is_not_replaced(name):
    with use_backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' cannot run flash_attention"):
        attend(torch.float64)


def test_triton_by_name_runs(computed):
    with use_backend("triton"), recording() as launches:
        attend()
    assert [launch.name for launch in launches] == ["flash_attention_fwd"]
    assert computed == []


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_takes_triton_where_it_runs(computed, monkeypatch, dtype, requires_grad):
    """On a GPU, that is; here the interpreter stands in for it. What triton refuses goes on as without it."""
    monkeypatch.setitem(BACKEND._PREFERRED, "cpu", ("triton",))
    with recording() as launches:
        attend(dtype, requires_grad)
    if dtype == torch.float64:
        assert (len(launches), computed) == (0, ["sdpa"])
    else:
        assert ([launch.name for launch in launches], computed) == (["flash_attention_fwd"], [])
        with use_attention("sdpa"):
            attend(dtype, requires_grad)
        assert (len(launches), computed) == (1, ["sdpa"])


def test_tf32_is_used_where_either_of_pytorchs_switches_allows_it():
    """In processes of their own: PyTorch refuses to answer by the older switch once the newer was used."""
    import subprocess
    import sys

    for switch, expected in (
        ("", "ieee"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    ):
        code = f"import torch\n{switch}\nfrom blip3o_fast.kernels._attention_tiles import precision\n"
        code += "print(precision(torch.float32), precision(torch.bfloat16))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected, "ieee"], switch
