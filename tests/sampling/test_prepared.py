"""A prepared model gives the model's numbers, follows its weights, and belongs to no single thread."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from benchmarks.model_block import as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, _ext, sample, use_backend
from blip3o_fast.models import eager
from blip3o_fast.models.forward import project_context
from blip3o_fast.models.packed import PackedBlock, packable
from blip3o_fast.sampling import prepare
from blip3o_fast.testing import relative_l2

needs_extension = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")


def make(seed: int = 0, **fields: object) -> BLIP3oDiT:
    """A small model as training leaves it: nothing is zero."""
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", **fields)).eval()
    as_trained(model, torch.Generator().manual_seed(seed))
    return model


def arguments(model: BLIP3oDiT, batch: int = 2, context: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    config = model.config
    x = torch.randn(batch, config.num_tokens, config.in_channels, dtype=dtype)
    condition = torch.randn(batch, context, config.cross_attention_dim, dtype=dtype)
    return [x, torch.rand(batch) * 1000, condition]


def close(given: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = relative_l2(given, expected)
    assert error <= tolerance, error


KINDS = {
    "blip3o": {},
    "stock": {"context_projection": False},
    "grouped": {"num_kv_heads": 1},
    "no qk_norm": {"qk_norm": False},
}


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_model(kind):
    model = make(**KINDS[kind])
    prepared, args = prepare(model), arguments(model)
    mask = torch.rand(2, 5) < 0.7
    mask[1] = False
    with torch.no_grad():
        for given in (args, [*args, mask]):
            close(prepared(*given), model(*given))
    assert prepared.storage == "fp32" and prepared.nbytes > 0
    assert all(isinstance(p, PackedBlock) for p in prepared._packed)


@needs_extension
def test_equals_the_eager_model_in_fp64():
    model = make()
    args = arguments(model)
    double = make().double()
    with torch.no_grad(), use_backend("reference"):
        gold = double(args[0].double(), args[1].double(), args[2].double())
    stock = eager.eager_forward(model, *args).detach()
    assert relative_l2(prepare(model)(*args), gold) <= 2 * relative_l2(stock, gold) + 3e-8


@needs_extension
@pytest.mark.parametrize(("storage", "tolerance"), [("bf16", 1e-2), ("int8", 5e-2)])
def test_smaller_storages_are_close(storage, tolerance):
    model = make()
    prepared, full, args = prepare(model, storage=storage), prepare(model), arguments(model)
    assert prepared.nbytes < full.nbytes
    with torch.no_grad():
        close(prepared(*args), model(*args), tolerance)
    full(*args)
    assert prepared.nbytes < full.nbytes  # with a workspace as well


@needs_extension
def test_a_bfloat16_model_keeps_its_weights():
    model = make().bfloat16()
    prepared = prepare(model)
    args = arguments(model, dtype=torch.bfloat16)
    with torch.no_grad():
        close(prepared(*args), model(*args), 3e-2)
    assert prepared.storage == "bf16" and prepared(*args).dtype == torch.bfloat16


@needs_extension
def test_a_condition_is_made_once():
    model = make()
    prepared = prepare(model)
    x, t, context = arguments(model)
    condition = prepared.condition(context)
    for _ in range(2):
        assert torch.equal(prepared(x, t, condition), prepared(x, t, context))
    assert torch.equal(condition.context, project_context(model, context))
    kept = [key.clone() for key, _ in condition.keys_values]
    prepared(x, t, torch.randn_like(context))
    assert all(torch.equal(a, b[0]) for a, b in zip(kept, condition.keys_values, strict=True))


@needs_extension
def test_results_are_the_callers_own():
    model = make()
    prepared, args = prepare(model), arguments(model)
    first = prepared(*args)
    copy = first.clone()
    prepared(*(a + 1 for a in args))
    assert torch.equal(first, copy)


@needs_extension
def test_follows_an_optimizer_step():
    model = make()
    prepared, args = prepare(model), arguments(model)
    before = prepared(*args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(*args).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        close(prepared(*args), model(*args))
    assert relative_l2(prepared(*args), before) > 1e-3


def _load(model: BLIP3oDiT, assign: bool) -> None:
    model.load_state_dict(make(1).state_dict(), assign=assign)


CHANGES = {
    "load_state_dict": lambda model: _load(model, assign=False),
    "load_state_dict(assign=True)": lambda model: _load(model, assign=True),
    "a cast there and back": lambda model: model.half().float(),
    "a new parameter": lambda model: setattr(
        model.layers[1].attn1.to_v, "weight", nn.Parameter(torch.randn_like(model.layers[1].attn1.to_v.weight))
    ),
    "a new layer": lambda model: setattr(
        model.layers[0].feed_forward, "linear_2", nn.Linear(*model.layers[0].feed_forward.linear_2.weight.shape[::-1])
    ),
    "a bias of the modulation": lambda model: model.layers[0].norm1.linear.bias.data.add_(1),
    "a norm": lambda model: model.layers[0].norm2.weight.data.mul_(2),
    "an embedder": lambda model: model.patch_embedder.proj.weight.data.mul_(2),
    "a norm's eps": lambda model: (
        setattr(model.layers[1].ffn_norm1, "eps", 1.0) or setattr(model.layers[1].norm2, "eps", 1.0)
    ),
    "a new gate": lambda model: setattr(model.layers[1], "gate", nn.Parameter(torch.randn_like(model.layers[1].gate))),
    "a hook": lambda model: model.layers[0].attn1.to_v.register_forward_hook(lambda m, i, o: 2 * o),
    "a hook of a block": lambda model: model.layers[0].register_forward_hook(lambda m, i, o: 2 * o),
    "a forward of its own": lambda model: setattr(model.layers[1], "forward", lambda h, *args, **options: 2 * h),
}


@needs_extension
@pytest.mark.parametrize("change", CHANGES)
def test_follows_a_change(change):
    model = make()
    prepared, args = prepare(model), arguments(model)
    before = prepared(*args)
    CHANGES[change](model)
    with torch.no_grad():
        close(prepared(*args), model(*args))
    assert relative_l2(prepared(*args), before) > 1e-4


@needs_extension
def test_follows_the_model_to_where_nothing_is_packed():
    """fp64, and another device, of which meta stands for all: the kernels read memory of the CPU."""
    model = make()
    prepared, args = prepare(model), arguments(model)
    model.double()
    args = [a.double() for a in args]
    with torch.no_grad():
        assert torch.equal(prepared(*args), model(*args))
    model.float().to("meta")
    assert prepared._blocks() == [None] * len(model.layers)


@needs_extension
def test_a_block_that_cannot_be_read_runs_itself():
    model = make()
    model.layers[0].attn1.to_q.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not packable(model.layers[0]) and packable(model.layers[1])
    prepared, args = prepare(model), arguments(model)
    with torch.no_grad():
        close(prepared(*args), model(*args))
    assert prepared._packed[0] is None


@needs_extension
def test_what_a_hook_keeps_stays_as_it_was():
    """Blocks hand over their results in a workspace, but not to whom may keep them."""
    model, kept = make(num_layers=4), []
    model.layers[2].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    model.layers[2].register_forward_hook(lambda module, inputs, output: kept.append(output))
    prepared, args = prepare(model), arguments(model)
    prepared(*args)
    copies = [tensor.clone() for tensor in kept]
    prepared(*(a + 1 for a in args))
    assert len(kept) == 4 and all(torch.equal(a, b) for a, b in zip(kept[:2], copies, strict=True))


@needs_extension
def test_options_and_grids_of_any_size():
    model = make()
    prepared = prepare(model)
    _, t, context = arguments(model)
    image = torch.randn(2, model.config.in_channels, 6, 4)
    for given in ({}, {"base_sequence_length": 16}):
        with torch.no_grad():
            close(prepared(image, t, context, **given), model(image, t, context, **given))
    empty = prepared(image[:0], t[:0], context[:0])
    assert empty.shape == (0, *image.shape[1:])


@needs_extension
def test_threads_get_the_serial_results():
    model = make()
    prepared = prepare(model)
    calls = [arguments(model, batch) for batch in (1, 2, 3, 2, 1, 3, 2, 2)]
    serial = [prepared(*args) for args in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda args: prepared(*args), calls))
            assert all(torch.equal(a, b) for a, b in zip(serial, together, strict=True))


@needs_extension
def test_sample_takes_it():
    model = make()
    condition = arguments(model)[2]
    runs = [
        sample(m, condition, num_steps=4, generator=torch.Generator().manual_seed(0)) for m in (model, prepare(model))
    ]
    close(runs[1], runs[0], 1e-5)


def test_nothing_is_packed_where_it_cannot_be():
    model = make().double()
    prepared = prepare(model)
    args = [a.double() for a in arguments(model)]
    assert prepared.storage is None and prepared.nbytes == 0
    with torch.no_grad():
        assert torch.equal(prepared(*args), model(*args))
    with pytest.raises(RuntimeError, match="storage 'int8' cannot be had: "):
        prepare(model, storage="int8")


@needs_extension
def test_another_backend_runs_the_model_itself():
    model = make()
    prepared, args = prepare(model), arguments(model)
    with use_backend("reference"), torch.no_grad():
        assert torch.equal(prepared(*args), model(*args))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="model must be a BLIP3oDiT, got Linear"):
        prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=re.escape("storage must be one of auto, fp32, bf16, int8, got 'int4'")):
        prepare(make(), storage="int4")
    with pytest.raises(ValueError, match="encoder_hidden_states must have shape"):
        prepare(make()).condition(torch.zeros(2, 3))
