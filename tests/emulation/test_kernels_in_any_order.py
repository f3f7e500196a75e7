"""The kernels of csrc/cuda in other orders of threads and blocks: the same bits. Races within a block are reported by
the emulation itself; what one block leaves to another shows here.
"""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.cases import OPS, has_kernels, module_of
from blip3o_fast.ops import _cuda, use_backend
from blip3o_fast.testing import with_gradients


@pytest.fixture
def order(emulated_cuda: str | None) -> Iterator[Callable[[int], None]]:
    """Sets the order: 0 ascending, -1 descending, else the seed of a new order at every turn."""
    if emulated_cuda is not None:
        pytest.skip(emulated_cuda)
    set_order = ctypes.CDLL(_cuda._emulation.__file__).blip3o_emulation_order
    yield set_order
    set_order(0)


def check(order: Callable[[int], None], op: str, dtype: torch.dtype, sizes: dict[str, object]) -> None:
    case = module_of(op).case(3, dtype, "cpu", **sizes)
    results = []
    for number in (0, -1, 1, 2):
        order(number)
        with use_backend("cuda"):
            results.append(with_gradients(case.bound(case.ours), case.inputs, *case.upstream))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if has_kernels(op, "cuda")])
def test_the_order_changes_no_bit(op, dtype, order):
    check(order, op, dtype, module_of(op).SMALL)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_the_order_changes_no_bit_of_a_tile(key_heads, order):
    """The kernels for tensor cores, whose warps hand probabilities to each other, without and with groups of heads."""
    sizes = {"tokens": 64, "context": 64, "heads": 2, "key_heads": key_heads, "head_dim": 64}
    check(order, "dual_attention", torch.bfloat16, sizes)


def test_the_order_changes_no_bit_of_a_wide_row(order):
    """Several warps per row, and blocks of several rows."""
    check(order, "qk_norm_rope", torch.float32, {"grid": (10, 10), "heads": (9, 3), "head_dim": 64})
