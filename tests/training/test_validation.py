"""The evaluation loss: zero for the exact velocity, the same for everyone, in step with the yardstick."""

import pytest
import torch
from torch import nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.training import validation
from blip3o_fast.training.validation import Validation, evenly_spaced, levels

CPU = torch.device("cpu")


def config(**changes):
    return BLIP3oConfig.preset("tiny", in_channels=6, cross_attention_dim=6, sample_size=4, **changes)


class Exact(nn.Module):
    """Knows the data (its condition is the data) and solves x_t for the noise."""

    def __init__(self, config, error=0.0):
        super().__init__()
        self.config, self.error = config, error

    def forward(self, x_t, timestep, condition):
        lumina = self.config.time_convention == "lumina"
        sigma = (1 - timestep if lumina else timestep / 1000)[:, None, None]
        noise = (x_t - (1 - sigma) * condition) / sigma
        if self.config.prediction_type == "epsilon":
            return noise
        velocity = noise - condition + self.error
        return -velocity if lumina else velocity


@pytest.mark.parametrize("convention", ["blip3o", "lumina"])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_exact_velocity_has_no_loss_in_every_convention(convention, prediction):
    data = torch.randn(10, 16, 6)
    network = config(time_convention=convention, prediction_type=prediction)
    result = Validation(data, data, network, batch_size=4).run(Exact(network), CPU)
    assert result["loss"] <= 1e-8
    assert len([name for name in result if name.startswith("loss_sigma_")]) == len(levels()) == 8


def test_a_known_error_is_the_loss():
    data = torch.randn(10, 16, 6)
    result = Validation(data, data, config(), linear_losses=[0.5] * 8).run(Exact(config(), error=0.5), CPU)
    assert result["loss"] == pytest.approx(0.25, rel=1e-4)
    assert result["loss_over_linear"] == pytest.approx(0.5, rel=1e-4)


def test_the_number_does_not_depend_on_batches_or_ranks():
    data, condition = torch.randn(11, 16, 6), torch.randn(11, 16, 6)
    network = Exact(config())
    whole = Validation(condition, data, config(), batch_size=64).run(network, CPU)
    split = Validation(condition, data, config(), batch_size=3).run(network, CPU)
    assert whole["loss"] > 0.1
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    # Two ranks: what each would hand to the sum, added by hand.
    parts = []
    for rank in range(2):
        Validation(condition, data, config()).run(
            network, CPU, rank=rank, world_size=2, reduce=lambda sums: parts.append(sums) or sums
        )
    total = parts[0] + parts[1]
    assert float(total[:-1].sum() / total[-1] / 8) == pytest.approx(whole["loss"], rel=1e-6)


def test_noise_belongs_to_the_picture_not_to_the_run():
    seen = []

    class Spy(nn.Module):
        def forward(self, x_t, timestep, condition):
            seen.append((float(timestep[0]), x_t.clone()))
            return torch.zeros_like(x_t)

    data = torch.randn(3, 16, 6)
    torch.manual_seed(1)
    Validation(data, data, config()).run(Spy(), CPU)
    time, x_t = seen[2]
    noise = normal_noise_at(validation.NOISE_SEED, torch.arange(3), (16, 6))
    sigma = levels()[2]
    assert time == pytest.approx(1000 * sigma)
    assert (x_t - ((1 - sigma) * data + sigma * noise)).abs().max() <= 1e-6


def test_many_pictures_are_thinned_evenly():
    assert evenly_spaced(5, 8).tolist() == [0, 1, 2, 3, 4]
    chosen = evenly_spaced(1000, 256)
    assert len(chosen) == len(set(chosen.tolist())) == 256
    assert chosen[0] == 0 and chosen.diff().min() >= 3 and chosen[-1] >= 990


def test_more_metrics_come_from_the_main_process_only():
    data = torch.randn(4, 16, 6)
    extra = Validation(data, data, config(), more=lambda model: {"token_cosine": 0.5})
    assert extra.run(Exact(config()), CPU)["token_cosine"] == 0.5
    assert "token_cosine" not in extra.run(Exact(config()), CPU, rank=1, world_size=2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="conditions and targets must be equally many"):
        Validation(torch.zeros(2, 16, 6), torch.zeros(3, 16, 6), config())
