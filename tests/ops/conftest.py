"""Op tests run with uninitialised memory filled with NaN, so that an output an op forgets to write fails its test."""

from collections.abc import Iterator

import pytest
import torch

from blip3o_fast import _ext


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    """PyTorch's deterministic mode fills every `torch.empty` with NaN; ops must work under that mode anyway."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs on each backend of its op; the op's BACKENDS stand in the test module's OP."""
    if "backend" in metafunc.fixturenames:
        names = ["reference", *metafunc.module.OP.BACKENDS.refusals]
        metafunc.parametrize("backend", names)


@pytest.fixture(autouse=True)
def backend_is_built(request: pytest.FixtureRequest) -> None:
    """A csrc backend is tested where it is built; elsewhere the skip says why it is not."""
    if request.node.callspec.params.get("backend") == "cpu" if hasattr(request.node, "callspec") else False:
        if _ext.C is None:
            pytest.skip(_ext.ERROR)
