"""gated_residual against diffusers' RMSNorm, gate and add, in fp64 and by the numerics contract."""

import importlib
import re

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import _cpu, gated_residual, gated_residual_ref, use_backend
from blip3o_fast.testing import (
    assert_compiles_once,
    assert_contract,
    assert_deterministic,
    assert_needed_gradients,
    assert_op_contract,
    assert_rounded_once,
    assert_transforms_refused,
    in_double,
    with_gradients,
)

OP = importlib.import_module("blip3o_fast.ops.gated_residual")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: fp32 residual and weights, half-precision branch and modulation from the GEMMs
MIXED = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
ALL_DTYPES = [*[(d,) * 4 for d in DTYPES], MIXED, (torch.bfloat16, torch.float32, torch.float16, torch.float32)]
SHAPES = [(2, 8, 1792), (3, 5, 1790), (1, 1, 257), (0, 64, 32), (2, 0, 32)]


def inputs(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4) -> dict[str, Tensor]:
    batch, _, dim = shape
    return {
        "x": torch.randn(shape).to(dtypes[0]),
        "y": (2 * torch.randn(shape)).to(dtypes[1]),
        "gate": torch.randn(batch, 4 * dim).to(dtypes[2])[:, dim : 2 * dim],  # the second chunk of a modulation
        "weight": (1 + 0.1 * torch.randn(dim)).to(dtypes[3]),
    }


def eager(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    norm = RMSNorm(y.shape[-1], eps=eps)
    del norm.weight
    norm.weight = weight
    return x + gate.unsqueeze(1).tanh() * norm(y)


def test_reference_is_rms_norm_gated_and_added():
    x, y, gate, weight = args = [value.double() for value in inputs((2, 5, 48)).values()]
    for eps in (1e-5, 1e-2):
        expected = x + gate.tanh()[:, None] * torch.nn.functional.rms_norm(y, (48,), weight, eps)
        torch.testing.assert_close(gated_residual_ref(*args, eps=eps), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gated_residual(*args, eps=eps), expected, rtol=1e-13, atol=1e-13)
        # diffusers takes the variance in fp32 also for fp64 inputs, so fp32 resolution is what can be asked
        torch.testing.assert_close(eager(*args, eps=eps), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtypes", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes):
    with use_backend(backend):
        assert_op_contract(gated_residual, eager, gated_residual_ref, inputs(shape, dtypes), torch.randn(shape))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(backend, dtype):
    named, dh = inputs((4, 64, 96), (dtype,) * 4), torch.randn(4, 64, 96).to(dtype)
    with use_backend(backend):
        ours = with_gradients(gated_residual, named, dh)
    gold = with_gradients(gated_residual_ref, in_double(named), dh)
    for name, value in ours.items():
        assert_rounded_once(value, gold[name], name)


def test_gradcheck():
    args = [value.double().requires_grad_() for value in inputs((2, 3, 7)).values()]
    assert torch.autograd.gradcheck(lambda *a: gated_residual(*a, eps=1e-3), args)


@pytest.mark.parametrize(
    "shape", [(80, 1, 48), (1, 70, 24), pytest.param((128, 17, 48), marks=pytest.mark.slow)], ids=str
)
def test_many_rows(backend, shape):
    """More partial sums, in all and of one sample, than are added up at once; programs that own 16 rows, not 4."""
    with use_backend(backend):
        assert_op_contract(gated_residual, eager, gated_residual_ref, inputs(shape), torch.randn(shape))


def test_cpu_kernels_are_called(cpu_calls):
    with_gradients(gated_residual, inputs((2, 3, 16)), torch.randn(2, 3, 16))
    assert cpu_calls == ["gated_residual_fwd", "gated_residual_bwd"]


def test_threads_change_no_bit(threads_agree):
    threads_agree(gated_residual, inputs((3, 37, 96)), torch.randn(3, 37, 96))


def test_triton_kernels_are_launched():
    with use_backend("triton"), recording() as launches:
        with_gradients(gated_residual, inputs((2, 3, 16)), torch.randn(2, 3, 16))
    assert [launch.name for launch in launches] == ["gated_residual_fwd", "gated_residual_bwd", "sample_sums_kernel"]


def test_a_closed_gate_leaves_the_residual(backend):
    named = inputs((2, 3, 32)) | {"gate": torch.zeros(2, 32)}
    with use_backend(backend):
        assert torch.equal(gated_residual(**named), named["x"])


@pytest.mark.parametrize("isa", _cpu.ISAS)
def test_tanh_over_all_of_fp32(isa):
    """h is tanh(gate) where x = 0 and y = 1: subnormal numbers, infinities and NaN among a million bit patterns."""
    gate = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
    ones = torch.ones_like(gate)
    with _cpu.use_isa(isa), use_backend("cpu"):
        h = gated_residual(torch.zeros_like(gate)[None, None], ones[None, None], gate[None], ones, eps=0.0)[0, 0]
    torch.testing.assert_close(h.double(), gate.double().tanh(), rtol=3 * 2**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend, dtype):
    """Slices, every other row, transposed and expanded upstream gradients: read where they lie."""
    wide = torch.randn(2, 6, 100).to(dtype)
    named = {
        "x": wide[:, ::2, 4:52],
        "y": torch.randn(2, 48, 3).to(dtype).transpose(1, 2),
        "gate": torch.randn(2, 96).to(dtype)[:, ::2],
        "weight": torch.randn(96).to(dtype)[::2],
    }
    for dh in (torch.randn(2, 48, 3).transpose(1, 2), torch.randn(1, 3, 1).expand(2, 3, 48)):
        with use_backend(backend):
            assert_op_contract(gated_residual, eager, gated_residual_ref, named, dh)


def test_deterministic(backend):
    with use_backend(backend):
        assert_deterministic(gated_residual, inputs((3, 21, 96)), torch.randn(3, 21, 96))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 4, MIXED], ids=str)
