"""FlowMatchingLoss: exact networks have loss 0, batching changes nothing, and four known mistakes are not made."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.flow.loss import FlowMatchingLoss, velocity_from_model
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.timesteps import draw_sigma
from blip3o_fast.ops._philox import normal_noise

CONVENTIONS = [
    (FlowPath(), "v_prediction", "blip3o"),
    (FlowPath(sigma_min=1e-4), "v_prediction", "lumina"),
    (FlowPath("cosine"), "v_prediction", "blip3o"),
    (FlowPath("cosine", 0.01, 0.9), "epsilon", "blip3o"),
    (FlowPath(), "epsilon", "lumina"),
]


class Knowing(nn.Module):
    """Knows data and noise, and answers exactly, in the convention asked for, from nothing but x_t and the time."""

    def __init__(self, data: Tensor, noise: Tensor, path: FlowPath, prediction_type: str, time_convention: str) -> None:
        super().__init__()
        self.data, self.noise, self.path = data, noise, path
        self.prediction_type, self.time_convention = prediction_type, time_convention
        self.heard: list[Tensor] = []

    def forward(self, x_t: Tensor, timestep: Tensor, condition: Tensor, encoder_mask: Tensor | None = None) -> Tensor:
        self.heard.append(timestep)
        sigma = 1 - timestep if self.time_convention == "lumina" else timestep / 1000
        torch.testing.assert_close(x_t, self.path.interpolate(self.data, self.noise, sigma), rtol=1e-4, atol=1e-5)
        if self.prediction_type == "epsilon":
            return self.noise
        v = self.path.velocity(self.data, self.noise, sigma)
        return -v if self.time_convention == "lumina" else v


class Linear(nn.Module):
    """Enough of a network: every input matters."""

    def __init__(self, channels: int = 4, width: int = 3) -> None:
        super().__init__()
        self.of_x, self.of_c = nn.Linear(channels, channels), nn.Linear(width, channels)

    def forward(self, x_t: Tensor, timestep: Tensor, condition: Tensor, encoder_mask: Tensor | None = None) -> Tensor:
        c = condition if encoder_mask is None else condition * encoder_mask[..., None]
        return self.of_x(x_t) + self.of_c(c.mean(1, keepdim=True)) + timestep[:, None, None] / 1000


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    return 0.3 + torch.randn(samples, 5, 4), torch.randn(samples, 2, 3)


@pytest.mark.parametrize(("path", "prediction_type", "time_convention"), CONVENTIONS, ids=str)
def test_the_exact_network_has_loss_zero(path, prediction_type, time_convention):
    data, condition = batch()
    loss = FlowMatchingLoss(path=path, prediction_type=prediction_type, time_convention=time_convention)
    noise = normal_noise(torch.tensor([3, 40]), data.shape)
    model = Knowing(data, noise, path, prediction_type, time_convention)
    value, metrics = loss(model, data, condition, seed=3, sample_index=40)
    assert not value > 1e-10
    assert metrics["cosine_similarity"] == pytest.approx(1.0, abs=1e-5) and metrics["snr_db"] > 90
    sigma = draw_sigma(3, torch.arange(40, 46))
    expected = 1 - sigma if time_convention == "lumina" else 1000 * sigma
    torch.testing.assert_close(model.heard[0], expected)


@pytest.mark.parametrize(("path", "prediction_type", "time_convention"), CONVENTIONS, ids=str)
def test_the_exact_network_has_the_exact_velocity(path, prediction_type, time_convention):
    """`velocity_from_model` undoes every convention; integrating it leads back to the data."""
    from blip3o_fast.flow.solvers import integrate, sigma_grid

    data, condition = batch()
    data, noise = data.double(), torch.randn(6, 5, 4).double()
    model = Knowing(data, noise, path, prediction_type, time_convention)
    config = SimpleNamespace(
        time_convention=time_convention,
        prediction_type=prediction_type,
        schedule=path.schedule,
        sigma_min=path.sigma_min,
        sigma_max=path.sigma_max,
    )
    sigma = torch.tensor([0.0, 0.1, 0.4, 0.6, 0.8, 0.9]).double()
    x_t = path.interpolate(data, noise, sigma)
    ours = velocity_from_model(model, x_t, sigma, condition, None, config)
    torch.testing.assert_close(ours, path.velocity(data, noise, sigma), rtol=1e-6, atol=1e-6)

    grid = sigma_grid(400, start=0.9).double()
    start = path.interpolate(data, noise, grid[0])
    model.path = SimpleNamespace(interpolate=lambda *_: model.seen, velocity=path.velocity)

    def velocity(x: Tensor, level: Tensor) -> Tensor:
        model.seen = x  # the integrated x only stays near the path: do not compare
        return velocity_from_model(model, x, level, condition, None, config)

    end = integrate(velocity, start, grid, solver="heun")
    torch.testing.assert_close(end, path.interpolate(data, noise, grid[-1]), rtol=0, atol=1e-3)


def test_it_is_what_its_parts_say():
    """Sigma, noise, forward, mean squared error: written out with torch.nn.functional."""
    data, condition = batch()
    model = Linear().eval()
    value, metrics = FlowMatchingLoss()(model, data, condition, seed=9, sample_index=torch.arange(20, 26))
    sigma = draw_sigma(9, torch.arange(20, 26))
    noise = normal_noise(torch.tensor([9, 20]), data.shape)
    x_t = (1 - sigma)[:, None, None] * data + sigma[:, None, None] * noise
    expected = nn.functional.mse_loss(model(x_t, 1000 * sigma, condition), noise - data)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(metrics["mse"], value.detach())


def test_gradients_reach_the_network():
    data, condition = batch()
    model = Linear()
    value, _ = FlowMatchingLoss(regularization_weight=0.1)(model, data, condition, seed=9, sample_index=0)
    value.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sigma, seed = draw_sigma(9, torch.arange(6)), torch.tensor([9, 0])
    x_t = ops.flow_interpolate_ref(data, sigma, seed=seed)
    from blip3o_fast.flow.timesteps import drop_condition

    pred = model(x_t, 1000 * sigma, drop_condition(condition, 0.1, 9, torch.arange(6)))
    ops.flow_matching_loss_ref(pred, data, sigma, seed=seed, regularization_weight=0.1)[0].backward()
    for ours, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)


def test_ranks_and_accumulation_do_not_matter():
    """The mean over micro-batches of any size is the loss of the whole batch, gradients too; dropout included."""
    data, condition = batch(12)
    model, loss = Linear(), FlowMatchingLoss(condition_dropout=0.5, distribution="logit_normal")
    whole, _ = loss(model, data, condition, seed=4, sample_index=100)
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for size in (1, 4, 6):
        model.zero_grad()
        total = 0.0
        for start in range(0, 12, size):
            part = slice(start, start + size)
            value, _ = loss(model, data[part], condition[part], seed=4, sample_index=100 + start)
            (value * size / 12).backward()
            total += float(value.detach()) * size / 12
        assert total == pytest.approx(float(whole.detach()), rel=1e-5)
        for ours, parameter in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_samples_in_any_order():
    """Indices that are not consecutive take their noise from outside the ops: the same noise."""
    data, condition = batch()
    model, loss = Linear().eval(), FlowMatchingLoss()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    straight, _ = loss(model, data, condition, seed=4, sample_index=torch.arange(6))
    shuffled, _ = loss(model, data[order], condition[order], seed=4, sample_index=order)
    torch.testing.assert_close(shuffled, straight, rtol=1e-5, atol=1e-6)
    half, _ = loss(model.bfloat16(), data.bfloat16()[order], condition.bfloat16()[order], seed=4, sample_index=order)
    assert half.dtype == torch.float32 and abs(float((half - straight).detach())) < 0.05


def test_dropout_is_for_training():
    data, condition = batch(64)
    model, loss = Linear(), FlowMatchingLoss(condition_dropout=1.0)
    null, _ = loss(model, data, torch.zeros_like(condition), seed=4, sample_index=0, condition_dropout=0.0)
    call = {"seed": 4, "sample_index": 0}
    assert torch.equal(loss(model.train(), data, condition, **call)[0], null)
    evaluated = loss(model.eval(), data, condition, **call)[0]
    assert not torch.equal(evaluated, null)
    assert torch.equal(loss(model, data, condition, condition_dropout=1.0, **call)[0], null)
    assert torch.equal(loss(model.train(), data, condition, condition_dropout=0.0, **call)[0], evaluated)


def test_mask_and_fixed_sigma_reach_the_network():
    data, condition = batch()
    model, loss, mask = Linear().eval(), FlowMatchingLoss(), torch.rand(6, 2) > 0.5
    sigma = torch.linspace(0, 1, 6)
    call = {"seed": 4, "sample_index": 0, "sigma": sigma}
    masked, _ = loss(model, data, condition, encoder_mask=mask, **call)
    assert torch.equal(masked, loss(model, data, condition * mask[..., None], **call)[0])
    noise = normal_noise(torch.tensor([4, 0]), data.shape)
    x_t = FlowPath().interpolate(data, noise, sigma)
    expected = nn.functional.mse_loss(model(x_t, 1000 * sigma, condition), noise - data)
    torch.testing.assert_close(loss(model, data, condition, **call)[0], expected, rtol=1e-5, atol=1e-6)


def test_learned_variance_is_cut_off():
    """A `learn_sigma` network has twice the channels; flow matching reads the first half."""
    data, condition = batch()
    model = Linear().eval()

    def doubled(x_t, timestep, c, encoder_mask=None):
        out = model(x_t, timestep, c)
        return torch.cat([out, torch.full_like(out, 1e9)], -1)

    plain = FlowMatchingLoss()(model, data, condition, seed=1, sample_index=0)[0]
    assert torch.equal(FlowMatchingLoss()(doubled, data, condition, seed=1, sample_index=0)[0], plain)


# ---- the four mistakes of the script this package began as -----------------------------------------------------------


def test_mistake_a_noise_is_drawn_once():
    """A target with noise other than that in x_t cannot be predicted: the exact answer scores 2.0, not 0."""
    data, condition = torch.randn(64, 8, 16), torch.randn(64, 2, 3)
    noise = normal_noise(torch.tensor([3, 0]), data.shape)
    model = Knowing(data, noise, FlowPath(), "v_prediction", "blip3o")
    assert not FlowMatchingLoss()(model, data, condition, seed=3, sample_index=0)[0] > 1e-10
    fresh, _ = ops.flow_matching_loss(noise - data, data, torch.rand(64), seed=torch.tensor([3, 64]))
    assert float(fresh) == pytest.approx(2.0, abs=0.1), "this is what a second draw would have cost"


@pytest.mark.parametrize("sigma_min", [0.0, 1e-4])
def test_mistake_b_the_sign_of_the_noise(sigma_min):
    """The linear target is d x_t / d sigma; with the noise's sign turned it is off by 2."""
    data, noise, sigma = torch.randn(8, 9, 16).double(), torch.randn(8, 9, 16).double(), torch.rand(8).double()
    settings = {"noise": noise, "sigma_min": sigma_min}
    step = 1e-6
    derivative = (
        ops.flow_interpolate(data, sigma + step, **settings) - ops.flow_interpolate(data, sigma - step, **settings)
    ) / (2 * step)
    assert not ops.flow_matching_loss(derivative, data, sigma, **settings)[0] > 1e-15
    turned = derivative - 2 * (1 - sigma_min) * noise
    wrong = ops.flow_matching_loss(turned, data, sigma, **settings)[0]
    assert math.sqrt(wrong) == pytest.approx(2.0, abs=0.15)


