"""debug_ops catches a kernel that is wrong, and lets a right one pass."""

import importlib

import pytest
import torch

from blip3o_fast.ops import debug_ops, merged_linear, rms_norm_modulate

OP = importlib.import_module("blip3o_fast.ops.rms_norm_modulate")
X, WEIGHT = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16), torch.ones(16)


def wrong(factor):
    def forward(x, weight, scale, eps, dtype):
        y, rstd = OP._forward_reference(x, weight, scale, eps, dtype)
        return y * factor, rstd

    return forward


@pytest.fixture
def cpu_kernel(monkeypatch):
    """A stand-in for the cpu kernel, so that the check itself is tested on machines that did not build one."""
    monkeypatch.setattr(OP.BACKENDS, "refusals", {"cpu": lambda *tensors: None})
    return lambda forward: monkeypatch.setitem(OP._FORWARD, "cpu", forward)


def test_a_right_kernel_passes(cpu_kernel):
    cpu_kernel(wrong(1.0))
    with debug_ops():
        rms_norm_modulate(X, WEIGHT)


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf")])
def test_a_wrong_kernel_is_named(cpu_kernel, factor):
    cpu_kernel(wrong(factor))
    with debug_ops(), pytest.raises(FloatingPointError, match=r"rms_norm_modulate_fwd on backend 'cpu': output 0"):
        rms_norm_modulate(X, WEIGHT)
    rms_norm_modulate(X, WEIGHT)  # outside the block nothing is checked


def test_it_can_stay_on(cpu_kernel):
    cpu_kernel(wrong(2.0))
    debug_ops()
    try:
        with pytest.raises(FloatingPointError):
            rms_norm_modulate(X, WEIGHT)
    finally:
        debug_ops(False)
    rms_norm_modulate(X, WEIGHT)


def test_ops_with_one_implementation_pass():
    weights = [torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)]
    with debug_ops():
        merged_linear(X, weights).sum().backward()
    assert all(weight.grad is not None for weight in weights)
