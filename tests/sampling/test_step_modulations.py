"""Modulations made for many steps at once give the numbers of those made step by step, and save what they promise."""

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks.model_block import as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, _ext, use_backend
from blip3o_fast.models import eager, step_modulations
from blip3o_fast.models import forward as fused
from blip3o_fast.models.packed import PackedBlock
from blip3o_fast.sampling import prepare
from blip3o_fast.testing import assert_contract, relative_l2

needs_extension = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")
TIMES = torch.tensor([1000.0, 640.0, 333.3, 20.0])


def network(seed: int = 0, **fields: object) -> BLIP3oDiT:
    """A small model as training leaves it: nothing is zero."""
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", **fields)).eval()
    as_trained(model, torch.Generator().manual_seed(seed))
    return model


def inputs(model: BLIP3oDiT, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    config = model.config
    x = torch.randn(batch, config.num_tokens, config.in_channels, dtype=dtype)
    return x, torch.randn(batch, 5, config.cross_attention_dim, dtype=dtype)


def each_step(model, x: Tensor, context: Tensor, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Per time: (with the modulations made before, without), of the same prepared condition."""
    with torch.no_grad():
        condition = model.prepare_condition(context, mask)
        steps = model.prepare_modulations(condition, TIMES)
        assert len(steps) == len(TIMES)
        return [
            (model(x, t, condition, modulations=made), model(x, t.expand(len(x)), condition))
            for t, made in zip(TIMES, steps, strict=True)
        ]


KINDS = {
    "blip3o": {},
    "stock": {"context_projection": False},
    "grouped": {"num_kv_heads": 1},
    "deeper": {"num_layers": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_extension)])
def test_same_numbers_whenever_they_are_made(kind, packed):
    model = network(**KINDS[kind])
    x, context = inputs(model)
    mask = torch.rand(3, 5) < 0.6
    mask[1] = False
    for given in ((x, context), (x, context, mask)):
        pairs = each_step(prepare(model) if packed else model, *given)
        assert all(relative_l2(ours, stepwise) <= 1e-6 for ours, stepwise in pairs)
        assert relative_l2(pairs[0][0], pairs[1][0]) > 1e-3, "the time has no effect: this test would see no mistake"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_extension)])
def test_as_exact_as_the_eager_model(dtype, packed):
    model, double = network().to(dtype), network().to(dtype).double()
    x, context = inputs(model, dtype=dtype)
    ours = each_step(prepare(model) if packed else model, x, context)
    for t, (made, _) in zip(TIMES, ours, strict=True):
        with torch.no_grad():
            stock = eager.eager_forward(model, x, t, context)
            gold = eager.eager_forward(double, x.double(), t.double(), context.double())
        assert_contract(made, stock, gold, f"prediction at time {t:g}")


def test_rounding_is_all_that_differs():
    model = network()
    x, context = inputs(model)
    with use_backend("reference"):
        for ours, stepwise in each_step(model, x, context):
            assert relative_l2(ours, stepwise) <= 1e-6
        for ours, stepwise in each_step(model.double(), x.double(), context.double()):
            assert relative_l2(ours, stepwise) <= 1e-14


def test_the_rows_are_the_models_own_modulations():
    model = network()
    _, context = inputs(model)
    with torch.no_grad(), use_backend("reference"):
        condition = model.prepare_condition(context)
        steps = model.prepare_modulations(condition, TIMES)
        for t, made in zip(TIMES, steps, strict=True):
            y = fused.embed_condition(model, t.expand(3), condition.pooled)
            torch.testing.assert_close(made.y, y)
            for layer, block in zip(made.layers, model.layers, strict=True):
                torch.testing.assert_close(layer, block.norm1.linear(nn.functional.silu(y)))
            torch.testing.assert_close(made.head, model.norm_out.linear_1(nn.functional.silu(y)))


def test_nothing_of_the_time_is_computed_again(monkeypatch):
    """With modulations made before, a call touches neither the time embedding nor any block's Linear of y."""
    model = network()
    x, context = inputs(model)
    with torch.no_grad():
        condition = model.prepare_condition(context)
        made = model.prepare_modulations(condition, TIMES)[0]
        expected = model(x, TIMES[0], condition, modulations=made)

        def fail(*args: object) -> None:
            raise AssertionError("made again")

        for name in ("embed_condition", "embed_time", "modulate", "head_scale"):
            monkeypatch.setattr(fused, name, fail)
        assert torch.equal(model(x, TIMES[0], condition, modulations=made), expected)
        monkeypatch.setattr(PackedBlock, "modulation", fail)
        assert relative_l2(prepare(model)(x, TIMES[0], condition, modulations=made), expected) <= 1e-6
        model.layers[1].attn1.to_q.register_forward_hook(lambda module, args, output: output)  # it runs by itself
        assert relative_l2(prepare(model)(x, TIMES[0], condition, modulations=made), expected) <= 1e-6


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_extension)])
@pytest.mark.parametrize(
    ("hooked", "own"),
    [
        (lambda model: model.layers[1].norm1.linear, [1]),
        (lambda model: model.layers[0].norm2, [0]),
        (lambda model: model.layers[1], [1]),
        (lambda model: model.layers[0].attn1.to_q, []),
        (lambda model: model.norm_out.linear_1, ["head"]),
    ],
    ids=["a modulation", "a norm", "a block", "a projection", "the head"],
)
def test_what_is_hooked_is_called_at_every_step(hooked, own, packed):
    """A hook sees one call per step, of one batch, and its block gives the numbers of the hooked block."""
    model, shapes = network(num_layers=3), []
    x, context = inputs(model)
    hooked(model).register_forward_hook(lambda module, args, output: shapes.append(args[0].shape[0]) or 2 * output)
    runner = prepare(model) if packed else model
    with torch.no_grad():
        made = runner.prepare_modulations(runner.prepare_condition(context), TIMES)[0]
    assert [i for i, layer in enumerate(made.layers) if layer is None] == [i for i in own if i != "head"]
    assert (made.head is None) == ("head" in own)
    shapes.clear()
    pairs = each_step(runner, x, context)
    assert shapes == [3] * 2 * len(TIMES)
    assert all(relative_l2(ours, stepwise) <= 1e-6 for ours, stepwise in pairs)


