"""rms_norm_modulate against diffusers' RMSNorm * (1 + scale), in fp64 and by the numerics contract."""

import importlib
import re

import pytest
import torch
from diffusers.models.normalization import LuminaRMSNormZero, RMSNorm
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import rms_norm_modulate, rms_norm_modulate_ref, use_backend
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

OP = importlib.import_module("blip3o_fast.ops.rms_norm_modulate")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: fp32 residual and weights, half-precision modulation from the GEMM
MIXED = (torch.float32, torch.float32, torch.bfloat16)
SHAPES = [(2, 64, 1792), (3, 5, 1790), (1, 1, 257), (0, 64, 32), (2, 0, 32)]
SCALED = pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])


def inputs(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3, scaled: bool = True
) -> dict[str, Tensor | None]:
    batch, _, dim = shape
    return {
        "x": torch.randn(shape).to(dtypes[0]),
        "weight": (1 + 0.1 * torch.randn(dim)).to(dtypes[1]),
        "scale": (0.3 * torch.randn(batch, 4 * dim)).to(dtypes[2])[:, dim : 2 * dim] if scaled else None,
    }


def eager(x: Tensor, weight: Tensor, scale: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    norm = RMSNorm(x.shape[-1], eps=eps)
    del norm.weight
    norm.weight = weight
    y = norm(x)
    return y if scale is None else y * (1 + scale[:, None])


@SCALED
def test_reference_is_diffusers(scaled):
    args = [None if a is None else a.double() for a in inputs((2, 5, 48), scaled=scaled).values()]
    # diffusers takes the variance in fp32 also for fp64 inputs, so fp32 resolution is what can be asked
    torch.testing.assert_close(rms_norm_modulate_ref(*args), eager(*args), rtol=1e-6, atol=1e-6)
    plain = torch.nn.functional.rms_norm(args[0], (48,), args[1], 1e-5)
    expected = plain if args[2] is None else plain * (1 + args[2][:, None])
    torch.testing.assert_close(rms_norm_modulate_ref(*args), expected, rtol=1e-13, atol=1e-13)


def test_is_diffusers_first_norm():
    norm = LuminaRMSNormZero(24, norm_eps=1e-5, norm_elementwise_affine=True)
    torch.nn.init.normal_(norm.norm.weight, 1, 0.2)
    x, temb = torch.randn(2, 5, 24), torch.randn(2, 24)
    scale = norm.linear(torch.nn.functional.silu(temb)).chunk(4, dim=1)[0]
    ours = rms_norm_modulate(x, norm.norm.weight, scale)
    torch.testing.assert_close(ours, norm(x, temb)[0], rtol=1e-6, atol=1e-6)


@SCALED
@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, scaled):
    named = inputs(shape, dtypes, scaled)
    with use_backend(backend):
        assert_op_contract(rms_norm_modulate, eager, rms_norm_modulate_ref, named, torch.randn(shape))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(backend, dtype):
    named, dy = inputs((4, 64, 96), (dtype,) * 3), torch.randn(4, 64, 96).to(dtype)
    with use_backend(backend):
        ours = with_gradients(rms_norm_modulate, named, dy)
    gold = with_gradients(rms_norm_modulate_ref, in_double(named), dy)
    for name, value in ours.items():
        assert_rounded_once(value, gold[name], name)


@SCALED
def test_gradcheck(scaled):
    args = [None if a is None else a.double().requires_grad_() for a in inputs((2, 3, 7), scaled=scaled).values()]
    assert torch.autograd.gradcheck(lambda *a: rms_norm_modulate(*a, eps=1e-3), args)


def test_cpu_kernels_are_called(cpu_calls):
    with_gradients(rms_norm_modulate, inputs((2, 3, 16)), torch.randn(2, 3, 16))
    assert cpu_calls == ["rms_norm_modulate_fwd", "rms_norm_modulate_bwd"]


def test_threads_change_no_bit(threads_agree):
    threads_agree(rms_norm_modulate, inputs((3, 37, 96)), torch.randn(3, 37, 96))


def test_triton_kernels_are_launched():
    with use_backend("triton"), recording() as launches:
        with_gradients(rms_norm_modulate, inputs((2, 3, 16)), torch.randn(2, 3, 16))
    assert [launch.name for launch in launches] == [
        "rms_norm_modulate_fwd",
        "rms_norm_modulate_bwd",
        "sample_sums_kernel",
    ]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, MIXED], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 4096), (2, 5, 5003), (1, 2, 16384)], ids=str)
def test_cuda_wide_rows(shape, dtypes):
    """The widest that a block's registers hold, and those that it reads again."""
    with use_backend("cuda"):
        assert_op_contract(rms_norm_modulate, eager, rms_norm_modulate_ref, inputs(shape, dtypes), torch.randn(shape))


