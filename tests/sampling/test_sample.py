"""`sample` against BLIP3-o's own loop over diffusers' scheduler, and what each argument does."""

import io
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor, nn

import blip3o_fast
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample, use_backend
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.solvers import SOLVERS, integrate, sigma_grid
from blip3o_fast.models.normalizer import FeatureNormalizers


def network(**overrides) -> BLIP3oDiT:
    """The tiny preset on a 2 x 2 grid, with gates and scales away from their initial zeros."""
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", sample_size=2, in_channels=8, **overrides)).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.normal_()
    return model


def conditions(samples: int = 3) -> Tensor:
    return torch.randn(samples, 5, 24)


def blip3o_loop(model: nn.Module, condition: Tensor, noise: Tensor, w: float, steps: int, truncate: bool) -> Tensor:
    """The steps of BLIP3-o's `sample_images`: null half first, guidance on all channels, the scheduler of diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps))
    context, latents = torch.cat([torch.zeros_like(condition), condition]), noise
    for timestep in scheduler.timesteps:
        fed = timestep.long() if truncate else timestep
        both = model(torch.cat([latents, latents]), fed.float().expand(2 * len(latents)), context)
        null, conditional = both.chunk(2)
        latents = scheduler.step(null + w * (conditional - null), timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("guidance", "steps"), [(3.0, 30), (1.5, 7)])
@torch.no_grad()
def test_it_is_the_loop_of_blip3o(guidance, steps, truncate):
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    theirs = blip3o_loop(model, condition, noise, guidance, steps, truncate)
    ours = sample(
        model, condition, num_steps=steps, guidance_scale=guidance, noise=noise, truncate_time=truncate,
        sigmas=sigma_grid(steps, "blip3o"),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    if not truncate:
        default = sample(model, condition, num_steps=steps, guidance_scale=guidance, noise=noise)
        torch.testing.assert_close(default, theirs, rtol=1e-5, atol=1e-5)  # levels 6e-8 apart, amplified by the network


@torch.no_grad()
def test_truncated_times_are_another_result():
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    exact, truncated = (sample(model, condition, noise=noise, num_steps=7, truncate_time=t) for t in (False, True))
    assert 1e-6 < (exact - truncated).abs().max() < 0.1


def test_defaults_are_those_of_blip3o():
    model, condition = network(), conditions(2)
    noise = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5))
    ours = sample(model, condition, generator=torch.Generator().manual_seed(5))
    theirs = sample(model, condition, num_steps=30, guidance_scale=3.0, solver="euler", noise=noise)
    assert torch.equal(ours, theirs)
    assert ours.shape == (2, 4, 8) and ours.dtype == torch.float32 and not ours.requires_grad


class Exact(nn.Module):
    """A network that knows its data: its velocity is exact in the convention of its configuration."""

    def __init__(self, path: FlowPath, prediction_type: str, time_convention: str, data: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            cross_attention_dim=24,
            sample_size=2,
            in_channels=8,
            time_convention=time_convention,
            prediction_type=prediction_type,
            schedule=path.schedule,
            sigma_min=path.sigma_min,
            sigma_max=path.sigma_max,
        )
        self.path, self.data, self.noise = path, data, noise
        self.anchor = nn.Parameter(torch.zeros((), dtype=data.dtype))
        self.first_input: Tensor | None = None

    def forward(self, x_t: Tensor, timestep: Tensor, condition: Tensor, encoder_mask: Tensor | None = None) -> Tensor:
        if self.first_input is None:
            self.first_input = x_t.clone()
        sigma = 1 - timestep if self.config.time_convention == "lumina" else timestep / 1000
        copies = len(x_t) // len(self.data)
        data, noise = self.data.repeat(copies, 1, 1), self.noise.repeat(copies, 1, 1)
        if self.config.prediction_type == "epsilon":
            return noise
        v = self.path.velocity(data, noise, sigma)
        return -v if self.config.time_convention == "lumina" else v


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("path", "prediction_type", "time_convention"),
    [
        (FlowPath(), "v_prediction", "blip3o"),
        (FlowPath(), "v_prediction", "lumina"),
        (FlowPath("cosine"), "v_prediction", "lumina"),
        (FlowPath(sigma_min=1e-4, sigma_max=0.8), "v_prediction", "blip3o"),
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_exact_network_gives_back_the_data(path, prediction_type, time_convention, solver, guidance):
    """Time, sign and schedule are read from the configuration; guidance between equals is no change."""
    data, noise = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    model = Exact(path, prediction_type, time_convention, data, noise)
    curved = path.schedule == "cosine"
    ours = sample(
        model, conditions(), noise=noise, num_steps=200 if curved else 3, solver=solver, guidance_scale=guidance
    )
    expected = path.interpolate(data, noise, torch.tensor(0.0))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.05 if curved else 1e-5)


class Gaussian(Exact):
    """The best network for data N(mean, deviation^2), in closed form; it knows x_t and the time only."""

    mean, deviation = 1.5, 0.4

    def forward(self, x_t: Tensor, timestep: Tensor, condition: Tensor, encoder_mask: Tensor | None = None) -> Tensor:
        sigma = 1 - timestep if self.config.time_convention == "lumina" else timestep / 1000
        alpha, s, d_alpha, d_s = (c[:, None, None] for c in self.path.coefficients(sigma))
        centred = (x_t - alpha * self.mean) / (alpha**2 * self.deviation**2 + s**2)
        epsilon = s * centred
        if self.config.prediction_type == "epsilon":
            return epsilon
        v = d_alpha * (self.mean + alpha * self.deviation**2 * centred) + d_s * epsilon
        return -v if self.config.time_convention == "lumina" else v


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("time_convention", ["blip3o", "lumina"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("path", [FlowPath(), FlowPath("cosine"), FlowPath(sigma_min=0.01)], ids=str)
def test_gaussian_data(path, prediction_type, time_convention, solver):
    """The exact flow takes noise z to mean + deviation * z (with sigma_min, the deviation includes its noise)."""
    z = torch.linspace(-2, 2, 32).reshape(1, 4, 8)
    model = Gaussian(path, prediction_type, time_convention, z, z)
    steps = 300 if solver == "euler" else 100
    ours = sample(model, conditions(1), noise=z, num_steps=steps, solver=solver, guidance_scale=1)
    expected = model.mean + (model.deviation**2 + path.sigma_min**2) ** 0.5 * z
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("sigma_max", [1.0, 0.8])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_starts_from_the_variance_of_training(schedule, sigma_max):
    """The network's first input is sigma_max * noise: what flow_interpolate gives at sigma = 1, not a sum of noises."""
    noise, data = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    model = Exact(FlowPath(schedule, 0.0, sigma_max), "v_prediction", "blip3o", data, noise)
    sample(model, conditions(), noise=noise, num_steps=2, guidance_scale=1.0)
    in_training = blip3o_fast.ops.flow_interpolate(
        data, torch.ones(3), noise=noise, schedule=schedule, sigma_max=sigma_max
    )
    torch.testing.assert_close(model.first_input, in_training, rtol=1e-6, atol=1e-7)


