"""Tests on a CUDA device. `--gpu-dry-run` runs the very same tests on the CPU, through Triton's interpreter and the
emulation of CUDA, with tiny shapes: it finds what is wrong with the tests, and skips only what is CUDA itself.

A test that takes `backend` runs on triton and, where the op has them and the extension is built, on the CUDA C++
kernels.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import has_kernels
from blip3o_fast.ops import _cuda, attention_implementations
from blip3o_fast.ops._attention_peers import NAMES as PEERS

HERE = Path(__file__).resolve().parent
NO_DEVICE = "needs a CUDA device (--gpu-dry-run runs these tests through Triton's interpreter)"

# cuBLAS is deterministic only with a workspace of its own; it reads this when it is loaded.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("blip3o_fast on a GPU")
    group.addoption("--gpu-dry-run", action="store_true", help="run tests/gpu on the CPU, with tiny shapes")
    group.addoption("--gpu-report", metavar="FILE", help="append a line of JSON per test of tests/gpu")


def is_dry(config: pytest.Config) -> bool:
    return bool(config.getoption("--gpu-dry-run", default=False))


def pytest_configure(config: pytest.Config) -> None:
    if is_dry(config):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["triton", "cuda"])


def is_absent(item: pytest.Item, cuda: bool) -> bool:
    """A test of the CUDA C++ kernels, of an op that has none or on a machine that has not built them (`cuda`), or of an
    attention by a package that cannot run here."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("attention") in PEERS and attention_implementations()[params["attention"]] is not None:
        return True
    return params.get("backend") == "cuda" and not (cuda and has_kernels(params["op"], "cuda"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    cuda = is_dry(config) or (torch.cuda.is_available() and _cuda.why_not("cuda", 0) is None)
    absent = {id(item) for item in own if is_absent(item, cuda)}
    if absent:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in absent])
        items[:] = [item for item in items if id(item) not in absent]
    if torch.cuda.is_available() or is_dry(config):
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))


class Report:
    """One line per test as soon as it is over, so that a run that is cut off has told what it did."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    path = session.config.getoption("--gpu-report", default=None)
    if path is not None and not hasattr(session.config, "workerinput"):  # xdist's workers report to the first process
        session.config.pluginmanager.register(Report(Path(path)))


@pytest.fixture
def dry(request: pytest.FixtureRequest) -> bool:
    return is_dry(request.config)


@pytest.fixture
def device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


@pytest.fixture(autouse=True)
def cuda_kernels_are_there(request: pytest.FixtureRequest, dry: bool) -> None:
    """In a dry run they are emulated."""
    callspec = getattr(request.node, "callspec", None)
    if dry and callspec is not None and callspec.params.get("backend") == "cuda":
        reason = request.getfixturevalue("emulated_cuda")
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture
def cuda_only(dry: bool) -> None:
    if dry:
        pytest.skip("streams and graphs are CUDA itself")


@pytest.fixture
def sized(dry: bool) -> Callable[[Any, Any], Any]:
    """`sized(full, tiny)`: the first on a device, the second in a dry run."""
    return lambda full, tiny: tiny if dry else full


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an output an op forgets to write fails its test. Stock's own operations
    may have no deterministic form; they only warn, which is not shown."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
