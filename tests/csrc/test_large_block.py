"""Large memory of the CPU kernels: handed out again, never to two owners, and owned like any tensor's."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from blip3o_fast import _ext
from blip3o_fast.models.peak import peak_bytes
from blip3o_fast.ops import _cpu, merged_linear, use_backend

pytestmark = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")
LARGE = (5 << 20, 2)  # 40 MB in fp32
PAGE = 2 << 20


def in_use() -> int:
    return _ext.C.large_blocks()[0]


def test_what_is_freed_is_used_again():
    before = in_use()
    first = _cpu.empty(*LARGE, dtype=torch.float32)
    first.fill_(3.0)
    assert in_use() - before == 40 << 20 and first.data_ptr() % PAGE == 0
    address = first.data_ptr()
    row = first[-1]  # a view keeps all of it
    del first
    assert in_use() - before == 40 << 20 and row.sum() == 6.0
    del row
    assert in_use() == before
    again = _cpu.empty(*LARGE, dtype=torch.float32)
    assert again.data_ptr() == address
    other = _cpu.empty(*LARGE, dtype=torch.float32)
    assert other.data_ptr() != address


def test_small_tensors_are_pytorchs():
    before = in_use()
    small = _cpu.empty(64, 1792, dtype=torch.float32)
    assert in_use() == before and small.shape == (64, 1792)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_tensor_like_any_other(dtype, tmp_path):
    made = _cpu.empty(*LARGE, 2, dtype=dtype)
    assert made.dtype == dtype and made.shape == (*LARGE, 2) and made.is_contiguous()
    made.copy_(torch.arange(2))
    torch.save(made, tmp_path / "made.pt")
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(tmp_path / "made.pt")):
        assert torch.equal(other, made)
    shared = made.clone().share_memory_()
    assert torch.equal(shared, made) and made.add(1).sum() == 3 * made.numel() // 2


@pytest.mark.parametrize("size", [0, -1])
def test_no_bytes(size):
    with pytest.raises(ValueError, match=f"bytes must be at least 1, got {size}"):
        _ext.C.LargeBlock(size)


@pytest.mark.parametrize("size", [1 << 46, (1 << 63) - 1])
def test_more_than_there_is(size):
    with pytest.raises(MemoryError):
        _ext.C.LargeBlock(size)


def test_no_block_has_two_owners():
    """Threads take, fill, look and give back."""
    wrong = []

    def work(mark: int) -> None:
        for round in range(20):
            made = _cpu.empty((3 + (mark + round) % 3) << 20, dtype=torch.float32)
            places = made[:: PAGE // 8]
            places.fill_(mark)
            if not bool((places == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_keeps_no_more_than_was_in_use():
    """In a process of its own: other sizes make room for a new one."""
    program = """
from blip3o_fast import _ext
from blip3o_fast.models.peak import peak_bytes
MB = 1 << 20
kept = [_ext.C.LargeBlock(size * MB) for size in (10, 20, 30)]
del kept
assert _ext.C.large_blocks() == (0, 60 * MB)
new = _ext.C.LargeBlock(40 * MB)
in_use, waiting = _ext.C.large_blocks()
assert in_use == 40 * MB and waiting <= 20 * MB, (in_use, waiting)
del new
same = [_ext.C.LargeBlock(size * MB) for size in (40,)]
assert _ext.C.large_blocks()[0] == 40 * MB
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_profiler_of_memory_sees_them():
    x, weight = torch.randn(32, 1024), torch.randn(2304, 1024, requires_grad=True)

    def backward() -> None:
        weight.grad = None
        with use_backend("cpu"):
            merged_linear(x, [weight]).square().sum().backward()

    assert peak_bytes(backward, torch.device("cpu")) >= weight.nbytes


def test_gradients_of_every_step_are_their_own():
    """A gradient that is kept is not overwritten by the next step's."""
    torch.manual_seed(0)
    x, weight = torch.randn(32, 1024), torch.randn(2304, 1024, requires_grad=True)
    before, kept = in_use(), []
    for scale in (1.0, 2.0, 3.0):
        weight.grad = None
        with use_backend("cpu"):
            (scale * merged_linear(x, [weight])).square().sum().backward()
        kept.append(weight.grad)
    assert in_use() > before
    for scale, gradient in zip((1.0, 2.0, 3.0), kept, strict=True):
        expected = 2 * scale**2 * (x.double() @ weight.detach().double().T).T @ x.double()
        assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
