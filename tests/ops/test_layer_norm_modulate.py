"""layer_norm_modulate against diffusers' LuminaLayerNormContinuous, torch's layer_norm, and the numerics contract."""

import importlib
import re

import pytest
import torch
from diffusers.models.normalization import LuminaLayerNormContinuous
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import layer_norm_modulate, layer_norm_modulate_ref, use_backend
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

OP = importlib.import_module("blip3o_fast.ops.layer_norm_modulate")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: fp32 residual, half-precision modulation from the GEMM
MIXED = (torch.float32, torch.bfloat16)
SHAPES = [(2, 8, 1792), (3, 5, 1790), (1, 1, 257), (0, 64, 32), (2, 0, 32)]


def inputs(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 2) -> dict[str, Tensor]:
    batch, _, dim = shape
    scale = (0.3 * torch.randn(batch, 2 * dim)).to(dtypes[1])[:, dim:]
    return {"x": (0.5 + torch.randn(shape)).to(dtypes[0]), "scale": scale}


def eager(x: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], None, None, eps) * (1 + scale)[:, None, :]


def test_reference_is_layer_norm():
    args = [value.double() for value in inputs((2, 5, 48)).values()]
    for eps in (1e-6, 1e-2):
        expected = eager(*args, eps=eps)
        torch.testing.assert_close(layer_norm_modulate_ref(*args, eps=eps), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(layer_norm_modulate(*args, eps=eps), expected, rtol=1e-13, atol=1e-13)


def test_is_the_head_of_diffusers():
    head = LuminaLayerNormContinuous(24, 16, elementwise_affine=False, eps=1e-6, out_dim=8)
    x, embedding = torch.randn(2, 5, 24), torch.randn(2, 16)
    scale = head.linear_1(torch.nn.functional.silu(embedding))
    ours = head.linear_2(layer_norm_modulate(x, scale))
    torch.testing.assert_close(ours, head(x, embedding), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtypes", [*[(d,) * 2 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes):
    with use_backend(backend):
        assert_op_contract(
            layer_norm_modulate, eager, layer_norm_modulate_ref, inputs(shape, dtypes), torch.randn(shape)
        )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(backend, dtype):
    named, dy = inputs((4, 64, 96), (dtype,) * 2), torch.randn(4, 64, 96).to(dtype)
    with use_backend(backend):
        ours = with_gradients(layer_norm_modulate, named, dy)
    gold = with_gradients(layer_norm_modulate_ref, in_double(named), dy)
    for name, value in ours.items():
        assert_rounded_once(value, gold[name], name)


def test_gradcheck():
    args = [value.double().requires_grad_() for value in inputs((2, 3, 7)).values()]
    assert torch.autograd.gradcheck(lambda *a: layer_norm_modulate(*a, eps=1e-3), args)


@pytest.mark.parametrize(
    "shape", [(80, 1, 48), (1, 70, 24), pytest.param((128, 17, 48), marks=pytest.mark.slow)], ids=str
)
def test_many_rows(backend, shape):
    """More partial sums, in all and of one sample, than are added up at once; programs that own 16 rows, not 4."""
    with use_backend(backend):
        assert_op_contract(layer_norm_modulate, eager, layer_norm_modulate_ref, inputs(shape), torch.randn(shape))


def test_cpu_kernels_are_called(cpu_calls):
    with_gradients(layer_norm_modulate, inputs((2, 3, 16)), torch.randn(2, 3, 16))
    assert cpu_calls == ["layer_norm_modulate_fwd", "layer_norm_modulate_bwd"]


def test_threads_change_no_bit(threads_agree):
    threads_agree(layer_norm_modulate, inputs((3, 37, 96)), torch.randn(3, 37, 96))


def test_triton_kernels_are_launched():
    with use_backend("triton"), recording() as launches:
        with_gradients(layer_norm_modulate, inputs((2, 3, 16)), torch.randn(2, 3, 16))
    assert [launch.name for launch in launches] == [
        "layer_norm_modulate_fwd",
        "layer_norm_modulate_bwd",
        "sample_sums_kernel",
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend, dtype):
    """Slices, every other row, transposed upstream gradients: read where they lie, by the same contract."""
    wide = torch.randn(2, 6, 100).to(dtype)
    named = {"x": wide[:, ::2, 4:52], "scale": torch.randn(2, 96).to(dtype)[:, ::2]}
    for dy in (torch.randn(2, 48, 3).transpose(1, 2), torch.randn(2, 3, 1).expand(2, 3, 48)):
        for x in (named["x"], torch.randn(2, 48, 3).to(dtype).transpose(1, 2)):
            with use_backend(backend):
                assert_op_contract(layer_norm_modulate, eager, layer_norm_modulate_ref, named | {"x": x}, dy)


def test_deterministic(backend):
    with use_backend(backend):
        assert_deterministic(layer_norm_modulate, inputs((3, 21, 96)), torch.randn(3, 21, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    x, scale = inputs((2, 3, 16)).values()
    torch.library.opcheck(OP._layer_norm_modulate_fwd, (x, scale, 1e-6, dtype, backend))
    args = (torch.randn(2, 3, 16).to(dtype), x, scale, torch.randn(2, 3), torch.rand(2, 3), backend)
    torch.library.opcheck(OP._layer_norm_modulate_bwd, args)


def test_compile_does_not_recompile_per_batch(backend):
    with use_backend(backend):
        assert_compiles_once(layer_norm_modulate, lambda batch: (inputs((batch, 4, 16)), [torch.randn(batch, 4, 16)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, MIXED], ids=str)
def test_autocast_returns_its_dtype(backend, dtype, dtypes):
    named, dy = inputs((2, 8, 64), dtypes), torch.randn(2, 8, 64)
    with torch.autocast("cpu", dtype), use_backend(backend):
        assert_op_contract(layer_norm_modulate, eager, layer_norm_modulate_ref, named, dy, dtypes=[dtype])


def test_a_large_mean_costs_no_digits(backend):
    """The variance of x + 1000 is that of x: the one-pass formula E[x^2] - mean^2 would lose it in fp32."""
    x = torch.randn(2, 3, 64) + 1000
    with use_backend(backend):
        y = layer_norm_modulate(x, torch.zeros(2, 64))
    gold = layer_norm_modulate_ref(x.double(), torch.zeros(2, 64).double())
    assert_contract(y, torch.nn.functional.layer_norm(x, (64,), eps=1e-6), gold)
    torch.testing.assert_close(y.double(), gold, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_stay_finite(backend, dtype):
    x = torch.zeros(1, 3, 64, dtype=dtype)
    x[0, 1], x[0, 2, 5] = 1e4, 6e4  # constant rows have no variance; one huge value
    named = {"x": x, "scale": torch.zeros(1, 64, dtype=dtype)}
    with use_backend(backend):
        results = with_gradients(layer_norm_modulate, named, torch.randn(1, 3, 64))
    gold = layer_norm_modulate_ref(x.double(), named["scale"].double())
    for name, value in results.items():
        assert value.isfinite().all(), name
    assert_contract(results["y"], eager(**named), gold)


def test_every_combination_of_needed_gradients():
    assert_needed_gradients(layer_norm_modulate, inputs((2, 3, 8)), torch.randn(2, 3, 8))


def test_names_what_cannot_run():
    named = inputs((1, 2, 8), (torch.bfloat16,) * 2)
    message = "backend 'triton' cannot run layer_norm_modulate: its triton kernel takes float32, bfloat16 and float16"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        layer_norm_modulate(**in_double(named))
    with use_backend("cuda"), pytest.raises(RuntimeError, match="it has no cuda kernel yet"):
        layer_norm_modulate(**named)
    message = "its cpu kernel takes float32, bfloat16 and float16, got torch.float64"
    if _ext.C is not None:
        with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
            layer_norm_modulate(**in_double(named))


def test_second_derivatives_and_transforms_are_refused():
    assert_transforms_refused(layer_norm_modulate, inputs((1, 2, 8)))


GOOD = {"x": torch.zeros(2, 3, 8), "scale": torch.zeros(2, 8), "eps": 1e-6}
BAD = [
    ({"x": torch.zeros(3, 8)}, "x must have 3 dimensions (B, T, D), got shape (3, 8)"),
    ({"x": None}, "x must be a tensor of shape (B, T, D), got NoneType"),
    ({"scale": None}, "scale must be a tensor of shape (B, D), got NoneType"),
    ({"scale": torch.zeros(2, 3, 8)}, "scale must have shape (B, D) = (2, 8), got (2, 3, 8)"),
    ({"x": torch.zeros(2, 3, 8).int()}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    ({"scale": torch.zeros(2, 8).double()}, "scale is torch.float64 and x is torch.float32"),
    ({"scale": torch.zeros(2, 8, device="meta")}, "scale must be on cpu like x, got meta"),
    ({"eps": float("nan")}, "eps must be a number >= 0, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_norm_modulate(**(GOOD | change))
