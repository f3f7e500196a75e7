"""A sampling step does less work than a forward of the stock network: what is made once per run is counted once."""

from typing import Any

import pytest
import torch

from blip3o_fast.models.eager import eager_forward
from blip3o_fast.sampling import Sampler
from scripts import step_report
from scripts.step_report import STEPS, flops, network


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return step_report.rows()


def test_a_step_does_less_than_the_stock_forward(rows):
    """At 24 layers, with guidance: 12 % less for BLIP3-o's network, 9 % for diffusers'."""
    blip3o, stock = rows
    assert blip3o["flops_saved"] >= 0.12 and stock["flops_saved"] >= 0.09, rows
    assert blip3o["stock_flops"] > stock["stock_flops"] > 2 * 140e9, "two rows of some 150 GFLOP"


def test_launches_of_a_step(rows):
    """Nine a block where the stock forward has 95 or more, and a few around them; what is made once is little."""
    for row in rows:
        assert 24 * 9 < row["our_launches"] <= 24 * 9 + 24, row
        assert row["stock_launches"] > 24 * 90 and row["once_launches"] < 24 * 9, row


def test_the_table_says_it(rows):
    text = step_report.table(rows)
    for row in rows:
        (line,) = (line for line in text.splitlines() if row["network"] in line)
        assert f"| {100 * row['flops_saved']:.1f} % | {row['stock_launches']} | {row['our_launches']} (" in line


def test_every_layer_costs_the_same():
    """So 24 layers are told from 2 and 3."""
    two, three, four = (step_report.step_flops(layers, True) for layers in (2, 3, 4))
    for a, b, c in zip(two, three, four, strict=True):
        assert c == pytest.approx(b + (b - a), rel=1e-12)


@pytest.mark.parametrize("context_projection", [True, False])
def test_every_step_costs_the_same(context_projection):
    """So a run of 30 is told from 1 and 2."""
    model, call = network(1, context_projection)
    whole = step_report.run_flops(Sampler(model), call["encoder_hidden_states"], STEPS)
    assert step_report.step_flops(1, context_projection)[0] * STEPS == whole


def test_the_counter_sees_our_products():
    """One call that hoists nothing does the products of the stock forward, attention included."""
    model, call = network(2, True)
    ours, stock = flops(lambda: model(**call)), flops(lambda: eager_forward(model, **call))
    assert ours == stock


def test_stock_is_what_diffusers_does():
    """The counter over diffusers' own network gives the same number."""
    from diffusers import LuminaNextDiT2DModel

    model, call = network(2, False, rows=2)
    config = model.config.to_stock_dict()
    with torch.device("meta"):
        theirs = LuminaNextDiT2DModel(**{k: v for k, v in config.items() if k[0] != "_" and k != "time_convention"})
        mask, rope = torch.ones(2, 64), torch.empty(384, 384, 32, dtype=torch.complex64)
    assert flops(lambda: theirs(**call, encoder_mask=mask, image_rotary_emb=rope, cross_attention_kwargs={})) == flops(
        lambda: eager_forward(model, **call)
    )


def test_guidance_is_paid_where_it_is_wanted():
    """A run that is guided in half of its steps does three quarters of the work of one that is guided in all."""
    model, call = network(2, True)
    sampler = Sampler(model)

    def of(interval: dict[str, float]) -> int:
        return flops(lambda: sampler(call["encoder_hidden_states"], num_steps=10, **interval))

    assert of({"guidance_start": 0.5}) / of({}) == pytest.approx(0.75, abs=0.01)