def test_a_hooked_time_embedding_is_left_alone():
    model = network()
    _, context = inputs(model)
    model.time_caption_embed.timestep_embedder.linear_2.register_forward_hook(lambda module, args, output: output)
    with torch.no_grad():
        assert model.prepare_modulations(model.prepare_condition(context), TIMES) is None


@pytest.mark.parametrize("fields", [{}, {"hidden_size": 128, "num_layers": 3, "context_projection": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_counted(fields, dtype):
    model = network(**fields).to(dtype)
    _, context = inputs(model, dtype=dtype)
    with torch.no_grad():
        steps = model.prepare_modulations(model.prepare_condition(context), TIMES)
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for made in steps
        for tensor in (made.y, made.conditioning, made.head, *made.layers)
    }
    assert sum(kept.values()) == len(TIMES) * step_modulations.step_bytes(model.config, 3, dtype)


def test_bad_input_is_named():
    model = network()
    x, context = inputs(model)
    with torch.no_grad():
        condition = model.prepare_condition(context)
        steps = model.prepare_modulations(condition, TIMES)
    with pytest.raises(ValueError, match="modulations were made for 3 samples, hidden_states has 2"):
        model(x[:2], TIMES[0], condition.rows(0, 2), modulations=steps[0])
    with pytest.raises(ValueError, match=re.escape("modulations must be an element of prepare_modulations' list")):
        model(x, TIMES[0], condition, modulations=steps)


def test_rows_of_a_prepared_condition():
    """A part of a prepared condition is the condition of a part, without a copy."""
    model = network()
    x, context = inputs(model)
    mask = torch.rand(3, 5) < 0.6
    mask[:, 0] = True
    with torch.no_grad():
        whole = model.prepare_condition(context, mask)
        part = whole.rows(1, 3)
        ours, alone = model(x[1:], TIMES[0], part), model(x[1:], TIMES[0], context[1:], mask[1:])
    assert relative_l2(ours, alone) <= 1e-6
    assert part.context.untyped_storage().data_ptr() == whole.context.untyped_storage().data_ptr()
