"""Peers of our ops: how they are called, by stand-ins that have their signatures and none of their code."""

import dataclasses
import sys
import types

import diffusers.models.activations
import diffusers.models.normalization  # noqa: F401  (before the stand-ins: it asks which packages are installed)
import pytest
import torch
from torch.nn import functional as F

from benchmarks import cases, peers
from benchmarks.cases import module_of
from benchmarks.harness import Settings, measure
from benchmarks.work import Absent, Work


def checked(work: Work) -> dict[str, dict]:
    made = [rows for rows, _ in measure(dataclasses.replace(work, modes=("both",)), Settings(timed=False))]
    return {row["provider"]: row for rows in made for row in rows}


def work_of(op: str, dtype: torch.dtype = torch.float32, **more) -> Work:
    module = module_of(op)
    return cases.work(module.case, 2, dtype, "cpu", compile=False, **{**module.SMALL, **more})


class RMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False) and X.dim() == 3
        return F.rms_norm(X, X.shape[-1:], W, eps)


class LayerNormFunction:
    @staticmethod
    def apply(X, W, B, eps):
        return F.layer_norm(X, X.shape[-1:], W, B, eps)


class SiLUMulFunction:
    @staticmethod
    def apply(a, b):
        assert a.is_contiguous() and b.is_contiguous()
        return F.silu(a) * b


def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
    assert x.dim() == 2 and bias is residual is None
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def attention(q, k, v, *_):
    repeats = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


STAND_INS = {
    "liger_kernel": {},
    "liger_kernel.ops": {},
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": RMSNormFunction},
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LayerNormFunction},
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": SiLUMulFunction},
    "quack": {"rmsnorm": rmsnorm},
    "flash_attn": {"flash_attn_func": attention},
    "xformers": {},
    "xformers.ops": {"memory_efficient_attention": attention},
}
THEIRS = {
    "rms_norm_modulate": {"liger", "quack", "diffusers"},
    "swiglu": {"liger", "diffusers"},
    "layer_norm_modulate": {"liger"},
    "flash_attention": {"flash-attn", "xformers"},
    "dual_attention": {"flash-attn", "xformers"},
}


@pytest.fixture
def installed(monkeypatch):
    for name, content in STAND_INS.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("op", THEIRS)
def test_peers_compute_the_op(installed, op):
    """In bf16, which flash-attn needs; a peer that is right may still be less exact than stock."""
    even = {"key_heads": 2} if "attention" in op else {}
    rows = checked(work_of(op, torch.bfloat16, **even))
    assert set(rows) == {"eager", "compile", "ours", *THEIRS[op]}
    assert all(rows[name]["status"] == "ok" for name in THEIRS[op]), rows


@pytest.mark.parametrize("op", THEIRS)
def test_a_wrong_peer_fails(installed, op):
    even = {"key_heads": 2} if "attention" in op else {}
    work = work_of(op, torch.bfloat16, **even)
    for name in THEIRS[op]:
        right = work.providers[name]
        wrong = dataclasses.replace(work, providers={**work.providers, name: lambda *a, right=right: 1.1 * right(*a)})
        assert checked(wrong)[name]["status"] == "FAILED"


def test_cases_that_a_peer_cannot_do_are_absent(installed):
    fp32 = work_of("flash_attention", key_heads=2).providers
    assert "fp16 and bf16" in fp32["flash-attn"].reason and not isinstance(fp32["xformers"], Absent)
    masked = work_of("flash_attention", torch.bfloat16, masked=True).providers
    assert "without a key mask" in masked["flash-attn"].reason and "without mask" in masked["xformers"].reason
    grouped = work_of("dual_attention", torch.bfloat16, key_heads=1).providers
    assert "as many key heads" in grouped["xformers"].reason and not isinstance(grouped["flash-attn"], Absent)


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack", None)  # as Python marks a module that must not be imported
    absent = peers.rms_norms()["quack"]
    assert isinstance(absent, Absent) and absent.reason.startswith("quack: ")
    broken = types.ModuleType("quack")
    monkeypatch.setitem(sys.modules, "quack", broken)
    assert "has no attribute 'rmsnorm'" in peers.rms_norms()["quack"].reason
    assert not isinstance(peers.rms_norms()["diffusers"], Absent)  # which the tests need anyway
