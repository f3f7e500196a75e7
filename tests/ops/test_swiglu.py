"""swiglu against diffusers' FP32SiLU and LuminaFeedForward, torch's silu in fp64, and the numerics contract."""

import importlib
import math
import re
from collections.abc import Callable

import pytest
import torch
from diffusers.models.activations import FP32SiLU
from diffusers.models.attention import LuminaFeedForward
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import _cpu, swiglu, swiglu_ref, use_backend
from blip3o_fast.testing import (
    assert_compiles_once,
    assert_contract,
    assert_deterministic,
    assert_needed_gradients,
    assert_op_contract,
    assert_rounded_once,
    assert_transforms_refused,
    with_gradients,
)

OP = importlib.import_module("blip3o_fast.ops.swiglu")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 5, 256),
    (1, 64, 34),
    (3, 5, 514),
    (1, 1, 2),
    (7, 66),
    (2, 3, 4, 10),
    (0, 64, 32),
    (2, 0, 8),
    (10,),
    (1, 2, 9728),
]
OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy says it aloud


def halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2)


def eager(gate_up: Tensor) -> Tensor:
    a, b = gate_up.chunk(2, dim=-1)
    return FP32SiLU()(a) * b


def test_reference_is_silu_times_up():
    gate_up = torch.randn(3, 5, 24, dtype=torch.float64)
    a, b = gate_up[..., :12], gate_up[..., 12:]
    expected = torch.nn.functional.silu(a) * b
    torch.testing.assert_close(swiglu_ref(gate_up), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(swiglu(gate_up), expected, rtol=1e-14, atol=1e-14)


def test_is_the_middle_of_diffusers_feed_forward():
    feed_forward = LuminaFeedForward(dim=24, inner_dim=40, multiple_of=8)
    x = torch.randn(2, 5, 24)
    packed = torch.cat([feed_forward.linear_1(x), feed_forward.linear_3(x)], dim=-1)
    torch.testing.assert_close(feed_forward.linear_2(swiglu(packed)), feed_forward(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtype):
    def calls(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda gate_up: torch.stack([op(one) for one in gate_up.unbind()])

    # Of a few numbers stock may be exact by luck: small shapes are judged over many calls.
    count = 64 if 0 < math.prod(shape) < 32 else 1
    inputs = {"gate_up": 3 * torch.randn(count, *shape).to(dtype)}
    with use_backend(backend):
        assert_op_contract(*map(calls, (swiglu, eager, swiglu_ref)), inputs, torch.randn(count, *halved(shape)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(backend, dtype):
    inputs, dy = {"gate_up": torch.randn(4, 16, 96).to(dtype)}, torch.randn(4, 16, 48).to(dtype)
    with use_backend(backend):
        ours = with_gradients(swiglu, inputs, dy)
    gold = with_gradients(swiglu_ref, {"gate_up": inputs["gate_up"].double()}, dy)
    for name, value in ours.items():
        assert_rounded_once(value, gold[name], name)


def test_cpu_kernels_are_called(cpu_calls):
    with_gradients(swiglu, {"gate_up": torch.randn(2, 3, 16)}, torch.randn(2, 3, 8))
    assert cpu_calls == ["swiglu_fwd", "swiglu_bwd"]


def test_threads_change_no_bit(threads_agree):
    threads_agree(swiglu, {"gate_up": 3 * torch.randn(5, 2 * 1100)}, torch.randn(5, 1100))


def test_triton_kernels_are_launched():
    with use_backend("triton"), recording() as launches:
        with_gradients(swiglu, {"gate_up": torch.randn(2, 3, 16)}, torch.randn(2, 3, 8))
    assert [launch.name for launch in launches] == ["swiglu_fwd", "swiglu_bwd"]


def test_triton_reads_rows_where_they_lie():
    """Rows of a wider matrix and an empty batch: no copy, and nothing to launch."""
    wide = torch.randn(6, 100)
    with use_backend("triton"), recording() as launches:
        with_gradients(swiglu, {"gate_up": wide[:0]}, torch.randn(0, 50))
        with_gradients(swiglu, {"gate_up": wide[::2, 4:52]}, torch.randn(3, 24))
    forward, backward = launches
    assert forward.args[0].data_ptr() == backward.args[1].data_ptr() == wide[:, 4:].data_ptr()


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, (3 * torch.randn(2, 3, 10, dtype=torch.float64)).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend, dtype):
    """Column slices, every other row, transposed and expanded upstream gradients: read where they lie."""
    wide = torch.randn(2, 6, 20).to(dtype)
    for gate_up in (
        wide[:, ::2, 4:16],
        wide[..., ::2][:, :3, :8],
        wide.transpose(1, 2)[:, :3],
        wide[:1].expand(2, 6, 20),
        wide[0, :, 4:16],
    ):
        shape = halved(tuple(gate_up.shape))
        for dy in (torch.randn(*shape[:-2], shape[-1], shape[-2]).mT, torch.randn((1,) * len(shape)).expand(shape)):
            with use_backend(backend):
                assert_op_contract(swiglu, eager, swiglu_ref, {"gate_up": gate_up}, dy)


def test_many_dimensions(backend):
    """More than a cpu kernel counts through, and not one block of memory."""
    gate_up = torch.randn(2, 1, 3, 1, 2, 2, 12)[..., ::2, :]
    with use_backend(backend):
        assert_op_contract(swiglu, eager, swiglu_ref, {"gate_up": gate_up}, torch.randn(2, 1, 3, 1, 2, 1, 6))


def test_deterministic(backend):
    with use_backend(backend):
        assert_deterministic(swiglu, {"gate_up": torch.randn(3, 5, 96)}, torch.randn(3, 5, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    gate_up = torch.randn(2, 3, 16)
    torch.library.opcheck(OP._swiglu_fwd, (gate_up, dtype, backend))
    torch.library.opcheck(OP._swiglu_bwd, (torch.randn(2, 3, 8).to(dtype), gate_up, backend))


def test_compile_does_not_recompile_per_batch(backend):
    with use_backend(backend):
        assert_compiles_once(swiglu, lambda batch: ({"gate_up": torch.randn(batch, 4, 16)}, [torch.randn(batch, 4, 8)]))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_returns_its_dtype(backend, dtype, given):
    inputs = {"gate_up": torch.randn(2, 8, 64).to(given)}
    with torch.autocast("cpu", dtype), use_backend(backend):
        assert_op_contract(swiglu, eager, swiglu_ref, inputs, torch.randn(2, 8, 32), dtypes=[dtype])
    assert swiglu(inputs["gate_up"].double()).dtype == torch.float64


@OVERFLOWS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_stay_finite(backend, dtype):
    """sigmoid saturates in both directions; nothing becomes 0 * inf."""
    a = torch.tensor([-6e4, -1e3, -90.0, -20.0, -0.0, 20.0, 90.0, 1e3, 6e4])
    inputs = {"gate_up": torch.cat([a, torch.ones_like(a)]).to(dtype)}
    with use_backend(backend):
        results = with_gradients(swiglu, inputs, torch.ones_like(a))
    gold = with_gradients(swiglu_ref, {"gate_up": inputs["gate_up"].double()}, torch.ones_like(a))
    for name, value in results.items():
        assert value.isfinite().all(), name
        assert_contract(value, gold[name].to(dtype), gold[name], name)


@pytest.mark.parametrize("isa", _cpu.ISAS)
def test_sigmoid_over_all_of_fp32(isa):
    """Subnormal numbers, infinities and NaN among a million bit patterns. Below -88 the sigmoid loses digits to 0."""
    a = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
    with _cpu.use_isa(isa), use_backend("cpu"):
        results = with_gradients(swiglu, {"gate_up": torch.cat([a, torch.ones_like(a)])}, torch.ones_like(a))
    gold = with_gradients(swiglu_ref, {"gate_up": torch.cat([a, torch.ones_like(a)]).double()}, torch.ones_like(a))
    torch.testing.assert_close(results["y"].double(), gold["y"], rtol=5 * 2**-24, atol=4e-37, equal_nan=True)
    finite = a.isfinite()  # the derivative at infinity is 1 and 0, which the formula, inf * 0, does not say
    ours, exact = (side["dgate_up"].double()[: len(a)][finite] for side in (results, gold))
    # 1 - s is exact to 2^-24, and is multiplied by an a of at most 17: above, s is 1
    torch.testing.assert_close(ours, exact, rtol=5 * 2**-24, atol=17 * 2**-24)


def test_nan_is_not_hidden(backend):
    gate_up = torch.randn(1, 2, 8)
    gate_up[0, 1, 2] = float("nan")
    with use_backend(backend):
        y = swiglu(gate_up)
    assert y[0, 1, 2].isnan() and y.isnan().sum() == 1


def test_gradient_only_where_needed():
    assert_needed_gradients(swiglu, {"gate_up": torch.randn(2, 3, 8)}, torch.randn(2, 3, 4))
    with torch.no_grad():
        assert not swiglu(torch.randn(2, 8, requires_grad=True)).requires_grad


def test_names_what_cannot_run():
    message = "backend 'triton' cannot run swiglu: its triton kernel takes float32, bfloat16 and float16"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        swiglu(torch.randn(2, 8).double())
    with use_backend("cuda"), pytest.raises(RuntimeError, match="it has no cuda kernel yet"):
        swiglu(torch.randn(2, 8))
    message = "its cpu kernel takes float32, bfloat16 and float16, got torch.float64"
    if _ext.C is not None:
        with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
            swiglu(torch.randn(2, 8).double())


def test_second_derivatives_and_transforms_are_refused():
    assert_transforms_refused(swiglu, {"gate_up": torch.randn(1, 2, 8)})


BAD = [
    ([1.0, 2.0], "gate_up must be a tensor of shape (..., 2F), got list"),
    (torch.tensor(1.0), "gate_up must have shape (..., 2F) with an even last dimension, got shape ()"),
    (torch.zeros(2, 7), "gate_up must have shape (..., 2F) with an even last dimension, got shape (2, 7)"),
    (torch.zeros(2, 8).long(), "gate_up must be float32, bfloat16, float16 or float64, got torch.int64"),
]


@pytest.mark.parametrize(("gate_up", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(gate_up, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        swiglu(gate_up)
