"""packed_linear against torch's linear in fp64, in every storage, and what a change of the weights does to a pack."""

import importlib
import re

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast import _ext
from blip3o_fast.ops import PackedWeights, _cpu, packed_linear, packed_linear_ref
from blip3o_fast.testing import assert_contract, relative_l2

OP = importlib.import_module("blip3o_fast.ops.packed_linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _cpu.ISAS or ["none"]
pytestmark = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with _cpu.use_isa(request.param):
        yield request.param


def eager(x: Tensor, weights: list[Tensor], bias: Tensor | None = None, swiglu: bool = False) -> Tensor:
    """Stock's layers in x's dtype, then its silu."""
    y = nn.functional.linear(x, torch.cat(weights).to(x.dtype), None if bias is None else bias.to(x.dtype))
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = nn.functional.silu(gate.float()).to(gate.dtype) * up
    return y


def gold(x: Tensor, weights: list[Tensor], bias: Tensor | None = None, swiglu: bool = False) -> Tensor:
    return packed_linear_ref(x.double(), PackedWeights(weights, bias, swiglu=swiglu))


def draw(rows: tuple[int, ...], outs: tuple[int, ...], inner: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(*rows, inner).to(dtype)
    return x, [(torch.randn(out, inner) / inner**0.5).to(dtype) for out in outs]


def test_reference_is_linear():
    x, weights = draw((2, 3), (5, 5), 7, torch.float32)
    x, bias = x.double(), torch.randn(10)
    expected = nn.functional.linear(x, torch.cat(weights).double(), bias.double())
    torch.testing.assert_close(packed_linear_ref(x, PackedWeights(weights, bias)), expected, rtol=1e-14, atol=1e-14)
    gate, up = expected.chunk(2, -1)
    silu = nn.functional.silu(gate) * up
    both = packed_linear_ref(x, PackedWeights(weights, bias, swiglu=True))
    torch.testing.assert_close(both, silu, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outs", "inner"),
    [((64,), (96, 96), 257), ((2, 5), (33, 33), 64), ((1,), (7, 7), 1), ((0,), (8, 8), 16), ((3, 0), (8, 8), 16)],
)
def test_exact_storages_keep_the_contract(rows, outs, inner, dtype, biased, swiglu):
    x, weights = draw(rows, outs, inner, dtype)
    bias = torch.randn(sum(outs)).to(dtype) if biased else None
    # bfloat16 holds a float16 weight not exactly: fp32 does both
    for storage in ("fp32", "bf16") if dtype == torch.bfloat16 else ("fp32",):
        y = packed_linear(x, PackedWeights(weights, bias, storage=storage, swiglu=swiglu))
        assert y.dtype == dtype
        expected = gold(x, weights, bias, swiglu)
        assert_contract(y, eager(x, weights, bias, swiglu), expected, storage)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_storage_rounds_only_the_weights(dtype):
    x, weights = draw((64,), (128,), 192, dtype)
    rounded = [w.bfloat16().to(w.dtype) for w in weights]
    y = packed_linear(x, PackedWeights(weights, storage="bf16"))
    assert_contract(y, eager(x, rounded), gold(x, rounded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_what_it_says(dtype):
    """One scale per output channel and per row of x, 127 levels to each side, exact sums."""
    x, weights = draw((16,), (40, 24), 96, dtype)
    weight, wide = torch.cat(weights).double(), x.double()
    scale_w, scale_x = (m.abs().amax(1, keepdim=True).float().double() / 127 for m in (weight, wide))
    expected = torch.round(wide / scale_x) @ torch.round(weight / scale_w).t() * scale_x * scale_w.t()
    y = packed_linear(x, PackedWeights(weights, storage="int8"))
    # a quotient next to a half may be rounded either way: one level of one term
    assert relative_l2(y, expected) < 2e-3 + torch.finfo(dtype).eps
    assert relative_l2(y, wide @ weight.t()) < 0.02


def test_int8_of_zeros_and_of_a_large_channel():
    weight = torch.randn(8, 32)
    weight[3], weight[5] = 0, weight[5] * 1e4
    x = torch.randn(4, 32)
    x[2] = 0
    y = packed_linear(x, PackedWeights([weight], storage="int8"))
    assert y.isfinite().all() and (y[2] == 0).all() and (y[:, 3] == 0).all()
    assert relative_l2(y[:, 5], x @ weight[5]) < 0.03


def test_reads_strided_rows_and_writes_where_it_is_told():
    x, weights = draw((6, 8), (16,), 32, torch.float32)
    packed = PackedWeights(weights)
    wide = torch.randn(6, 8, 48)
    wide[..., 8:40] = x
    out = torch.full((6, 8, 16), float("nan"), dtype=torch.bfloat16)
    assert packed_linear(wide[..., 8:40], packed, out=out) is out
    assert_contract(out, eager(x, weights).bfloat16(), gold(x, weights))
    assert torch.equal(packed_linear(wide[..., 8:40], packed), packed_linear(x, packed))


@pytest.mark.parametrize("storage", OP.STORAGE)
def test_threads_change_no_bit(storage):
    x, weights = draw((37,), (96, 40), 130, torch.float32)
    packed, threads, results = PackedWeights(weights, storage=storage), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(packed_linear(x, packed))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_changed_weight_is_noticed(isa):
    x, (weight,) = draw((4,), (8,), 16, torch.float32)
    packed = PackedWeights([weight])
    assert not packed.stale
    weight.mul_(2)
    assert packed.stale
    packed.pack()
    assert not packed.stale
    assert_contract(packed_linear(x, packed), eager(x, [weight]), gold(x, [weight]))
    weight.data = torch.randn(8, 16)
    assert packed.stale
    packed.pack()
    for other in set(ISAS) - {isa}:
        with _cpu.use_isa(other):
            assert packed.stale, "each instruction set has a layout of its own"


def test_half_and_quarter_of_the_memory():
    _, weights = draw((1,), (1792,), 1792, torch.float32)
    sizes = {storage: PackedWeights(weights, storage=storage).nbytes for storage in OP.STORAGE}
    assert sizes["bf16"] / sizes["fp32"] < 0.51 and sizes["int8"] / sizes["fp32"] < 0.26


W, X = torch.zeros(4, 8), torch.zeros(2, 8)
BAD = [
    (lambda: PackedWeights([]), "weights must be a list or tuple of at least one tensor, got list"),
    (lambda: PackedWeights([W], storage="int4"), "storage must be one of fp32, bf16, int8, got 'int4'"),
    (lambda: PackedWeights([W, torch.zeros(4, 7)]), "weights[1] must have shape (N, K) = (4, 8), got (4, 7)"),
    (lambda: PackedWeights([W.double()]), "weights[0] cannot be packed: its cpu kernel takes float32, bfloat16"),
    (lambda: PackedWeights([W.to("meta")]), "weights[0] cannot be packed: it is on meta"),
    (lambda: PackedWeights([W], swiglu=True), "weights must be w1 and w3 of one shape with swiglu, got [(4, 8)]"),
    (lambda: PackedWeights([W], torch.zeros(3)), "bias must have shape (N) = (4), got (3,)"),
    (lambda: packed_linear(X, W), "packed must be PackedWeights, got Tensor"),
    (lambda: packed_linear(X[:, :5], PackedWeights([W])), "x must be a tensor of shape (..., 8), got shape (2, 5)"),
    (lambda: packed_linear(X.double(), PackedWeights([W])), "x cannot be multiplied by packed weights"),
    (lambda: packed_linear(X, PackedWeights([W]), out=X), "out must be contiguous of shape (2, 4), got (2, 8)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
