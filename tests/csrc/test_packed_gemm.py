"""pack_linear and packed_linear in all their modes, with every instruction set of this machine."""

import itertools

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_fast.ops import _cpu
from blip3o_fast.ops._cpu import ISAS, use_isa
from blip3o_fast.testing import assert_contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
F32, BF16, INT8 = 0, 1, 2
# M, N, K: single elements, tails of rows, columns and K, odd K, more than one block of K, more than one chunk of rows
SHAPES = [(1, 2, 1), (5, 8, 3), (64, 200, 129), (100, 130, 515), (7, 64, 1792), (1000, 70, 33)]

pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ extension is not built")


def pack(weights: Tensor | list[Tensor], mode: int, swiglu: bool = False) -> Tensor:
    """Weights side by side in one buffer, which starts full of ones: padding must not be taken for granted."""
    blocks = [weights] if isinstance(weights, Tensor) else weights
    n, k = sum(w.shape[0] for w in blocks), blocks[0].shape[1]
    packed = torch.full((_cpu.call("packed_size", n, k, mode, swiglu),), 255, dtype=torch.uint8)
    first = 0
    for w in blocks:
        _cpu.call("pack_linear", w, packed, n, first, mode, swiglu)
        first += w.shape[0]
    return packed


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """y inside of a larger buffer, whose rest must stay as it was."""
    buffer = torch.full((x.shape[0] + 2, columns + 5), 7.0, dtype=dtype or x.dtype)
    y = buffer[1:-1, 2:-3]
    y.fill_(float("nan"))
    _cpu.call("packed_linear", x, packed, bias, y)
    around = buffer.clone()
    around[1:-1, 2:-3] = 7.0
    assert (around == 7.0).all(), "written outside of y"
    return y.clone()