def test_opcheck(backend, dtypes):
    x, y, gate, weight = inputs((2, 3, 16), dtypes).values()
    torch.library.opcheck(OP._gated_residual_fwd, (x, y, gate, weight, 1e-5, backend))
    torch.library.opcheck(OP._gated_residual_bwd, (torch.randn(2, 3, 16), y, gate, weight, torch.rand(2, 3), backend))


def test_compile_does_not_recompile_per_batch(backend):
    with use_backend(backend):
        assert_compiles_once(gated_residual, lambda batch: (inputs((batch, 4, 16)), [torch.randn(batch, 4, 16)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_residual_dtype(backend, dtype):
    dtypes = (torch.float32, dtype, dtype, torch.float32)
    with torch.autocast("cpu", dtype), use_backend(backend):
        assert_op_contract(gated_residual, eager, gated_residual_ref, inputs((2, 8, 64), dtypes), torch.randn(2, 8, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_stay_finite(backend, dtype):
    """A branch of zeros, one whose square overflows fp16, one huge value; gates far in tanh's saturation."""
    y = torch.zeros(1, 3, 64, dtype=dtype)
    y[0, 1], y[0, 2, 5] = 1e4, 6e4
    gate = torch.linspace(-100, 100, 64, dtype=dtype)[None]
    named = {"x": torch.randn(1, 3, 64).to(dtype), "y": y, "gate": gate, "weight": torch.ones(64, dtype=dtype)}
    with use_backend(backend):
        results = with_gradients(gated_residual, named, torch.randn(1, 3, 64))
    for name, value in results.items():
        assert value.isfinite().all(), name
    gold = gated_residual_ref(**in_double(named))
    assert_contract(results["y"], gold.to(dtype), gold)


def test_every_combination_of_needed_gradients():
    assert_needed_gradients(gated_residual, inputs((2, 3, 8)), torch.randn(2, 3, 8))


def test_saves_neither_the_residual_nor_the_output():
    named = {name: value.requires_grad_() for name, value in inputs((2, 3, 8)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_residual(**named)
    assert [tuple(t.shape) for t in saved] == [(2, 3, 8), (2, 8), (8,), (2, 3)]
    assert saved[0].data_ptr() == named["y"].data_ptr()


def test_names_what_cannot_run():
    named = inputs((1, 2, 8), (torch.bfloat16,) * 4)
    message = "backend 'triton' cannot run gated_residual: its triton kernel takes float32, bfloat16 and float16"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        gated_residual(**in_double(named))
    with use_backend("cuda"), pytest.raises(RuntimeError, match="it has no cuda kernel yet"):
        gated_residual(**named)
    message = "its cpu kernel takes float32, bfloat16 and float16, got torch.float64"
    if _ext.C is not None:
        with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
            gated_residual(**in_double(named))


def test_second_derivatives_and_transforms_are_refused():
    assert_transforms_refused(gated_residual, inputs((1, 2, 8)))


GOOD = {"x": torch.zeros(2, 3, 8), "y": torch.zeros(2, 3, 8), "gate": torch.zeros(2, 8), "weight": torch.ones(8)}
BAD = [
    ({"x": torch.zeros(3, 8)}, "x must have 3 dimensions (B, T, D), got shape (3, 8)"),
    ({"x": "x"}, "x must be a tensor of shape (B, T, D), got str"),
    ({"y": torch.zeros(2, 3, 7)}, "y must have shape (B, T, D) = (2, 3, 8), got (2, 3, 7)"),
    ({"gate": torch.zeros(8)}, "gate must have shape (B, D) = (2, 8), got (8,)"),
    ({"gate": None}, "gate must be a tensor of shape (B, D), got NoneType"),
    ({"weight": torch.ones(7)}, "weight must have shape (D) = (8), got (7,)"),
    ({"gate": torch.zeros(2, 8).long()}, "gate must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"y": torch.zeros(2, 3, 8).double()}, "y is torch.float64 and x is torch.float32"),
    ({"weight": torch.ones(8, device="meta")}, "weight must be on cpu like x, got meta"),
    ({"eps": -1e-5}, "eps must be a number >= 0, got -1e-05"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_residual(**(GOOD | change))