def test_mistake_c_the_cosine_target_has_both_derivatives():
    """d alpha / d sigma belongs to it; without that part the target is off by a lot at sigma = 0.37."""
    data, noise = torch.randn(8, 9, 16).double(), torch.randn(8, 9, 16).double()
    sigma = torch.full((8,), 0.37).double()
    settings = {"noise": noise, "schedule": "cosine"}
    step = 1e-6
    derivative = (
        ops.flow_interpolate(data, sigma + step, **settings) - ops.flow_interpolate(data, sigma - step, **settings)
    ) / (2 * step)
    assert not ops.flow_matching_loss(derivative, data, sigma, **settings)[0] > 1e-15
    constant_alpha = noise * (math.pi / 2) * math.cos(math.pi * 0.37 / 2) - data
    assert math.sqrt(ops.flow_matching_loss(constant_alpha, data, sigma, **settings)[0]) > 0.4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sigma_max", [1.0, 0.8])
def test_mistake_d_training_starts_where_sampling_starts(schedule, sigma_max):
    """At sigma = 1 x_t is sigma_max * noise and nothing else: variance sigma_max^2, which is what `sample` starts from
    (tests/sampling), and not the sum of two noises."""
    data = 5 + torch.randn(200, 8, 16)
    settings = {"seed": torch.tensor([1, 0]), "schedule": schedule, "sigma_max": sigma_max}
    with ops.use_backend("reference"):  # which makes its normals as normal_noise does, to the last bit
        x_t = ops.flow_interpolate(data, torch.ones(200), **settings)
    assert torch.equal(x_t, sigma_max * normal_noise(torch.tensor([1, 0]), data.shape))
    assert float(x_t.var()) == pytest.approx(sigma_max**2, rel=0.03)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_configuration():
    from blip3o_fast import BLIP3oConfig

    config = BLIP3oConfig.preset("tiny", schedule="cosine", sigma_min=0.01, prediction_type="epsilon")
    loss = FlowMatchingLoss.from_config(config, condition_dropout=0.2)
    assert loss.path == FlowPath("cosine", 0.01, 1.0)
    assert (loss.prediction_type, loss.time_convention, loss.condition_dropout) == ("epsilon", "blip3o", 0.2)


