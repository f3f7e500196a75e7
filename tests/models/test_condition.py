"""A prepared condition gives the numbers of the condition itself, and its work is done once per sampling run."""

import re

import pytest
import torch

from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.models import forward as fused


def tiny(**overrides):
    config = BLIP3oConfig.preset("tiny", **overrides)
    model = BLIP3oDiT(config, generator=torch.Generator().manual_seed(0)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):  # zero at the start: cross-attention would say nothing
            torch.nn.init.normal_(parameter)
    return model


def inputs(model, length=9):
    config = model.config
    return (
        torch.randn(3, config.num_tokens, config.in_channels),
        torch.rand(3) * 1000,
        torch.randn(3, length, config.cross_attention_dim),
    )


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_same_numbers(projection, masked):
    model = tiny(context_projection=projection)
    x_t, timestep, context = inputs(model)
    mask = torch.rand(3, 9) < 0.5 if masked else None
    if mask is not None:
        mask[1] = False  # "no context" must stay defined
    with torch.no_grad():
        prepared = model.prepare_condition(context, mask)
        assert torch.equal(model(x_t, timestep, prepared), model(x_t, timestep, context, mask))


def test_a_block_on_the_stock_path_makes_its_own():
    model = tiny()
    model.layers[0].norm2.register_forward_hook(lambda module, args, output: None)
    x_t, timestep, context = inputs(model)
    with torch.no_grad():
        prepared = model.prepare_condition(context)
        assert prepared.keys_values[0] is None and prepared.keys_values[1] is not None
        assert torch.equal(model(x_t, timestep, prepared), model(x_t, timestep, context))


def test_gradients_flow_through_it():
    model = tiny()
    x_t, timestep, context = inputs(model)
    upstream = torch.randn_like(x_t)
    grads = []
    for given in (context.clone().requires_grad_(), leaf := context.clone().requires_grad_()):
        made = model.prepare_condition(given) if given is leaf else given
        grads.append(torch.autograd.grad(model(x_t, timestep, made), given, upstream)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_sampling_makes_keys_and_values_once(monkeypatch):
    model, calls = tiny(), []
    real = fused.context_key_value
    monkeypatch.setattr(fused, "context_key_value", lambda block, *args: calls.append(block) or real(block, *args))
    _, _, context = inputs(model)
    sample(model, context, num_steps=4, guidance_scale=2.0)
    assert calls == list(model.layers)


def test_a_model_without_it_samples_the_same():
    model = tiny()
    _, _, context = inputs(model)
    noise = torch.randn(3, model.config.num_tokens, model.config.in_channels)

    class Plain(torch.nn.Module):
        """Called the same way, and nothing more."""

        def __init__(self):
            super().__init__()
            self.inner, self.config, self.normalizer = model, model.config, None

        def forward(self, x_t, timestep, context):
            return self.inner(x_t, timestep, context)

    ours, plain = (sample(m, context, num_steps=4, guidance_scale=2.0, noise=noise) for m in (model, Plain()))
    assert torch.equal(ours, plain)


def test_bad_input_is_named():
    model = tiny()
    x_t, timestep, context = inputs(model)
    prepared = model.prepare_condition(context)
    with pytest.raises(ValueError, match="encoder_mask must be None with a prepared condition"):
        model(x_t, timestep, prepared, torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="was prepared for 3 samples, hidden_states has 2"):
        model(x_t[:2], timestep[:2], prepared)
    with pytest.raises(ValueError, match="encoder_hidden_states must be a tensor, got list"):
        model.prepare_condition([1.0])
    with pytest.raises(ValueError, match=re.escape("encoder_hidden_states must have shape (B, L, E)")):
        model.prepare_condition(context[0])
