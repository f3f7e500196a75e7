"""Noise levels, network time and condition dropout: their distributions by scipy, their independence of batching."""

import re

import numpy
import pytest
import torch
from scipy import stats

from blip3o_fast.flow.timesteps import draw_sigma, drop_condition, network_time, sigma_quantile

INDEX = torch.arange(20_000)


def shifted_cdf(sigma: numpy.ndarray, shift: float) -> numpy.ndarray:
    """Inverse of sigma = shift u / (1 + (shift - 1) u)."""
    return sigma / (shift - (shift - 1) * sigma)


@pytest.mark.parametrize(
    ("settings", "cdf"),
    [
        ({}, stats.uniform.cdf),
        ({"distribution": "logit_normal"}, lambda s: stats.norm.cdf(numpy.log(s / (1 - s)))),
        (
            {"distribution": "logit_normal", "logit_mean": -0.5, "logit_std": 1.4},
            lambda s: stats.norm.cdf((numpy.log(s / (1 - s)) + 0.5) / 1.4),
        ),
        ({"distribution": "shifted", "shift": 3.0}, lambda s: shifted_cdf(s, 3.0)),
        ({"distribution": "shifted", "shift": 0.5}, lambda s: shifted_cdf(s, 0.5)),
    ],
    ids=["uniform", "logit_normal", "logit_normal_moved", "shifted_up", "shifted_down"],
)
def test_distributions(settings, cdf):
    sigma = draw_sigma(11, INDEX, **settings)
    assert sigma.dtype == torch.float32 and sigma.shape == INDEX.shape
    assert (sigma >= 0).all() and (sigma <= 1).all()
    assert stats.kstest(sigma.double().numpy(), cdf).pvalue > 1e-3


def test_shift_is_the_schedulers():
    """The shifted distribution is the uniform one seen through diffusers' time shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    uniform = torch.linspace(1000, 1, 1000) / 1000
    ours = sigma_quantile(uniform, distribution="shifted", shift=3.0)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=1e-6)


def test_a_draw_belongs_to_its_sample():
    """Not to the batch, the rank or the order: any split of the indices gives the same numbers."""
    whole = draw_sigma(5, INDEX[:64])
    assert torch.equal(torch.cat([draw_sigma(5, part) for part in INDEX[:64].split(7)]), whole)
    shuffled = torch.randperm(64)
    assert torch.equal(draw_sigma(5, shuffled), whole[shuffled])
    assert not torch.equal(draw_sigma(6, INDEX[:64]), whole)
    assert not torch.equal(draw_sigma(5, INDEX[64:128]), whole)


def test_nearby_seeds_and_indices_are_independent():
    a, b = draw_sigma(5, INDEX).double(), draw_sigma(6, INDEX).double()
    limit = 4.5 / len(INDEX) ** 0.5
    assert abs(numpy.corrcoef(a, b)[0, 1]) <= limit
    assert abs(numpy.corrcoef(a[:-1], a[1:])[0, 1]) <= limit


def test_the_extremes_of_the_uniform_stay_inside():
    u = torch.tensor([2.0**-33, 0.5, 1.0])
    for settings in ({}, {"distribution": "logit_normal"}, {"distribution": "shifted", "shift": 5.0}):
        sigma = sigma_quantile(u, **settings)
        assert sigma.isfinite().all() and (sigma >= 0).all() and (sigma <= 1).all()


def test_network_time():
    sigma = torch.tensor([0.0, 1 / 30, 0.5, 29 / 30, 1.0])
    assert network_time(sigma).tolist() == pytest.approx([0, 100 / 3, 500, 2900 / 3, 1000], rel=1e-6)
    assert network_time(sigma, "lumina").tolist() == pytest.approx([1, 29 / 30, 0.5, 1 / 30, 0], abs=1e-7)
    assert network_time(sigma, truncate=True).tolist() == [0, 33, 500, 966, 1000]
    assert network_time(torch.tensor(0.5)).shape == ()
    assert network_time(sigma.double()).dtype == torch.float64


def test_dropped_conditions():
    """Frequency p, whole samples, exact zeros, and decisions that do not know the noise level."""
    condition = torch.randn(4000, 2, 3)
    dropped = drop_condition(condition, 0.1, 11, INDEX[:4000])
    zeros = (dropped == 0).flatten(1).all(1)
    assert torch.equal(dropped[~zeros], condition[~zeros])
    assert abs(float(zeros.double().mean()) - 0.1) <= 4.5 * (0.1 * 0.9 / 4000) ** 0.5
    sigma = draw_sigma(11, INDEX[:4000]).double()
    assert stats.ks_2samp(sigma[zeros], sigma[~zeros]).pvalue > 1e-3
    again = torch.cat([drop_condition(condition[a : a + 9], 0.1, 11, INDEX[a : a + 9]) for a in range(0, 81, 9)])
    assert torch.equal(again, dropped[:81])


def test_dropout_of_zero_and_one():
    condition = torch.randn(3, 2, 3)
    assert drop_condition(condition, 0.0, 1, INDEX[:3]) is condition
    condition[1] = float("nan")
    assert torch.equal(drop_condition(condition, 1.0, 1, INDEX[:3]), torch.zeros(3, 2, 3)), "NaN must not survive"


def test_dropout_passes_gradients_only_where_it_kept():
    condition = torch.randn(50, 2, 3, requires_grad=True)
    upstream = torch.randn(50, 2, 3)
    out = drop_condition(condition, 0.5, 3, INDEX[:50])
    (grad,) = torch.autograd.grad(out, condition, upstream)
    kept = (out != 0).flatten(1).any(1)
    assert 5 < int(kept.sum()) < 45
    assert torch.equal(grad[kept], upstream[kept]) and not grad[~kept].any()


BAD = [
    (lambda: draw_sigma(1, INDEX, distribution="normal"), "distribution must be one of uniform, logit_normal, shifted"),
    (lambda: draw_sigma(1, INDEX, logit_mean=float("inf")), "logit_mean must be finite, got inf"),
    (lambda: draw_sigma(1, INDEX, logit_std=0.0), "logit_std must be positive and finite, got 0.0"),
    (lambda: draw_sigma(1, INDEX, shift=-1.0), "shift must be positive and finite, got -1.0"),
    (lambda: draw_sigma(1, INDEX.float()), "sample_index must be an int64 tensor, got torch.float32"),
    (lambda: draw_sigma(1, [1, 2]), "sample_index must be an int64 tensor, got list"),
    (lambda: draw_sigma(1, INDEX[None]), "sample_index must have shape (B,), got (1, 20000)"),
    (lambda: draw_sigma(2**63, INDEX), "seed must be an integer that fits into 64 bits, got 9223372036854775808"),
    (lambda: draw_sigma(1.5, INDEX), "seed must be an integer that fits into 64 bits, got 1.5"),
    (lambda: network_time(torch.ones(2), "sd3"), "time_convention must be one of blip3o, lumina, got 'sd3'"),
    (lambda: network_time(torch.ones(2), "lumina", truncate=True), "truncate=True needs time_convention='blip3o'"),
    (lambda: network_time(torch.ones(2).half()), "sigma must be float32 or float64"),
    (lambda: drop_condition(torch.ones(2, 1), 1.5, 1, INDEX[:2]), "p must be in [0, 1], got 1.5"),
    (lambda: drop_condition(torch.ones(2, 1), 0.5, 1, INDEX[:3]), "sample_index must have shape (B,) = (2,), got (3,)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
