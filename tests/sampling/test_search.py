"""The search for a cheap sampler, and the order of the sampler's own steps, on ODEs whose solution is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast import sample
from blip3o_fast.flow.solvers import SOLVERS
from blip3o_fast.sampling import Sampler
from blip3o_fast.sampling.settings import SamplerSettings
from blip3o_fast.sampling.tune import Search, cost, front, relative_l2, tune

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2}


class Analytic(nn.Module):
    """x' = x c cos(2 sigma), c = 1 with a condition and `null_rate` without: x(0) = x(1) exp(-c sin(2) / 2)."""

    def __init__(self, null_rate: float = 0.25, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            cross_attention_dim=2, sample_size=2, in_channels=3, time_convention="blip3o",
            prediction_type="v_prediction", schedule="linear", sigma_min=0.0, sigma_max=1.0,
        )  # fmt: skip
        self.null_rate = null_rate
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x_t: Tensor, timestep: Tensor, condition: Tensor, encoder_mask: Tensor | None = None) -> Tensor:
        rate = torch.where(condition[:, :1, :1] == 0, self.null_rate, 1.0)
        return rate * x_t * torch.cos(2 * timestep.reshape(-1, 1, 1) / 1000)


CONDITION = torch.ones(2, 1, 2, dtype=torch.float64)
NOISE = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).reshape(2, 4, 3)


@pytest.mark.parametrize("grid", ["linear", "shifted"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_of_the_samplers_own_steps(solver, guidance, grid):
    """Halving the step divides the error by 2^order: through `ode_step`, with guidance, on unequal steps."""
    rate = 0.25 + guidance * (1 - 0.25)
    exact = NOISE * math.exp(-rate * math.sin(2) / 2)
    errors = []
    for steps in (60, 120, 240):
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # fp64, as fp32 levels would blur small errors
        sigmas = 3 * u / (1 + 2 * u) if grid == "shifted" else u
        ours = sample(
            Analytic(), CONDITION, noise=NOISE, num_steps=steps, sigmas=sigmas, solver=solver, guidance_scale=guidance
        )
        errors.append(float((ours - exact).abs().max()))
    measured = math.log2(errors[1] / errors[2])
    assert abs(measured - ORDERS[solver]) <= 0.15, (errors, measured)
    assert errors[2] <= (4e-2 if ORDERS[solver] == 1 else 4e-4)


def search(guidance: float = 2.0, **model) -> Search:
    return Search(Sampler(Analytic(**model)), CONDITION, NOISE, guidance_scale=guidance, reference_steps=400)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_found_is_within_the_error_and_cheaper_than_euler(guidance):
    made = search(guidance)
    best = tune(made, 0.01)
    assert best is not None
    again = made.run(best.settings)
    assert relative_l2(again, made.reference) == best.error <= 0.01
    assert (best.evaluations, best.passes) == cost(best.settings)
    assert not [trial for trial in made.trials if trial.error <= 0.01 and trial.passes < best.passes]
    euler = next(n for n in range(4, 400) if made.measure(made.settings("euler", n, "linear")).error <= 0.01)
    assert best.passes < euler * (2 if guidance == 2 else 1)


def test_no_run_is_made_twice():
    seen = []
    made = search()
    made.on_trial = seen.append
    tune(made, 0.01)
    assert len(seen) == len(made.trials) == len({trial.settings for trial in seen})


def test_guidance_is_left_out_where_it_changes_nothing():
    """Null and conditional velocity are one: all but one evaluation can do without, under the same error."""
    made = search(null_rate=1.0)
    best = tune(made, 0.01)
    assert best is not None and best.passes == best.evaluations + 1
    assert (best.settings.guidance_start, best.settings.guidance_end) != (1.0, 0.0)


def test_guidance_is_kept_where_it_matters():
    """One level without guidance, of any setting that was tried, is too far away: the null velocity is a strong one."""
    made = search(null_rate=-8.0, guidance=1.5)
    best = tune(made, 0.03)
    assert best is not None and best.passes == 2 * best.evaluations
    assert (best.settings.guidance_start, best.settings.guidance_end) == (1.0, 0.0)
    tried = [t for t in made.trials if (t.settings.guidance_start, t.settings.guidance_end) != (1.0, 0.0)]
    assert tried and min(trial.error for trial in tried) > 0.03


def test_nothing_within_the_error():
    made = search()
    assert tune(made, 1e-9, most=8) is None
    assert {trial.evaluations for trial in made.trials} == {4, 8}


def test_costs():
    def settings(solver: str, scale: float, **interval: float) -> SamplerSettings:
        return SamplerSettings(solver, 4, "linear", scale, **interval)

    assert cost(settings("euler", 2.0)) == (4, 8)
    assert cost(settings("heun", 2.0)) == (8, 16)
    assert cost(settings("heun", 1.0)) == cost(settings("heun", 0.0)) == (8, 8)
    assert cost(settings("euler", 2.0, guidance_start=0.8)) == (4, 7)
    assert cost(settings("midpoint", 2.0, guidance_end=0.2)) == (8, 15)  # the last half step is at 1 / 8


def test_the_front_has_no_one_who_is_beaten():
    made = search()
    tune(made, 0.01)
    kept = front(made.trials)
    assert [t.passes for t in kept] == sorted({t.passes for t in kept})
    assert [t.error for t in kept] == sorted({t.error for t in kept}, reverse=True)
    for trial in made.trials:
        assert any(k.passes <= trial.passes and k.error <= trial.error for k in kept)


def test_the_floor_is_the_references_own_error():
    made = search(1.0)
    exact = NOISE * math.exp(-math.sin(2) / 2)
    assert made.floor() == pytest.approx(relative_l2(made.reference, exact), rel=0.05)
