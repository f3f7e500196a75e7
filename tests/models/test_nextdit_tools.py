"""The model under hooks, freezing, copying, tracing; and how many launches a block is."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.models.forward import Grid
from blip3o_fast.models.layout import adjacent, projection_groups
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.rope import kept_rope_table
from blip3o_fast.ops import use_backend

TINY = BLIP3oConfig.preset("tiny")


@pytest.fixture
def model() -> BLIP3oDiT:
    net = BLIP3oDiT(TINY)
    with torch.no_grad():
        for block in net.layers:
            block.gate.normal_()
    return net


def arguments(batch: int = 2, context: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, 64, 16, dtype=dtype),
        torch.rand(batch) * 1000,
        torch.randn(batch, context, 24, dtype=dtype),
    )


def assert_gradients_close(grads: Any, expected: Any) -> None:
    largest = max(grad.norm().item() for grad in expected)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert (grad - expected_grad).norm().item() <= 1e-4 * expected_grad.norm().item() + 1e-6 * largest


# ---- hooks and freezing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["layers.0", "layers.1", "layers.0.attn1.to_q", "layers.1.feed_forward.linear_3", "layers.1.norm1.linear"]
    + [
        "layers.0.norm2",
        "layers.1.attn1.norm_q",
        "layers.1.norm1.norm",
        "layers.0.attn2.to_out.0",
        "norm_out.linear_2",
    ],
)
def test_hooks_see_what_stock_would_show(name: str, stock_pair: Any, inputs: Any) -> None:
    stock, ours = stock_pair(TINY)
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: Any, out: Any) -> None:
        seen.append(out)

    call = inputs(TINY)
    stock.backbone.get_submodule(name).register_forward_hook(hook)
    ours.get_submodule(name).register_forward_hook(hook)
    error = (ours(*call) - stock(*call)).abs().max().item()
    assert error <= 1e-5
    mine, theirs = seen
    assert (mine - theirs).abs().max().item() <= 2e-5


def test_a_hook_may_replace_a_projection(model: BLIP3oDiT) -> None:
    call = arguments()
    for name in ("layers.0.attn1.to_v", "layers.0.attn2.to_v"):
        model.get_submodule(name).register_forward_hook(lambda _module, _given, out: torch.zeros_like(out))
    torch.testing.assert_close(model(*call), eager_forward(model, *call), atol=1e-5, rtol=0)


def test_freezing_by_name(model: BLIP3oDiT) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn1.to_k" in name or name.endswith("gate"))
    out = model(*arguments())
    out.backward(torch.randn_like(out))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.num_parameters(only_trainable=True) == 2 * (64 * 64 + 2)


# ---- copies ---------------------------------------------------------------------------------------------------------


def _lies_side_by_side(net: BLIP3oDiT) -> bool:
    return all(adjacent([l.weight for l in group]) for block in net.layers for group in projection_groups(block))


def test_deepcopy(model: BLIP3oDiT) -> None:
    other = copy.deepcopy(model)
    call = arguments()
    assert torch.equal(other(*call), model(*call))
    assert _lies_side_by_side(other)
    before = model(*call)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(*call), before)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickle(way: str, model: BLIP3oDiT) -> None:
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    call = arguments()
    assert torch.equal(other(*call), model(*call))
    assert other.config == model.config and _lies_side_by_side(other)


# ---- launches -------------------------------------------------------------------------------------------------------
class _Launches(TorchDispatchMode):
    """What computes, views and profiler ranges left out; an op of ours counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func is not torch.ops.aten._unsafe_view.default and func.namespace != "profiler":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_launches_of_a_block() -> None:
    """13 forward, at most 44 with backward, where stock has 107 and 278; between blocks, as in training."""
    with torch.device("meta"):
        net = BLIP3oDiT(BLIP3oConfig(num_layers=2))
        h, normed = (torch.empty(2, 64, 1792, requires_grad=True) for _ in range(2))
        conditioning = torch.empty(2, 1024, requires_grad=True)
        context = torch.empty(2, 64, 1792, requires_grad=True)
        modulation = torch.empty(2, 4 * 1792, requires_grad=True).chunk(4, dim=1)
        upstream = torch.empty(2, 64, 1792), torch.empty(2, 64, 1792)
        grid = Grid(kept_rope_table(8, 8, 64, torch.device("meta")))
    # "auto" may choose PyTorch's attention on a CPU, of which several operations are seen
    with use_backend("reference"), _Launches() as launches:
        out = net.layers[0](h, conditioning, context, grid, conditioning, normed, modulation, following=net.layers[1])
        assert len(launches.names) == 13, launches.names
        torch.autograd.backward(out[:2], upstream)
    assert len(launches.names) <= 44, launches.names


# ---- tracing --------------------------------------------------------------------------------------------------------


def test_compiles_whole(model: BLIP3oDiT) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        call = arguments(batch)
        upstream = torch.randn(batch, 64, 16)
        expected = model(*call)
        expected_grads = torch.autograd.grad(expected, list(model.parameters()), upstream)
        out = compiled(*call)
        grads = torch.autograd.grad(out, list(model.parameters()), upstream)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        assert_gradients_close(grads, expected_grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "no compilation per batch size"
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool, model: BLIP3oDiT) -> None:
    call = arguments()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.eval(), call, strict=strict)
        out = program.module()(*call)
    torch.testing.assert_close(out, model(*call), atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_inference_mode_leaves_nothing_behind(model: BLIP3oDiT) -> None:
    grid = torch.randn(1, 16, 5, 7), torch.rand(1), torch.randn(1, 5, 24)  # a grid whose table is not kept yet
    with torch.inference_mode():
        model(*grid)
    model(*grid).sum().backward()