def inputs(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w, b = inputs(m, n, k, dtype)
    with use_isa(isa):
        for mode, bias in itertools.product((F32, BF16) if dtype == torch.bfloat16 else (F32,), (None, b)):
            eager = F.linear(x, w, bias)
            gold = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert_contract(multiply(x, pack(w, mode), bias, n), eager, gold, f"{mode=}")
            glu = multiply(x, pack(w, mode, swiglu=True), bias, n // 2)
            assert_contract(glu, swiglu(eager), swiglu(gold), f"swiglu, {mode=}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES)
def test_bf16_weights_under_every_dtype(isa: str, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    x, w, b = inputs(19, 90, 131, torch.float32)
    x, w, b = x.to(x_dtype), w.bfloat16(), b.half()
    eager = F.linear(x.float(), w.float(), b.float()).to(y_dtype)
    gold = F.linear(x.double(), w.double(), b.double())
    with use_isa(isa):
        assert_contract(multiply(x, pack(w, BF16), b, 90, y_dtype), eager, gold)
        assert_contract(multiply(x, pack(w.float(), BF16), b, 90, y_dtype), eager, gold, "packed from fp32")


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Levels in int64 and the scale of each row, by the definition."""
    peak = x.float().abs().amax(dim=1, keepdim=True)
    levels = torch.round(x.float() * (torch.full_like(peak, 127) / peak)).clamp(-127, 127)
    return levels.long(), peak / 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_exact_integer_product(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w, b = inputs(m, n, k, dtype)
    (x_levels, x_scale), (w_levels, w_scale) = quantised(x), quantised(w)
    sums = x_levels @ w_levels.T
    expected = sums.float() * (x_scale * w_scale.T)
    for isa in ISAS:
        with use_isa(isa):
            y = multiply(x, pack(w, INT8), None, n, torch.float32)
            assert torch.equal(y, expected), isa
            biased = multiply(x, pack(w, INT8), b, n, torch.float32)
            torch.testing.assert_close(biased, expected + b.float(), rtol=1e-6, atol=1e-6)
            glu = multiply(x, pack(w, INT8, swiglu=True), b, n // 2, torch.float32)
            torch.testing.assert_close(glu, swiglu(expected + b.float()), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_extremes_do_not_saturate(isa: str) -> None:
    signs = torch.randint(0, 2, (150, 1000)) * 254.0 - 127.0
    signs[0], signs[-1] = 127.0, -127.0
    with use_isa(isa):
        assert torch.equal(multiply(signs, pack(signs, INT8), None, 150).double(), signs.double() @ signs.double().T)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_of_zeros_tiny_values_and_nan(isa: str) -> None:
    x, w, b = inputs(5, 70, 40, torch.float32)
    x[0], x[1], x[2, 3] = 0.0, 1e-42, float("nan")
    w[0] = 0.0
    with use_isa(isa):
        y = multiply(x, pack(w, INT8), b, 70)
    assert torch.equal(y[:2], b.expand(2, 70))
    assert y[2].isnan().all()
    assert torch.equal(y[3:, 0], b[:1].expand(2))
    assert y[3:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", [F32, BF16, INT8])
@pytest.mark.parametrize("glu", [False, True])
def test_weights_side_by_side(isa: str, mode: int, glu: bool) -> None:
    x, w, _ = inputs(9, 190, 37, torch.float32)
    pieces = [w[:3], w[3:100], w[100:100], w[100:].clone()]
    with use_isa(isa):
        assert torch.equal(pack(pieces, mode, glu), pack(w, mode, glu))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", [F32, BF16, INT8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(isa: str, mode: int, dtype: torch.dtype) -> None:
    x, w, b = inputs(20, 90, 34, dtype)
    wide, spaced, odd = torch.randn(20, 50).to(dtype), torch.randn(40, 102).to(dtype), torch.randn(20, 35).to(dtype)
    w_wide, b_spaced = torch.randn(180, 102).to(dtype)[::2, ::3], torch.randn(180).to(dtype)[::2]
    strided = [wide[:, 3:37], spaced[::2, ::3], odd[:, 1:], x[:1].expand(20, 34), torch.randn(34, 20).to(dtype).T]
    with use_isa(isa):
        packed, spaced_packed = pack(w, mode), pack(w_wide, mode)
        assert torch.equal(spaced_packed, pack(w_wide.contiguous(), mode))
        for one in strided:
            assert torch.equal(multiply(one, packed, b_spaced, 90), multiply(one.clone(), packed, b_spaced.clone(), 90))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", [F32, BF16, INT8])
def test_same_bits_for_any_number_of_threads(isa: str, mode: int) -> None:
    before = torch.get_num_threads()
    try:
        for m, n, k in ((1, 70, 300), (64, 200, 129), (300, 96, 130), (65, 64, 600)):
            x, w, b = inputs(m, n, k, torch.bfloat16)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with use_isa(isa):
                    results.append(multiply(x, pack(w, mode), b, n))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", [F32, BF16, INT8])
def test_rows_do_not_depend_on_each_other(isa: str, mode: int) -> None:
    x, w, b = inputs(64, 70, 300, torch.bfloat16)
    with use_isa(isa):
        packed = pack(w, mode)
        whole = multiply(x, packed, b, 70)
        for first, last in ((0, 0), (0, 1), (3, 10), (58, 64)):
            assert torch.equal(multiply(x[first:last], packed, b, 70), whole[first:last])


@pytest.mark.parametrize("isa", ISAS)
def test_bad_packs(isa: str) -> None:
    w = torch.randn(70, 40)
    with use_isa(isa):
        packed = torch.empty(_cpu.call("packed_size", 70, 40, F32, False), dtype=torch.uint8)
        offset = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:]
        for message, arguments in [
            ("w must be", (torch.randn(70), packed, 70, 0, F32, False)),
            ("w must be", (torch.ones(70, 40, dtype=torch.int64), packed, 70, 0, F32, False)),
            ("packed must be of .* bytes", (w[:, :39], packed, 70, 0, F32, False)),
            ("packed must be of .* bytes", (w, packed[:-64], 70, 0, F32, False)),
            ("packed must be aligned", (w, offset, 70, 0, F32, False)),
            ("packed must be uint8", (w, packed.view(torch.int8), 70, 0, F32, False)),
            ("first_column must leave room", (w, packed, 70, 1, F32, False)),
            ("first_column must leave room", (w, packed, 70, -1, F32, False)),
            ("mode must be", (w, packed, 70, 0, 3, False)),
            ("K must be", (w[:, :0], packed, 70, 0, F32, False)),
        ]:
            with pytest.raises(ValueError, match=message):
                _cpu.call("pack_linear", *arguments)
        for message, sizes in [
            ("N must be", (0, 40, F32, False)),
            ("N must be even", (71, 40, F32, True)),
            ("K must be", (70, 1 << 60, F32, False)),
            ("K must be at most", (70, 131073, INT8, False)),
            ("mode must be", (70, 40, -1, False)),
        ]:
            with pytest.raises(ValueError, match=message):
                _cpu.call("packed_size", *sizes)


@pytest.mark.parametrize("isa", ISAS)
def test_bad_products(isa: str) -> None:
    x, w, b = inputs(4, 70, 40, torch.float32)
    y = torch.empty(4, 70)
    with use_isa(isa):
        packed = pack(w, F32)
        for message, arguments in [
            ("x must be", (x[:, :39], packed, b, y)),
            ("x must be", (x.long(), packed, b, y)),
            ("x must be", (x[0], packed, b, y)),
            ("packed must be filled by pack_linear", (x, torch.zeros_like(packed), b, y)),
            ("packed must be filled by pack_linear", (x, packed[:32], b, y)),
            ("packed must be of .* bytes", (x, packed[:-4], b, y)),
            ("bias must be", (x, packed, b[:69], y)),
            ("bias must be", (x, packed, b.long(), y)),
            ("y must be", (x, packed, b, torch.empty(4, 35))),
            ("y must be", (x, pack(w, F32, swiglu=True), b, y)),
            ("y must be", (x, packed, b, y.double().long())),
            ("y must be contiguous within its rows", (x, packed, b, torch.empty(70, 4).T)),
            ("y must be without rows that overlap", (x, packed, b, torch.empty(1, 70).expand(4, 70))),
        ]:
            with pytest.raises(ValueError, match=message):
                _cpu.call("packed_linear", *arguments)


@pytest.mark.skipif(len(ISAS) < 3, reason="needs two instruction sets with panels of different widths")
def test_a_pack_for_other_panels_is_refused() -> None:
    x, w, b = inputs(4, 70, 40, torch.float32)
    with use_isa(ISAS[-1]):
        packed = pack(w, F32)
    with use_isa(ISAS[0]), pytest.raises(ValueError, match="packed must be packed for panels"):
        _cpu.call("packed_linear", x, packed, b, torch.empty(4, 70))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", [F32, BF16, INT8])
def test_leaves_the_x87_unit_usable(isa: str, mode: int) -> None:
    """A kernel that moves words through MMX registers would turn the next sum of long doubles into NaN."""
    x, w, _ = inputs(64, 200, 129, torch.float32)
    third = numpy.longdouble(1) / numpy.longdouble(3)
    with use_isa(isa):
        packed = pack(w, mode)
        assert third + third == 2 * third
        multiply(x, packed, None, 200)
        assert third + third == 2 * third
