"""The kernel linear, c = a b on plain matrices, with every instruction set of this machine."""

import itertools

import pytest
import torch
from torch import Tensor

from blip3o_fast.ops import _cpu
from blip3o_fast.ops._cpu import ISAS, use_isa
from blip3o_fast.testing import assert_contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, N, K: single elements, tails of rows, columns and K, odd K, more than one block of K, more than one chunk of rows;
# the last three are tall: B is packed once for all chunks of rows, of one block of K or more
SHAPES = [(1, 1, 1), (5, 7, 3), (64, 200, 129), (13, 130, 515), (7, 64, 600), (300, 96, 130), (500, 70, 33)]
SHAPES += [(1000, 70, 33), (601, 130, 515), (1601, 64, 600)]

pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ extension is not built")


def matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    return (torch.randn(columns, rows).to(dtype).T if transposed else torch.randn(rows, columns).to(dtype)) * 0.3


def product(a: Tensor, b: Tensor, isa: str, dtype: torch.dtype | None = None) -> Tensor:
    """c inside of a larger buffer, whose rest must stay as it was."""
    rows, columns = a.shape[0], b.shape[1]
    buffer = torch.full((rows + 2, columns + 5), 7.0, dtype=dtype or a.dtype)
    c = buffer[1:-1, 2:-3]
    c.fill_(float("nan"))
    with use_isa(isa):
        _cpu.call("linear", a, b, c)
    around = buffer.clone()
    around[1:-1, 2:-3] = 7.0
    assert (around == 7.0).all(), "written outside of c"
    return c.clone()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_contract_in_every_layout(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for a_transposed, b_transposed in itertools.product((False, True), repeat=2):
        a, b = matrix(m, k, dtype, a_transposed), matrix(k, n, dtype, b_transposed)
        assert_contract(product(a, b, isa), a @ b, a.double() @ b.double(), f"{a_transposed=} {b_transposed=}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("a_dtype", "b_dtype", "c_dtype"), list(itertools.permutations(DTYPES)))
def test_mixed_dtypes(isa: str, a_dtype: torch.dtype, b_dtype: torch.dtype, c_dtype: torch.dtype) -> None:
    a, b = matrix(19, 83, a_dtype), matrix(83, 70, b_dtype, transposed=True)
    eager = (a.float() @ b.float()).to(c_dtype)
    assert_contract(product(a, b, isa, c_dtype), eager, a.double() @ b.double())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(isa: str, dtype: torch.dtype) -> None:
    m, n, k = 20, 75, 34
    sliced, spaced = matrix(m, k + 9, dtype)[:, 3 : 3 + k], matrix(2 * m, 3 * k, dtype)[::2, ::3]
    expanded = matrix(1, k, dtype).expand(m, k)
    b_sliced, b_spaced = matrix(k, n + 9, dtype)[:, 3 : 3 + n], matrix(n, 3 * k, dtype)[:, ::3].T
    b_apart = matrix(2 * k, 3 * n, dtype)[::2, ::3]
    for a, b in itertools.product((sliced, spaced, expanded), (b_sliced, b_spaced, b_apart)):
        assert_contract(product(a, b, isa), a @ b, a.double() @ b.double(), f"strides {a.stride()} {b.stride()}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for (m, n, k), transposed in itertools.product(
            [(7, 64, 600), (300, 96, 130), (64, 200, 129), (1001, 70, 300)], (False, True)
        ):
            a, b = matrix(m, k, dtype, transposed), matrix(k, n, dtype, not transposed)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(product(a, b, isa))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_depend_on_each_other(isa: str) -> None:
    a, b = matrix(700, 300, torch.float32), matrix(300, 70, torch.float32)
    whole = product(a, b, isa)
    for first, last in ((0, 1), (3, 10), (58, 64), (100, 500), (699, 700)):
        assert torch.equal(product(a[first:last], b, isa), whole[first:last])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(isa: str, dtype: torch.dtype) -> None:
    for m, n, k in ((0, 5, 3), (5, 0, 3), (0, 0, 0)):
        product(matrix(m, k, dtype), matrix(k, n, dtype), isa)
    assert (product(matrix(5, 0, dtype), matrix(0, 70, dtype), isa) == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row_and_column(isa: str, dtype: torch.dtype) -> None:
    a, b = matrix(9, 33, dtype), matrix(33, 70, dtype)
    a[2, 32], b[4, 69] = float("nan"), float("inf")
    c = product(a, b, isa)
    assert c[2].isnan().all()
    assert torch.equal(c.isfinite(), (a.float() @ b.float()).isfinite())


@pytest.mark.parametrize("isa", ISAS)
def test_bad_input(isa: str) -> None:
    a, b, c = torch.randn(4, 6), torch.randn(6, 8), torch.empty(4, 8)
    bad = [
        ("a must be", (torch.randn(4, 6, 1), b, c)),
        ("a must be", (torch.ones(4, 6, dtype=torch.int64), b, c)),
        ("b must be", (a, torch.randn(5, 8), c)),
        ("b must be", (a, None, c)),
        ("c must be", (a, b, torch.empty(4, 9))),
        ("c must be", (a, b, torch.empty(4, 8, dtype=torch.int32))),
        ("c must be contiguous within its rows", (a, b, torch.empty(8, 4).T)),
        ("c must be without rows that overlap", (a, b, torch.empty(1, 8).expand(4, 8))),
    ]
    with use_isa(isa):
        for message, arguments in bad:
            with pytest.raises(ValueError, match=message):
                _cpu.call("linear", *arguments)
