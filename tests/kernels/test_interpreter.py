"""The mended interpreter (tests/conftest.py) rounds and multiplies bfloat16 as PyTorch does, bit for bit."""

import os

import pytest
import torch
import triton
import triton.language as tl

from blip3o_fast.kernels._tl import sigmoid, tanh

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU here")


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), out_dtype=tl.float32))


@triton.jit
def activations_kernel(x_ptr, tanh_ptr, sigmoid_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(tanh_ptr + at, tanh(x))
    tl.store(sigmoid_ptr + at, sigmoid(x))


def every_kind_of_float() -> torch.Tensor:
    """4096 fp32 values: random bits (all exponents, subnormals, infinities, NaNs), and exact ties between two bf16."""
    bits = torch.randint(-(2**31), 2**31, (2048,), dtype=torch.int64).to(torch.int32)
    ties = (torch.randint(-(2**15), 2**15, (2032,), dtype=torch.int32) << 16) | 0x8000
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.39e38, -3.39e38, 1e-45] * 2)
    return torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_as_pytorch(dtype):
    x = every_kind_of_float()
    y = torch.empty(4096, dtype=dtype)
    cast_kernel[(1,)](x, y, N=4096)
    expected = x.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    same = y.view(torch.int16) == expected.view(torch.int16)
    assert (same | expected.isnan()).all()
    assert expected.isnan().any() and expected.isinf().any() and (expected == 0).any(), "the values are too tame"


def test_widening_is_exact():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = torch.empty(2**16, dtype=torch.float32)
    cast_kernel[(1,)](x, y, N=2**16)
    same = y.view(torch.int32) == x.float().view(torch.int32)
    assert (same | x.isnan()).all() and torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_values(dtype):
    """Small whole numbers: every product and sum is exact, so every right way to add them gives the same bits."""
    a, b = (torch.randint(-8, 9, (32, 32)).to(dtype) for _ in range(2))
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    assert torch.equal(c, a.float() @ b.float())


def test_activations_are_accurate_at_every_size():
    x = torch.cat([torch.logspace(-30, 4, 2000), -torch.logspace(-30, 4, 2000), torch.zeros(90), torch.rand(6)])
    t, s = torch.empty(4096), torch.empty(4096)
    activations_kernel[(1,)](x, t, s, N=4096)
    exact_t, exact_s = x.double().tanh(), x.double().sigmoid()
    assert ((t - exact_t).abs() <= 4e-7 * exact_t.abs()).all(), "tanh: relative to its own size, also near 0"
    assert ((s - exact_s).abs() <= 4e-7 * exact_s + 1e-38).all()
    far = x.abs() > 1e3
    assert torch.equal(t[far], x[far].sign()) and t.isfinite().all() and s.isfinite().all()
