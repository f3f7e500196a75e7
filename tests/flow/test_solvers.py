"""Solvers on ODEs with known solutions, against dopri5, and the noise levels against diffusers'."""

import math
import re

import numpy
import pytest
import torch

from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.solvers import SOLVERS, integrate, sigma_grid

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1}


def growth(x, sigma):
    """x' = x cos(2 sigma); x(sigma) = x(1) exp((sin 2 sigma - sin 2) / 2)."""
    return x * torch.cos(2 * sigma)


def logistic(x, sigma):
    """x' = x (1 - x), autonomous and nonlinear; from 1 down to 0 the solution is known."""
    return x * (1 - x)


X1 = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
PROBLEMS = {
    "growth": (growth, X1 * math.exp(-math.sin(2) / 2)),
    "logistic": (logistic, 1 / (1 + (1 / X1 - 1) * math.e)),
}


def stretched(steps: int) -> torch.Tensor:
    """A smooth grid of unequal steps in fp64."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 3 * u / (1 + 2 * u)


@pytest.mark.parametrize("grid", ["equal", "unequal"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_order(solver, problem, grid):
    """Halving the step divides the error by 2^order, also on unequal steps."""
    velocity, exact = PROBLEMS[problem]
    errors = []
    for steps in (60, 120, 240):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64) if grid == "equal" else stretched(steps)
        errors.append(float((integrate(velocity, X1, sigmas, solver=solver) - exact).abs().max()))
    measured = math.log2(errors[1] / errors[2])
    assert abs(measured - ORDERS[solver]) <= 0.15, (errors, measured)
    assert errors[2] <= (2e-2 if ORDERS[solver] == 1 else 2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dopri5_agrees(solver):
    from torchdiffeq import odeint

    weight = torch.randn(3, 3).double()

    def velocity(x, sigma):
        return torch.tanh(x @ weight) * (1 + sigma)

    oracle = odeint(
        lambda t, x: velocity(x, t), X1, torch.tensor([1.0, 0.0]).double(), method="dopri5", rtol=1e-10, atol=1e-12
    )[-1]
    steps = 4000 if solver == "euler" else 400
    ours = integrate(velocity, X1, torch.linspace(1, 0, steps + 1, dtype=torch.float64), solver=solver)
    assert not (ours - oracle).abs().max() > (2e-3 if solver == "euler" else 1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_exact_velocity_leads_back_to_the_data(solver, schedule):
    """On the straight line one step is exact; on the curved path it converges."""
    path = FlowPath(schedule)
    data, noise = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    steps = 1 if schedule == "linear" else 1000
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ours = integrate(lambda x, sigma: path.velocity(data, noise, sigma), noise, sigmas, solver=solver)
    assert not (ours - data).abs().max() > (1e-12 if schedule == "linear" else 5e-3)
    back = integrate(lambda x, sigma: path.velocity(data, noise, sigma), ours, sigmas.flip(0), solver=solver)
    assert not (back - noise).abs().max() > (1e-12 if schedule == "linear" else 1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_states_and_ends(solver):
    seen, states = [], []

    def velocity(x, sigma):
        seen.append(float(sigma))
        assert sigma.shape == ()
        return -x

    result = integrate(velocity, X1, sigma_grid(5), solver=solver, on_step=states.append)
    assert len(seen) == 5 * EVALUATIONS[solver] and len(states) == 5
    assert seen[0] == 1.0 and torch.equal(states[-1], result)
    assert (0.0 in seen) == (solver == "heun"), "only Heun asks for the velocity at sigma = 0"


def test_half_precision_states_are_rounded_once_per_step():
    x = torch.randn(64).bfloat16()
    ours = integrate(lambda x, sigma: x.float() * 0.1, x, torch.tensor([1.0, 0.0]))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, (x.double() * 0.9).float().bfloat16())
    kept = integrate(lambda x, sigma: x.bfloat16(), x.float(), torch.tensor([1.0, 0.0]))
    assert kept.dtype == torch.float32, "a half-precision network does not narrow the state"


def scheduler_sigmas(steps=None, shift=1.0, **settings):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps, **settings)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [1, 4, 30, 250])
def test_grids_are_those_of_the_scheduler(steps):
    """BLIP3-o hands the scheduler linspace(1, 1/S, S); the scheduler appends 0."""
    blip3o = scheduler_sigmas(sigmas=numpy.linspace(1.0, 1 / steps, steps))
    assert torch.equal(sigma_grid(steps, "blip3o"), blip3o)
    torch.testing.assert_close(sigma_grid(steps), blip3o, rtol=0, atol=1e-7)
    for shift in (1.0, 3.0, 0.5):
        theirs = scheduler_sigmas(shift=shift, sigmas=numpy.linspace(1.0, 1 / steps, steps))
        torch.testing.assert_close(sigma_grid(steps, "shifted", shift=shift), theirs, rtol=0, atol=1e-6)
        default = scheduler_sigmas(steps, shift=shift)
        torch.testing.assert_close(sigma_grid(steps, "diffusers", shift=shift), default, rtol=0, atol=1e-6)


def test_the_thirty_levels_of_blip3o():
    from diffusers import FlowMatchEulerDiscreteScheduler

    from blip3o_fast.flow.timesteps import network_time

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / 30, 30))
    sigmas = sigma_grid(30, "blip3o")
    assert torch.equal(sigmas, scheduler.sigmas)
    torch.testing.assert_close(network_time(sigmas[:-1]), scheduler.timesteps, rtol=0, atol=1e-4)
    assert torch.equal(network_time(sigmas[:-1], truncate=True).long(), scheduler.timesteps.long())
    assert network_time(sigmas[:3], truncate=True).tolist() == [1000, 966, 933]


@pytest.mark.parametrize("steps", [1, 2, 30, 1000])
@pytest.mark.parametrize(
    ("kind", "shift"),
    [("linear", 1.0), ("shifted", 3.0), ("shifted", 0.2), ("cosine", 1.0), ("blip3o", 1.0), ("diffusers", 2.0)],
)
def test_every_grid_falls_from_one_to_zero(kind, shift, steps):
    sigmas = sigma_grid(steps, kind, shift=shift)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()
    scaled = sigma_grid(steps, kind, shift=shift, start=0.999)
    assert scaled[0] == torch.tensor(0.999) and scaled[-1] == 0.0


S = sigma_grid(2)
BAD = [
    (lambda: sigma_grid(0), "num_steps must be an integer >= 1, got 0"),
    (lambda: sigma_grid(2.5), "num_steps must be an integer >= 1, got 2.5"),
    (lambda: sigma_grid(3, "karras"), "kind must be one of linear, shifted, cosine, blip3o, diffusers, got 'karras'"),
    (lambda: sigma_grid(3, "shifted", shift=0.0), "shift must be positive and finite, got 0.0"),
    (lambda: sigma_grid(3, "linear", shift=2.0), "shift = 2.0 needs kind='shifted' or 'diffusers', got kind='linear'"),
    (lambda: sigma_grid(3, start=0.0), "start must be in (0, 1], got 0.0"),
    (lambda: integrate(growth, X1, S, solver="rk4"), "solver must be one of euler, midpoint, heun, ab2, got 'rk4'"),
    (lambda: integrate(growth, X1, [1.0, 0.0]), "sigmas must be a float32 or float64 tensor, got list"),
    (lambda: integrate(growth, X1, S.half()), "sigmas must be a float32 or float64 tensor, got torch.float16"),
    (lambda: integrate(growth, X1, S[:1]), "sigmas must have shape (S + 1,), S >= 1, got (1,)"),
    (lambda: integrate(growth, X1, torch.tensor([1.0, 1.0, 0.0])), "sigmas must be strictly monotone, got [1.0, 1.0,"),
    (lambda: integrate(growth, X1, torch.tensor([1.0, float("nan")])), "sigmas must be strictly monotone, got [1.0, n"),
    (lambda: integrate(lambda x, s: x[:1], X1, S), "velocity must return x's shape (3,), got (1,)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
