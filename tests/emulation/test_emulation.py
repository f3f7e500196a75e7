"""The emulation of CUDA that the kernels of csrc/cuda are tested with: it computes what a GPU does, in any order of the
threads, and reports what would be a race, a deadlock or a fault there.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ORDERS = [0, -1, 1, 2, 3]

spec = importlib.util.spec_from_file_location("emulation_build", HERE / "build.py")
assert spec is not None and spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class Library:
    def __init__(self, path: Path) -> None:
        self.dll = ctypes.CDLL(str(path))

    def order(self, order: int) -> None:
        self.dll.blip3o_emulation_order(order)

    def __getattr__(self, name: str) -> Callable[..., str]:
        """A function of test_kernels.cu; it returns what the emulation has to complain of."""
        function = getattr(self.dll, name)
        function.restype = ctypes.c_char_p

        def call(*args: object) -> str:
            given = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in args]
            return function(*given).decode()

        return call


@pytest.fixture(scope="session")
def library() -> Library:
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    return Library(build.library("test_kernels", [HERE / "test_kernels.cu"]))


@pytest.fixture(params=ORDERS)
def kernels(request: pytest.FixtureRequest, library: Library) -> Iterator[Library]:
    library.order(request.param)
    yield library
    library.order(0)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("threads", [32, 224, 1024])
def test_reductions(kernels, threads):
    x = random(3, threads)
    sums, largest = np.empty_like(x), np.empty((3, threads // 32), np.float32)
    assert kernels.sum_of_blocks(x, sums, largest, 3, threads) == ""
    assert (sums == sums[:, :1]).all(), "every thread has the same sum"
    np.testing.assert_allclose(sums[:, 0], x.astype(np.float64).sum(1), atol=1e-4)
    assert (largest == x.reshape(3, -1, 32).max(2)).all()


def test_the_order_of_threads_changes_no_bit(library):
    x, results = random(3, 224), []
    for order in ORDERS:
        library.order(order)
        sums, largest = np.empty_like(x), np.empty((3, 7), np.float32)
        assert library.sum_of_blocks(x, sums, largest, 3, 224) == ""
        results.append(sums)
    library.order(0)
    assert all((sums == results[0]).all() for sums in results)


def test_shuffles_and_votes(kernels):
    x, y = random(32), np.empty((5, 32), np.float32)
    assert kernels.plain(b"shuffles_and_votes", x, y, 32) == ""
    lanes = np.arange(32)
    assert (y[0] == x[3]).all()
    assert (y[1] == x[np.where(lanes < 2, lanes, lanes - 2)]).all()
    assert (y[2] == x[np.where(lanes > 26, lanes, lanes + 5)]).all()
    assert (y[3].view(np.uint32) == sum(1 << i for i in range(32) if x[i] > 0)).all()
    assert (y[4] == 1).all()


def bits_of(x: np.ndarray, bf16: bool) -> np.ndarray:
    """Of numbers that bfloat16 holds exactly."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if bf16 else x.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "f16"])
def test_tensor_cores(kernels, bf16):
    """By way of asynchronous copies and ldmatrix, plain and transposed."""
    a, b, y = (np.round(random(*shape) * 16) / 16 for shape in ((16, 16), (16, 8), (16, 8)))
    expected = y + a @ b
    assert kernels.product(bits_of(a, bf16), bits_of(b, bf16), y, int(bf16), 1) == ""
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_a_copy_that_nobody_waits_for_has_not_landed(kernels):
    y = np.zeros((16, 8), np.float32)
    ones = bits_of(np.ones((16, 16), np.float32), True)
    assert kernels.product(ones, ones, y, 1, 0) == "" and np.isnan(y).all()


def test_conversions(library):
    """Ties, subnormals, overflow, infinities and NaN of half precision, and random bits."""
    generator = np.random.default_rng(1)
    x = generator.integers(0, 2**32, 4096, np.uint32).view(np.float32)
    x[:12] = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 2**-24, 2**-25, 1e-9, 3e38]
    x[2000:3000] = generator.standard_normal(1000) * np.exp2(generator.uniform(-28, 17, 1000))
    x[3000:3100] = (np.arange(100) * 2 + 1) * 2.0**-25  # ties among subnormals
    bf16, f16, wide = np.empty(4096, np.uint16), np.empty(4096, np.uint16), np.empty(4096, np.float32)
    assert library.conversions(x, bf16, f16, wide, 32) == ""
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    nan = np.isnan(x)
    assert (f16[~nan] == expected.view(np.uint16)[~nan]).all() and np.isnan(f16.view(np.float16)[nan]).all()
    assert (wide[~nan] == expected.astype(np.float32)[~nan]).all()
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert (bf16[~nan] == rounded[~nan]).all() and (bf16[nan] & 0x7FFF > 0x7F80).all()


@pytest.mark.parametrize(("name", "threads"), [(b"reverse", 96), (b"reverse_warp", 32)])
def test_shared_memory(kernels, name, threads):
    x, y = random(threads), np.empty(threads, np.float32)
    assert kernels.plain(name, x, y, threads) == "" and (y == x[::-1]).all()


@pytest.mark.parametrize(
    ("name", "threads", "problem"),
    [
        (b"reverse_without_barrier", 96, "a race on dynamic shared memory"),
        (b"reverse_warp_by_votes", 32, "a race on static shared memory"),
        (b"without_wait", 32, "the kernel does not begin with pdl_wait()"),
        (b"divergent_barrier", 64, "no thread can go on: 32 at __syncthreads (thread 0, ...) 32 ended"),
        (b"divergent_shuffle", 32, "no thread can go on: 31 in a warp's collective"),
        (b"shuffles_and_votes", 24, "a collective in a warp that is not whole"),
        (b"misaligned", 32, "a misaligned access to memory"),
    ],
)
def test_faults_are_reported(kernels, name, threads, problem):
    # aligned, so that one number further is not
    x, y = np.zeros(1024, np.float32), np.zeros(1024, np.float32)
    x = x[(-x.ctypes.data // 4) % 4 :]
    assert problem in kernels.plain(name, x, y, threads)
    assert kernels.plain(b"reverse", x, y, 32) == "", "the next launch is as if nothing had been"


def test_shared_memory_begins_as_nan(library):
    y = np.zeros(32, np.float32)
    assert library.plain(b"never_written", y, y, 32) == "" and np.isnan(y).all()