def test_cuda_blocks_of_several_tokens():
    """As on large batches: a block walks over tokens, the last one of a sample over fewer."""
    shape = (65, 127, 24)
    with use_backend("cuda"):
        assert_op_contract(rms_norm_modulate, eager, rms_norm_modulate_ref, inputs(shape), torch.randn(shape))


def test_strided_inputs(backend):
    """Slices, every other row, transposed and expanded upstream gradients: read where they lie."""
    wide = torch.randn(2, 6, 100)
    named = {"x": wide[:, ::2, 4:52], "weight": torch.randn(96)[::2], "scale": torch.randn(2, 96)[:, ::2]}
    for dy in (torch.randn(2, 48, 3).transpose(1, 2), torch.randn(1, 3, 1).expand(2, 3, 48)):
        with use_backend(backend):
            assert_op_contract(rms_norm_modulate, eager, rms_norm_modulate_ref, named, dy)


def test_deterministic(backend):
    with use_backend(backend):
        assert_deterministic(rms_norm_modulate, inputs((3, 64, 96)), torch.randn(3, 64, 96))


@SCALED
def test_opcheck(backend, scaled):
    x, weight, scale = inputs((2, 3, 16), scaled=scaled).values()
    torch.library.opcheck(OP._rms_norm_modulate_fwd, (x, weight, scale, 1e-5, torch.float32, backend))
    rstd = torch.rand(2, 3)
    torch.library.opcheck(OP._rms_norm_modulate_bwd, (torch.randn(2, 3, 16), x, weight, scale, rstd, backend))


def test_compile_does_not_recompile_per_batch(backend):
    with use_backend(backend):
        assert_compiles_once(rms_norm_modulate, lambda batch: (inputs((batch, 4, 16)), [torch.randn(batch, 4, 16)]))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, MIXED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_returns_its_dtype(backend, dtype, dtypes):
    named, dy = inputs((2, 8, 64), dtypes), torch.randn(2, 8, 64)
    with torch.autocast("cpu", dtype), use_backend(backend):
        assert_op_contract(rms_norm_modulate, eager, rms_norm_modulate_ref, named, dy, dtypes=[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extremes_stay_finite(backend, dtype):
    x = torch.zeros(1, 3, 64, dtype=dtype)
    x[0, 1], x[0, 2, 5] = 1e4, 6e4
    with use_backend(backend):
        y = rms_norm_modulate(x, torch.ones(64, dtype=dtype), torch.zeros(1, 64, dtype=dtype))
    gold = rms_norm_modulate_ref(x.double(), torch.ones(64).double(), torch.zeros(1, 64).double())
    assert y.isfinite().all()
    assert_contract(y, gold.to(dtype), gold)


@SCALED
def test_every_combination_of_needed_gradients(scaled):
    assert_needed_gradients(rms_norm_modulate, inputs((2, 3, 8), scaled=scaled), torch.randn(2, 3, 8))


def test_names_what_cannot_run():
    named = inputs((1, 2, 8), (torch.bfloat16,) * 3)
    for name in ("triton", "cuda"):
        message = f"backend '{name}' cannot run rms_norm_modulate: its {name} kernel takes float32, bfloat16 and"
        with use_backend(name), pytest.raises(RuntimeError, match=message):
            rms_norm_modulate(**in_double(named))
    with use_backend("cuda"), pytest.raises(RuntimeError, match="its cuda kernel takes rows of up to 16384, got 16385"):
        rms_norm_modulate(torch.zeros(1, 1, 16385), torch.zeros(16385))
    message = "its cpu kernel takes float32, bfloat16 and float16, got torch.float64"
    if _ext.C is not None:
        with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
            rms_norm_modulate(**in_double(named))
    with pytest.raises(ValueError, match=re.escape("backend must be one of auto, reference, triton, cuda, cpu")):
        use_backend("fast")


def test_second_derivatives_and_transforms_are_refused():
    assert_transforms_refused(rms_norm_modulate, inputs((1, 2, 8)))


GOOD = {"x": torch.zeros(2, 3, 8), "weight": torch.ones(8), "scale": torch.zeros(2, 8), "eps": 1e-5}
BAD = [
    ({"x": torch.zeros(3, 8)}, "x must have 3 dimensions (B, T, D), got shape (3, 8)"),
    ({"x": [1.0]}, "x must be a tensor of shape (B, T, D), got list"),
    ({"weight": torch.ones(7)}, "weight must have shape (D) = (8), got (7,)"),
    ({"scale": torch.zeros(2, 3, 8)}, "scale must have shape (B, D) = (2, 8), got (2, 3, 8)"),
    ({"weight": torch.ones(8).long()}, "weight must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"scale": torch.zeros(2, 8).double()}, "scale is torch.float64 and x is torch.float32"),
    ({"weight": torch.ones(8, device="meta")}, "weight must be on cpu like x, got meta"),
    ({"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = GOOD | change
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm_modulate(call["x"], call["weight"], call["scale"], eps=call["eps"])
