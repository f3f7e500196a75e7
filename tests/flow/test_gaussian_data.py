"""Gaussian data: the best velocity has a closed form, and integrating it must turn noise into exactly that Gaussian."""

import pytest
import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.solvers import integrate, sigma_grid
from blip3o_fast.flow.yardstick import yardstick

PATHS = [FlowPath(), FlowPath("cosine")]
CHANNELS = 4


class Gaussian:
    """data ~ N(mean, covariance). With e = (x - alpha m) and V = alpha^2 C + s^2 I the conditional expectations are
    E[data | x] = m + alpha C V^-1 e and E[noise | x] = s V^-1 e (Gaussian conditioning)."""

    def __init__(self) -> None:
        self.mean = torch.randn(CHANNELS).double()
        self.root = torch.randn(CHANNELS, CHANNELS).double() / 2 + torch.eye(CHANNELS).double()
        self.covariance = self.root @ self.root.T

    def draw(self, *shape: int) -> Tensor:
        return self.mean + torch.randn(*shape, CHANNELS).double() @ self.root.T

    def velocity(self, x: Tensor, sigma: Tensor, path: FlowPath) -> Tensor:
        alpha, s, d_alpha, d_s = (c.double() for c in path.coefficients(sigma.double()))
        total = alpha**2 * self.covariance + s**2 * torch.eye(CHANNELS).double()
        whitened = torch.linalg.solve(total, (x - alpha * self.mean).mT).mT
        data = self.mean + alpha * whitened @ self.covariance
        return d_alpha * data + d_s * s * whitened


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_flow_maps_noise_to_the_data_distribution(path):
    """The velocity is affine in x, so the integrated map is x0 -> M x0 + b, read off exactly at a basis:
    b must be the mean and M M^T the covariance. No sampling error."""
    gaussian = Gaussian()
    probes = torch.cat([torch.zeros(1, CHANNELS), torch.eye(CHANNELS)]).double()
    grid = sigma_grid(400).double() if path.schedule == "linear" else sigma_grid(2000).double()
    ends = integrate(lambda x, sigma: gaussian.velocity(x, sigma, path), probes, grid, solver="heun")
    shift, matrix = ends[0], (ends[1:] - ends[0]).T
    torch.testing.assert_close(shift, gaussian.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(matrix @ matrix.T, gaussian.covariance, rtol=0, atol=5e-3)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "ab2"])
def test_samples_have_the_mean_and_covariance_of_the_data(solver):
    gaussian, path, count = Gaussian(), FlowPath(), 20_000
    grid = sigma_grid(400 if solver == "euler" else 60).double()
    noise = torch.randn(count, CHANNELS).double()
    samples = integrate(lambda x, sigma: gaussian.velocity(x, sigma, path), noise, grid, solver=solver)
    error = samples.std(0) / count**0.5
    assert not ((samples.mean(0) - gaussian.mean).abs() > 4.5 * error + 5e-3).any()
    scale = float(gaussian.covariance.diagonal().max())
    bound = 4.5 * scale * (2 / count) ** 0.5 + (0.03 if solver == "euler" else 0.01) * scale
    assert not (samples.T.cov() - gaussian.covariance).abs().max() > bound


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_no_other_velocity_has_a_lower_loss(path):
    """The closed form is the minimum of the training loss, and for Gaussian data the yardstick's linear line is it."""
    gaussian = Gaussian()
    data = gaussian.draw(4000, 2)
    line = yardstick(torch.randn(4000, 2, 3), data, path=path, sigma_edges=(0.4, 0.4 + 1e-9)).linear_unconditional
    sigma = torch.full((4000,), 0.4).double()
    settings = {"seed": torch.tensor([1, 0]), "schedule": path.schedule}
    x_t = ops.flow_interpolate(data, sigma, **settings)
    best = gaussian.velocity(x_t, torch.tensor(0.4), path)
    loss, _ = ops.flow_matching_loss(best, data, sigma, **settings)
    assert float(loss) == pytest.approx(line.per_bucket[0], rel=0.03)
    for other in (0.9 * best, 1.1 * best, best + 0.2, best + 0.2 * torch.randn_like(best)):
        assert ops.flow_matching_loss(other, data, sigma, **settings)[0] > loss