def call(**change) -> None:
    given = {"model": Linear(), "data": torch.zeros(2, 5, 4), "condition": torch.zeros(2, 2, 3), "sample_index": 0}
    given |= {"seed": 1} | change
    FlowMatchingLoss()(given.pop("model"), given.pop("data"), given.pop("condition"), **given)


BAD = [
    (lambda: FlowMatchingLoss(prediction_type="x0"), "prediction_type must be one of v_prediction, epsilon, got 'x0'"),
    (lambda: FlowMatchingLoss(time_convention="sd3"), "time_convention must be one of blip3o, lumina, got 'sd3'"),
    (lambda: FlowMatchingLoss(distribution="beta"), "distribution must be one of uniform, logit_normal, shifted"),
    (lambda: FlowMatchingLoss(condition_dropout=2), "condition_dropout must be in [0, 1], got 2"),
    (lambda: FlowMatchingLoss(regularization_weight=-1), "regularization_weight must be a finite number >= 0, got -1"),
    (lambda: call(sample_index=torch.arange(3)), "sample_index must be an integer or int64 of shape (B,) = (2,), got"),
    (lambda: call(sample_index=torch.ones(2)), "sample_index must be an integer or int64 of shape (B,) = (2,), got"),
    (lambda: call(seed=1.5), "seed must be an integer that fits into 64 bits, got 1.5"),
    (lambda: call(sigma=torch.zeros(3)), "sigma must have shape (B) = (2), got (3,)"),
    (lambda: call(model=lambda x, t, c: x[..., :3]), "model must return x_t's shape (2, 5, 4), got (2, 5, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()
