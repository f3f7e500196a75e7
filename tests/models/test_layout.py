"""Weights that one GEMM reads are neighbours, parameters stay the objects they are, and neither is ever needed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import adjacent, lay_side_by_side, projection_groups
from blip3o_fast.models.nextdit import BLIP3oDiT

TINY = BLIP3oConfig.preset("tiny")


def lies_side_by_side(model: BLIP3oDiT) -> bool:
    return all(adjacent([l.weight for l in group]) for block in model.layers for group in projection_groups(block))


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 64, 16, dtype=dtype), torch.rand(2), torch.randn(2, 5, 24, dtype=dtype)


@pytest.mark.parametrize(
    "overrides", [{}, {"context_projection": False}, {"num_attention_heads": 4, "num_kv_heads": 1}], ids=str
)
def test_lies_side_by_side_from_the_start(overrides: dict[str, Any]) -> None:
    assert lies_side_by_side(BLIP3oDiT(BLIP3oConfig.preset("tiny", **overrides)))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.bfloat16().float(),
        lambda model: model.half(),
        lambda model: model.to(torch.float64),
        lambda model: model.layers[0].double().float(),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: model.apply(lambda module: module),
        lambda model: model.share_memory(),
        lambda model: model.to_empty(device="cpu"),
    ],
    ids=["double", "there-and-back", "half", "to", "a-block", "assign", "load", "apply", "share", "to_empty"],
)
def test_is_laid_again_after(change: Any) -> None:
    model = BLIP3oDiT(TINY)
    change(model)
    assert lies_side_by_side(model)


def test_parameters_stay_the_same_objects() -> None:
    model = BLIP3oDiT(TINY)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.double()
    model.load_state_dict(model.state_dict())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_optimizer_state_survives() -> None:
    """Two steps of Adam with a re-laid storage between them are two steps of Adam."""
    torch.manual_seed(0)
    models = [BLIP3oDiT(TINY)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    call, upstream = arguments(), torch.randn(2, 64, 16)
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(*call).backward(upstream)
            optimizer.step()
        if step == 0:
            states = {id(p): optimizers[1].state[p]["exp_avg"].clone() for p in models[1].parameters()}
            models[1].double().float()  # fp64 holds every fp32 exactly
            for parameter in models[1].parameters():
                assert torch.equal(optimizers[1].state[parameter]["exp_avg"], states[id(parameter)])
    assert lies_side_by_side(models[1])
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scattered_weights_give_the_same(dtype: torch.dtype) -> None:
    model = BLIP3oDiT(TINY).to(dtype)
    scattered = copy.deepcopy(model)
    for parameter in scattered.parameters():
        parameter.data = parameter.data.clone()
    assert not lies_side_by_side(scattered)
    call, upstream = arguments(dtype), torch.randn(2, 64, 16, dtype=dtype)
    call = (call[0], call[1], call[2])
    out, expected = scattered(*call), model(*call)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    out.backward(upstream)
    expected.backward(upstream)
    largest = max(p.grad.norm() for p in model.parameters())
    for (name, a), b in zip(scattered.named_parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6 * largest, name


def test_leaves_alone_what_it_must_not_move() -> None:
    linears = [nn.Linear(4, 3, bias=False) for _ in range(2)]
    linears[1].weight = linears[0].weight  # tied
    assert not lay_side_by_side(linears)
    assert linears[0].weight is linears[1].weight
    assert not lay_side_by_side([nn.Linear(4, 3), nn.Linear(5, 3)])
    assert not lay_side_by_side([nn.Linear(4, 3), nn.Linear(4, 3).double()])
    shared = nn.Linear(4, 3)
    shared.share_memory()
    pointer = shared.weight.data_ptr()
    assert not lay_side_by_side([nn.Linear(4, 3), shared])
    assert shared.weight.data_ptr() == pointer


def test_state_dict_has_no_trace_of_it(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = BLIP3oDiT(TINY)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert list(loaded) and set(loaded) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value)
