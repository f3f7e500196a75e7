"""The path: its ends, its derivative, and other people's formulas for the same line."""

import re

import pytest
import torch
from torch import Tensor

from blip3o_fast.flow.path import MIN_ALPHA, FlowPath

PATHS = [
    FlowPath(),
    FlowPath(sigma_min=1e-4),
    FlowPath("cosine"),
    FlowPath("cosine", 0.01, 0.9),
]


def triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*shape).double(), torch.randn(*shape).double(), torch.rand(shape[0]).double()


def test_it_is_the_conditional_optimal_transport_path():
    """flow_matching's time runs the other way: t = 1 - sigma (t = 0 is noise), so its derivative has the other sign."""
    from flow_matching.path import CondOTProbPath

    data, noise, sigma = triple(5, 3, 4)
    theirs = CondOTProbPath().sample(x_0=noise, x_1=data, t=1 - sigma)
    torch.testing.assert_close(FlowPath().interpolate(data, noise, sigma), theirs.x_t, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(FlowPath().velocity(data, noise, sigma), -theirs.dx_t, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(path, dtype):
    """sigma = 0: the data (and sigma_min of noise); sigma = 1: noise alone, of deviation sigma_max. Exact."""
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert path.alpha(ends).tolist() == [1.0, 0.0]
    assert path.noise_scale(ends)[0] == torch.tensor(path.sigma_min, dtype=dtype)
    assert path.noise_scale(ends)[1] == pytest.approx(path.sigma_max, rel=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_velocity_is_the_derivative(path):
    data, noise, sigma = triple(4, 3, 2)
    step = 1e-6
    numeric = path.interpolate(data, noise, sigma + step) - path.interpolate(data, noise, sigma - step)
    torch.testing.assert_close(path.velocity(data, noise, sigma), numeric / (2 * step), rtol=1e-8, atol=1e-8)
    for value, derivative in (("alpha", "d_alpha"), ("noise_scale", "d_noise_scale")):
        point = sigma.clone().requires_grad_()
        (exact,) = torch.autograd.grad(getattr(path, value)(point).sum(), point)
        torch.testing.assert_close(getattr(path, derivative)(sigma), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_predicted_noise_gives_the_velocity(path):
    data, noise, _ = triple(4, 3, 2)
    sigma = torch.tensor([0.0, 0.3, 0.6, 0.9]).double()
    x_t = path.interpolate(data, noise, sigma)
    ours = path.velocity_from_epsilon(x_t, noise, sigma)
    torch.testing.assert_close(ours, path.velocity(data, noise, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_predicted_noise_stays_finite_at_pure_noise(path):
    """alpha is clamped at 1e-3: an error of eps in the prediction is amplified 1000-fold at most."""
    _, noise, _ = triple(2, 3, 2)
    x_t = path.interpolate(torch.zeros_like(noise), noise, torch.ones(2).double())
    off = path.velocity_from_epsilon(x_t, noise + 1e-3, torch.ones(2).double())
    slope = float(path.d_alpha(torch.ones(())).abs())
    assert (off - path.velocity(torch.zeros_like(noise), noise, torch.ones(2).double())).abs().max() <= (
        slope * 1e-3 / MIN_ALPHA + 0.01
    )


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_velocity_points_to_the_data(path):
    data, noise, _ = triple(4, 3, 2)
    sigma = torch.tensor([0.0, 0.3, 0.6, 0.9]).double()
    x_t, v = path.interpolate(data, noise, sigma), path.velocity(data, noise, sigma)
    torch.testing.assert_close(path.data_from_velocity(x_t, v, sigma), data, rtol=1e-9, atol=1e-9)
    if path == FlowPath():
        torch.testing.assert_close(path.data_from_velocity(x_t, v, sigma), x_t - sigma[:, None, None] * v)


def test_half_precision_rounds_once():
    data, noise, sigma = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16(), torch.rand(2)
    ours = FlowPath("cosine").interpolate(data, noise, sigma)
    exact = FlowPath("cosine").interpolate(data.double(), noise.double(), sigma.double())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=1e-2, atol=0)


def test_sigma_may_be_one_number_or_one_per_sample():
    data, noise, _ = triple(3, 2, 2)
    one, many = torch.tensor(0.25).double(), torch.full((3,), 0.25).double()
    assert torch.equal(FlowPath().interpolate(data, noise, one), FlowPath().interpolate(data, noise, many))


D = torch.zeros(2, 3, 4)
BAD = [
    (lambda: FlowPath("cubic"), "schedule must be one of linear, cosine, got 'cubic'"),
    (lambda: FlowPath(sigma_min=1.0), "got sigma_min=1.0, sigma_max=1.0"),
    (lambda: FlowPath(sigma_min=-0.1), "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max < inf"),
    (lambda: FlowPath().alpha(0.5), "sigma must be a tensor, got float"),
    (lambda: FlowPath().alpha(torch.ones(2).half()), "sigma must be float32 or float64"),
    (lambda: FlowPath().interpolate(D, D, torch.ones(2, 1)), "sigma must be 0-d or [B], got shape (2, 1)"),
    (lambda: FlowPath().interpolate(D, D, torch.ones(3)), "sigma must be 0-d or have shape (B,) = (2,), got (3,)"),
    (lambda: FlowPath().velocity(D, D[:1], torch.ones(2)), "noise must have the data's shape (2, 3, 4), got (1, 3, 4)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