def counted(model: nn.Module) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    return calls


@pytest.mark.parametrize(
    ("guidance", "solver", "calls", "rows"),
    [
        (3.0, "euler", 4, 6),
        (1.0, "euler", 4, 3),
        (0.0, "euler", 4, 3),
        (2.0, "heun", 8, 6),
        (1, "midpoint", 8, 3),
        (2.0, "ab2", 4, 6),
    ],
)
def test_network_calls(guidance, solver, calls, rows):
    """Guidance doubles the batch, not the calls; scales 1 and 0 do not even double the batch."""
    model = network()
    seen = counted(model)
    sample(model, conditions(), num_steps=4, guidance_scale=guidance, solver=solver)
    assert seen == [(rows, 4, 8)] * calls


def test_single_pass_scales_are_the_limits_of_two_passes():
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    for scale in (1.0, 0.0):
        one = sample(model, condition, noise=noise, num_steps=4, guidance_scale=scale)
        two = sample(model, condition, noise=noise, num_steps=4, guidance_scale=scale + 1e-9)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    null = sample(model, torch.zeros_like(condition), noise=noise, num_steps=4, guidance_scale=1.0)
    assert torch.equal(null, one), "scale 0 ignores the condition"


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_solvers_are_integrate(solver):
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        time = (1000 * sigma).expand(3)
        null, conditional = model(x, time, torch.zeros_like(condition)), model(x, time, condition)
        return null + 2.5 * (conditional - null)

    with torch.no_grad():
        expected = integrate(velocity, noise, sigma_grid(5), solver=solver)
    ours = sample(model, condition, noise=noise, num_steps=5, guidance_scale=2.5, solver=solver)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_euler_steps_through_the_op(monkeypatch):
    calls = []
    real = blip3o_fast.ops.ode_step
    monkeypatch.setattr(blip3o_fast.ops, "ode_step", lambda *a: calls.append(a[2] is None) or real(*a))
    sample(network(), conditions(), num_steps=3)
    sample(network(), conditions(), num_steps=2, guidance_scale=1)
    assert calls == [False, False, False, True, True]


def test_backends_by_name_reach_the_op():
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        sample(network(), conditions(), num_steps=2)
    with use_backend("reference"):
        assert sample(network(), conditions(), num_steps=2).isfinite().all()


