"""What every test gets: a seed of its own, the backend it asks for, and Triton's interpreter where there is no GPU."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent

# Triton reads this when it is imported, so it stands before every test module. Where there is a GPU, tests/gpu runs
# kernels on it, and the other tests, which give them CPU tensors, need the variable from outside: `make test` sets it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed_of_the_test(request: pytest.FixtureRequest) -> None:
    """Seeded by the test's name: the same numbers alone, in the whole suite and in any order."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda_emulation() -> tuple[ModuleType | None, str | None]:
    """csrc/cuda compiled for the CPU (tests/emulation), or the reason why it cannot be."""
    spec = importlib.util.spec_from_file_location("emulation_build", HERE / "emulation" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    reason = build.why_not()
    return (build.cuda_module() if reason is None else None), reason


@pytest.fixture
def emulated_cuda(cuda_emulation: tuple[ModuleType | None, str | None]) -> Iterator[str | None]:
    """In this test the CUDA C++ kernels run on CPU tensors; the reason where they cannot."""
    from blip3o_fast.ops import _cuda

    module, reason = cuda_emulation
    _cuda.emulate(module)
    yield reason
    _cuda.emulate(None)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 to the 16 bits of bfloat16 as hardware does it: to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> Iterator[None]:
    """Two things that Triton's interpreter gets wrong about bfloat16, put right for the tests (`tests/kernels`).

    It cuts fp32 off where hardware rounds, and `tl.dot` multiplies the bit patterns of its operands.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return handle(round_to_bfloat16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return handle(widen_bfloat16(src.data), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *settings):
        a, b = (handle(widen_bfloat16(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, *settings)

    patch = pytest.MonkeyPatch()
    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_dot", create_dot)
    yield
    patch.undo()
