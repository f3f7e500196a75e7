"""Op tests run with uninitialised memory filled with NaN, so that an output an op forgets to write fails its test."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.ops import _cpu, use_backend
from blip3o_fast.testing import with_gradients


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    """PyTorch's deterministic mode fills every `torch.empty` with NaN; ops must work under that mode anyway."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Variant(str):
    """A backend's name that remembers which instruction set its kernels shall run with."""

    isa: str | None = None


def variants(name: str) -> list[Variant]:
    """The backend itself, or one variant per instruction set of this machine."""
    if name != "cpu" or not _cpu.ISAS:
        return [Variant(name)]
    found = []
    for isa in _cpu.ISAS:
        variant = Variant(name)
        variant.isa = isa
        found.append(variant)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs on each backend of its op; the op's BACKENDS stand in the test module's OP."""
    if "backend" in metafunc.fixturenames:
        names = [v for name in ("reference", *metafunc.module.OP.BACKENDS.refusals) for v in variants(name)]
        metafunc.parametrize("backend", names, ids=[f"{v}-{v.isa}" if v.isa else str(v) for v in names])


@pytest.fixture(autouse=True)
def backend_is_built(request: pytest.FixtureRequest, emulated_cuda: str | None) -> Iterator[None]:
    """A csrc backend is tested where it is built, with the instruction set of the variant; the skip says why not."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend == "cpu" and _ext.C is None:
        pytest.skip(_ext.ERROR)
    if backend == "cuda" and emulated_cuda is not None:
        pytest.skip(emulated_cuda)
    with _cpu.use_isa(getattr(backend, "isa", None) or "auto"):
        yield


@pytest.fixture
def cpu_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C++ kernels called from here on."""
    if _ext.C is None:
        pytest.skip(_ext.ERROR)
    names: list[str] = []
    call = _cpu.call
    monkeypatch.setattr(_cpu, "call", lambda name, *args: (names.append(name), call(name, *args))[1])
    return names


@pytest.fixture
def threads_agree() -> Iterator[Callable[..., None]]:
    """A check that the C++ kernels give the same bytes, forward and backward, with 1, 2 and 5 threads."""
    if _ext.C is None:
        pytest.skip(_ext.ERROR)
    threads = torch.get_num_threads()

    def check(op: Callable[..., Any], inputs: Mapping[str, Tensor | None], *upstream: Tensor) -> None:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with use_backend("cpu"):
                results.append(with_gradients(op, inputs, *upstream))
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(value, other[name]), name

    yield check
    torch.set_num_threads(threads)