def test_several_samples_per_condition():
    """Rows i * n ... i * n + n - 1 are condition i's."""
    model, condition, noise = network(), conditions(), torch.randn(6, 4, 8)
    ours = sample(model, condition, num_samples_per_condition=2, noise=noise, num_steps=3)
    assert ours.shape == (6, 4, 8)
    each = [
        sample(model, condition[row // 2 : row // 2 + 1], noise=noise[row : row + 1], num_steps=3) for row in range(6)
    ]
    torch.testing.assert_close(ours, torch.cat(each), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1])


def test_context_mask():
    """A masked token does not count, whatever it holds; an all-true mask changes nothing."""
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    call = {"noise": noise, "num_steps": 3}
    mask = torch.ones(3, 5, dtype=torch.bool)
    plain = sample(model, condition, **call)
    torch.testing.assert_close(sample(model, condition, encoder_mask=mask, **call), plain, rtol=1e-4, atol=1e-5)
    mask[:, 3:] = False
    masked = sample(model, condition, encoder_mask=mask, **call)
    other = condition.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(sample(model, other, encoder_mask=mask, **call), masked, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(masked, plain, atol=1e-3)
    for scale in (0.0, 1.0):
        assert sample(model, condition, encoder_mask=mask, guidance_scale=scale, **call).isfinite().all()
    twice = sample(model, condition[:1], encoder_mask=mask[:1], num_samples_per_condition=3, **call)
    assert twice.shape == (3, 4, 8)


def test_intermediate_states():
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    for solver in SOLVERS:
        call = {"noise": noise, "num_steps": 4, "solver": solver}
        result, states = sample(model, condition, return_intermediates=True, **call)
        assert len(states) == 4 and torch.equal(states[-1], result)
        assert torch.equal(result, sample(model, condition, **call))
        assert not torch.equal(states[0], states[1])


def test_features_come_and_go_in_raw_form():
    """With a normaliser the caller sees raw features on both sides; the null condition is zero after normalisation."""
    raw_condition, raw_target = 5 + 3 * torch.randn(50, 5, 24), -2 + 7 * torch.randn(50, 4, 12)
    model, noise = network(), torch.randn(3, 4, 8)
    model.normalizer = FeatureNormalizers.fit(raw_condition, raw_target, "pca:8")
    ours, states = sample(model, raw_condition[:3], noise=noise, num_steps=3, return_intermediates=True)
    normalizer, model.normalizer = model.normalizer, None
    inside = sample(model, normalizer.condition(raw_condition[:3]), noise=noise, num_steps=3)
    assert torch.equal(ours, normalizer.target.inverse(inside))
    assert ours.shape == (3, 4, 12) and all(state.shape == (3, 4, 12) for state in states)
    assert torch.equal(states[-1], ours)
    model.normalizer = normalizer
    assert sample(model, raw_condition[:0], num_steps=3).shape == (0, 4, 12)


def test_no_conditions_no_samples():
    result, states = sample(network(), conditions(0), num_steps=3, return_intermediates=True)
    assert result.shape == (0, 4, 8) and len(states) == 3


def test_reproducible_by_generator():
    model, condition = network(), conditions()
    first, second, other = (
        sample(model, condition, num_steps=2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.allclose(first, other)
    torch.manual_seed(7)
    unseeded = sample(model, condition, num_steps=2)
    torch.manual_seed(7)
    assert torch.equal(unseeded, sample(model, condition, num_steps=2))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_state_is_wider_than_the_network(dtype, expected):
    """A half-precision network is called in its dtype while the state stays fp32."""
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    wide = sample(model, condition, noise=noise, num_steps=5)
    seen = []
    model.to(dtype).register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, args[2].context.dtype)))
    ours = sample(model, condition.to(dtype), noise=noise, num_steps=5)
    assert ours.dtype == expected and set(seen) == {(dtype, dtype)}
    assert (ours - wide).norm() < (0.1 if dtype == torch.bfloat16 else 1e-4) * wide.norm()


def test_conditions_of_another_dtype_are_cast():
    model, noise = network(), torch.randn(3, 4, 8)
    condition = conditions().half()
    assert torch.equal(
        sample(model, condition, noise=noise, num_steps=2), sample(model, condition.float(), noise=noise, num_steps=2)
    )


def test_the_model_is_left_as_it_was():
    model = network().train()
    sample(model, conditions(), num_steps=2)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


class Terminal(io.StringIO):
    def __init__(self, interactive: bool) -> None:
        super().__init__()
        self.interactive = interactive

    def isatty(self) -> bool:
        return self.interactive


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("wanted", "interactive"), [(True, True), (True, False), (False, True)])
def test_progress_only_where_it_is_wanted_and_seen(monkeypatch, wanted, interactive, solver):
    screen = Terminal(interactive)
    monkeypatch.setattr(sys, "stderr", screen)
    sample(network(), conditions(), num_steps=2, progress=wanted, solver=solver)
    assert ("sampling" in screen.getvalue()) == (wanted and interactive)
