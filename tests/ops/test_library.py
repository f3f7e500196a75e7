"""Raw ops skip the dispatcher where nobody looks on, and only there."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import _ext
from blip3o_fast.ops import _library as library
from blip3o_fast.ops import debug_ops, gated_residual, use_backend

needs_extension = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, bool]]:
    """gated_residual's result, and whether the dispatcher was asked."""
    x, y, gate, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(8)
    asked = []
    op = torch.ops.blip3o_fast.gated_residual_fwd.default

    def counted(given: Any, *args: Any) -> Any:
        direct: list[bool] = []
        real = library._IMPLEMENTATIONS[op]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(library._IMPLEMENTATIONS, op, lambda *a: (direct.append(True), real(*a))[1])
            result = library_run(given, *args)
        asked.append(not direct)
        return result

    library_run = library.run
    module = sys.modules["blip3o_fast.ops.gated_residual"]
    monkeypatch.setattr(module, "run", counted)

    def run(kind: type | None = None, trained: bool = False) -> tuple[Tensor, bool]:
        del asked[:]
        given = x if kind is None else kind(x)
        result = gated_residual(given, y, gate, nn.Parameter(weight) if trained else weight)
        return result.detach().as_subclass(Tensor), asked == [True]

    return run


@needs_extension
def test_nobody_looks_on(call):
    direct, asked = call()
    assert not asked
    assert not call(trained=True)[1]  # from inside of the autograd.Function
    with use_backend("reference"):
        assert call()[1]
    torch.testing.assert_close(direct, call()[0])


@needs_extension
@pytest.mark.parametrize("why", ["mode", "profiler", "debug", "autocast", "subclass"])
def test_somebody_does(call, why):
    expected = call()[0]
    if why == "subclass":
        result, asked = call(Subclass)
    elif why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            result, asked = call()
    elif why == "debug":
        with debug_ops():
            result, asked = call()
    elif why == "profiler":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result, asked = call()
        names = {event.key for event in profile.key_averages()}
        assert {"blip3o_fast::gated_residual_fwd", "blip3o_fast.gated_residual"} <= names
    else:
        with Seen() as seen:
            result, asked = call()
        assert "blip3o_fast.gated_residual_fwd.default" in seen.names
    assert asked
    assert torch.equal(result, expected)
