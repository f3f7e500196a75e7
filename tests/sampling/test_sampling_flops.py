"""A sampling step does less work than a forward of the stock network: what is made once per run is counted once."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_fast import BLIP3oConfig, BLIP3oDiT, use_backend
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.ops._library import _IMPLEMENTATIONS
from blip3o_fast.sampling import Sampler

STEPS = 30


def products_of(implementation: Any) -> Any:
    """The counter's formula of one of our ops: the products of aten that its reference runs."""

    def formula(*args: Any, out_val: Any = None, **options: Any) -> int:
        with FlopCounterMode(display=False) as inside:
            implementation(*args, **options)
        return inside.get_total_flops()

    formula._get_raw = True  # type: ignore[attr-defined]  # the arguments themselves, not their shapes
    return formula


OURS = {op.overloadpacket: products_of(implementation) for op, implementation in _IMPLEMENTATIONS.items()}


def flops(function: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=OURS) as counter, use_backend("reference"), torch.no_grad():
        function()
    return counter.get_total_flops()


def network(layers: int, context_projection: bool) -> tuple[BLIP3oDiT, dict[str, torch.Tensor]]:
    """At full width and without values, and the arguments of a call with one sample."""
    config = BLIP3oConfig(num_layers=layers, context_projection=context_projection)
    with torch.device("meta"):
        call = {
            "hidden_states": torch.empty(1, 64, config.in_channels),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 64, config.cross_attention_dim),
        }
        return BLIP3oDiT(config).eval(), call


def per_step(layers: int, context_projection: bool) -> tuple[float, int]:
    """FLOPs of a step of a run of 30, without guidance, and of the stock forward."""
    model, call = network(layers, context_projection)
    sampler = Sampler(model)
    ours = flops(lambda: sampler(call["encoder_hidden_states"], num_steps=STEPS, guidance_scale=1.0))
    return ours / STEPS, flops(lambda: eager_forward(model, **call))


@pytest.mark.parametrize(("context_projection", "saved"), [(True, 0.12), (False, 0.09)], ids=["blip3o", "stock"])
def test_a_step_does_less_than_the_stock_forward(context_projection, saved):
    """At 24 layers, from 2 and 3: every layer costs the same, which 4 layers confirm."""
    two, three, four = (per_step(layers, context_projection) for layers in (2, 3, 4))
    whole = []
    for a, b, c in zip(two, three, four, strict=True):
        assert c == pytest.approx(b + (b - a), rel=1e-12)
        whole.append(a + 22 * (b - a))
    assert 1 - whole[0] / whole[1] >= saved, whole


def test_the_counter_sees_our_products():
    """One call that hoists nothing does the products of the stock forward, attention included."""
    model, call = network(2, True)
    ours, stock = flops(lambda: model(**call)), flops(lambda: eager_forward(model, **call))
    assert ours == stock


def test_guidance_is_paid_where_it_is_wanted():
    """A run that is guided in half of its steps does three quarters of the work of one that is guided in all."""
    model, call = network(2, True)
    sampler = Sampler(model)

    def of(interval: dict[str, float]) -> int:
        return flops(lambda: sampler(call["encoder_hidden_states"], num_steps=STEPS, **interval))

    assert of({"guidance_start": 0.5}) / of({}) == pytest.approx(0.75, abs=0.01)
