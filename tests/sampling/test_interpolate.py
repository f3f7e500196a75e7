"""Between two conditions: the ends are the samples of the ends, the way is the formula's, the noise is one."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.model_block import as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.sampling import interpolate, prepare
from blip3o_fast.sampling.interpolate import conditions_between

L, E, FAST = 5, 24, {"num_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def model():
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", sample_size=2, in_channels=8)).eval()
    as_trained(model, torch.Generator().manual_seed(0))
    return model


def test_the_ends_are_the_samples_of_the_two_conditions(model):
    a, b, noise = torch.randn(L, E), torch.randn(L, E), torch.randn(4, 8)
    ends = sample(model, torch.stack([a, b]), noise=torch.stack([noise, noise]), **FAST)
    for method in ("linear", "spherical"):
        ours = interpolate(model, a, b, weights=[0, 1], method=method, noise=noise, **FAST)
        assert torch.equal(ours, ends)
        eight = interpolate(model, a, b, method=method, noise=noise, **FAST)
        assert eight.shape == (8, 4, 8)
        assert (eight[[0, -1]] - ends).abs().max() <= 1e-5
    moved = (ends[1] - ends[0]).abs().max()
    steps = (eight[1:] - eight[:-1]).abs().amax((1, 2))
    assert moved > 0.01 and bool((steps > 0).all()) and steps.max() < moved  # one noise: no jumps


def test_the_way_is_that_of_the_conditions(model):
    a, b, noise = torch.randn(L, E), torch.randn(L, E), torch.randn(4, 8)
    prepared = prepare(model)
    ours = interpolate(prepared, a, b, weights=[0.25, -0.5], noise=noise, **FAST)
    conditions = torch.stack([0.75 * a + 0.25 * b, 1.5 * a - 0.5 * b])
    expected = sample(prepared, conditions, noise=noise.expand(2, 4, 8), **FAST)
    assert (ours - expected).abs().max() <= 1e-5


def test_spherical_turns_at_a_constant_rate_and_keeps_lengths():
    a = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    b = torch.tensor([[0, 4.0, 0], [0, 5, 0], [1, 0, 0], [1, 1, 1e-9], [-1, 0, 0]], dtype=torch.float64)
    w = torch.linspace(0, 1, 5, dtype=torch.float64)
    way = conditions_between(a, b, w, "spherical")
    angle = w * math.pi / 2
    expected = (2 + 2 * w)[:, None] * torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    assert torch.allclose(way[:, 0], expected, rtol=0, atol=1e-14)
    assert torch.allclose(way[:, 1, 1], 3 + 2 * w, rtol=0, atol=1e-14)  # parallel
    assert torch.allclose(way[:, 2, 0], w, rtol=0, atol=1e-14)  # no direction at one end
    assert bool(torch.isfinite(way).all()) and (way[:, 3] - a[3]).abs().max() <= 1e-8
    u, v = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    assert torch.equal(conditions_between(u, v, w[[0, 4]], "spherical"), torch.stack([u, v]))
    way = torch.nn.functional.normalize(conditions_between(u, v, w, "spherical")[:, 0], dim=-1)
    between = (way[1:] * way[:-1]).sum(1)
    assert torch.allclose(between, between[:1].expand(4), rtol=0, atol=1e-14)


def test_the_generator_draws_one_noise(model):
    a = torch.randn(L, E)
    ours = interpolate(model, a, a, count=3, generator=torch.Generator().manual_seed(3), **FAST)
    again = interpolate(model, a, a, count=3, generator=torch.Generator().manual_seed(3), **FAST)
    other = interpolate(model, a, a, count=3, generator=torch.Generator().manual_seed(4), **FAST)
    assert torch.equal(ours, again) and (ours - other).abs().max() > 0.01
    assert (ours - ours[:1]).abs().max() <= 1e-5


def test_a_pipeline_is_its_network():
    from diffusers import LuminaNextDiT2DModel

    sizes = {"sample_size": 2, "patch_size": 1, "in_channels": 8, "hidden_size": 32, "num_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 32, "cross_attention_dim": E}
    network = LuminaNextDiT2DModel(**sizes, learn_sigma=False).eval()
    a, b, noise = torch.randn(L, E), torch.randn(L, E), torch.randn(4, 8)
    pipeline = SimpleNamespace(transformer=network, config={})
    of_pipeline, of_network = (interpolate(x, a, b, count=2, noise=noise, **FAST) for x in (pipeline, network))
    assert torch.equal(of_pipeline, of_network)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1}, "count must be at least 2"),
        ({"count": 2.0}, "count must be an integer >= 1"),
        ({"count": 2, "weights": [0.5]}, "count and weights exclude each other"),
        ({"weights": []}, "weights must be one or more finite numbers"),
        ({"weights": ["half"]}, "weights must be numbers"),
        ({"weights": [math.nan]}, "weights must be one or more finite numbers"),
        ({"weights": [1.5], "method": "spherical"}, "weights must be between 0 and 1 with method 'spherical'"),
        ({"method": "cubic"}, "method must be one of linear, spherical, got 'cubic'"),
        ({"condition_b": torch.zeros(4, E)}, "must agree in shape, dtype and device"),
        ({"condition_a": torch.zeros(1, L, E)}, r"condition_a must be a floating tensor of shape \(L, E\)"),
        ({"noise": torch.zeros(4, 7)}, r"noise must be a floating tensor of shape \(T, C\) = \(4, 8\)"),
        ({"generator": [torch.Generator()]}, "generator must be one torch.Generator"),
        ({"noise": torch.zeros(4, 8), "generator": torch.Generator()}, "noise and generator exclude each other"),
        ({"encoder_mask": None}, "encoder_mask is no argument of interpolate"),
        ({"solver": "rk4"}, "solver must be one of"),
    ],
)
def test_bad_arguments_are_refused(model, changes, message):
    given = {"condition_a": torch.zeros(L, E), "condition_b": torch.ones(L, E)} | changes
    with pytest.raises(ValueError, match=message):
        interpolate(model, **given)
