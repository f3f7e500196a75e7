"""Weights of noise levels: diffusers' formulas, and gradients that are those of the weighted mean."""

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.flow.weighting import WEIGHTINGS, loss_weight


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_formulas_are_diffusers(weighting):
    sigma = torch.linspace(1e-3, 1, 50)
    torch.testing.assert_close(loss_weight(sigma, weighting), compute_loss_weighting_for_sd3(weighting, sigma))


def test_no_sample_rules_the_step():
    assert loss_weight(torch.zeros(1), "sigma_sqrt").item() == pytest.approx(1e6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_are_those_of_the_weighted_mean(weighting):
    data, condition = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    guess = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    seen = []

    def model(x_t, timestep, condition):
        seen.append(x_t)
        return guess * 1

    loss, metrics = FlowMatchingLoss(weighting=weighting)(model, data, condition, seed=1, sample_index=0, sigma=sigma)
    (gradient,) = torch.autograd.grad(loss, guess)
    noise = (seen[0] - (1 - sigma)[:, None, None] * data) / sigma[:, None, None]
    error = (guess - (noise - data)).square()
    weighted = (compute_loss_weighting_for_sd3(weighting, sigma)[:, None, None] * error).mean()
    (expected,) = torch.autograd.grad(weighted, guess)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss.detach(), error.mean().detach())


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="weighting must be one of none, sigma_sqrt, cosmap, got 'snr'"):
        FlowMatchingLoss(weighting="snr")
    with pytest.raises(ValueError, match="would scale the gradient of the regularization"):
        FlowMatchingLoss(weighting="cosmap", regularization_weight=0.1)


def test_a_weight_that_fp16_cannot_hold_leaves_gradients_finite():
    guess = torch.randn(2, 4, 3).half().requires_grad_()
    data, condition = torch.randn(2, 4, 3), torch.zeros(2, 4, 5)
    loss = FlowMatchingLoss(weighting="sigma_sqrt")(
        lambda x, t, c: guess * 1, data, condition, seed=1, sample_index=0, sigma=torch.tensor([1e-4, 0.5])
    )[0]
    (1e-3 * loss).backward()  # the scale that a scaler would come to
    assert guess.grad.dtype == torch.float16 and guess.grad.isfinite().all() and guess.grad[0].abs().max() > 1
