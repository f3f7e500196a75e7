"""Samples of a network that knows the answer are perfect; the baselines beside them are what they say they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.normalizer import FeatureNormalizers
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.neighbours import neighbours_of
from blip3o_fast.training.quality import GenerationQuality, generation_quality

WIDTH = 6


class Exact(nn.Module):
    """Its condition is the data: it solves x_t for the noise. `wrong` pictures get another one's data."""

    def __init__(self, wrong=0):
        super().__init__()
        self.config = BLIP3oConfig.preset("tiny", in_channels=WIDTH, cross_attention_dim=WIDTH, sample_size=4)
        self.normalizer, self.wrong = None, wrong
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, timestep, condition):
        data = condition.roll(1, 0) if self.wrong else condition
        return (x_t - data) / (timestep / 1000)[:, None, None]


@pytest.fixture
def data():
    """Targets are the conditions; 40 to train on, 24 held out."""
    features = torch.randn(64, 16, WIDTH) + 2 * torch.randn(64, 1, WIDTH) + 1
    train, held = features[:40], features[40:]
    return SimpleNamespace(
        conditions=train, targets=train, raw_conditions=held, raw_targets=held, raw_mean=train.mean((0, 1)),
        normalizer=FeatureNormalizers.fit(train, train, "none"), raw_names=None,
    )  # fmt: skip


def measure(data, model=None, count=12, batch_size=64):
    quality = GenerationQuality(data, count, num_steps=4, guidance_scale=1.0, batch_size=batch_size)
    return quality, quality(model or Exact())


def test_perfect_samples_have_perfect_numbers_and_ridge_finds_the_identity(data):
    _, found = measure(data)
    for suffix in ("", "_ridge"):
        assert found[f"token_cosine{suffix}"] == pytest.approx(1, abs=1e-4)
        assert found[f"l2_distance{suffix}"] <= 1e-2
        assert found[f"frechet_distance{suffix}"] <= 1e-3
        assert [found[f"recall_at_{k}{suffix}"] for k in (1, 5, 10)] == [1, 1, 1]
    assert found["norm_ratio"] == pytest.approx(1, abs=1e-3)


def test_the_mean_embedding_finds_its_picture_by_chance_only(data):
    _, found = measure(data)
    assert [found[f"recall_at_{k}_chance"] for k in (1, 5, 10)] == pytest.approx([1 / 12, 5 / 12, 10 / 12])
    assert found["recall_at_5_mean_embedding"] == pytest.approx(5 / 12, abs=1e-6)
    # The mean at each place, judged as any prediction.
    mean = data.targets.mean(0).expand(12, -1, -1)
    truth = data.raw_targets[torch.arange(12) * 24 // 12]
    expected = torch.nn.functional.cosine_similarity(mean, truth, dim=-1).mean()
    assert found["token_cosine_mean_embedding"] == pytest.approx(float(expected), abs=1e-5)
    assert found["frechet_distance_mean_embedding"] > 1


def test_samples_of_the_wrong_picture_show(data):
    _, found = measure(data, Exact(wrong=1))
    assert found["recall_at_1"] <= 0.1 and found["token_cosine"] < 0.9
    # The same set of embeddings, though: only the pairing is wrong.
    assert found["frechet_distance"] <= 1e-3


def test_baselines_are_mapped_back_from_the_networks_space(data):
    plain = measure(data)[1]
    data.normalizer = FeatureNormalizers.fit(data.conditions, data.targets, "standardize")
    data.conditions, data.targets = data.normalizer.condition(data.conditions), data.normalizer.target(data.targets)
    model = Exact()
    model.normalizer = data.normalizer
    normalised = measure(data, model)[1]
    for name in ("token_cosine_mean_embedding", "l2_distance_mean_embedding", "token_cosine_ridge", "token_cosine"):
        assert normalised[name] == pytest.approx(plain[name], abs=1e-3), name


def test_the_number_does_not_depend_on_batches(data):
    first, second = measure(data)[0].generated, measure(data, batch_size=5)[0].generated
    assert first.shape == (12, 16, WIDTH)
    assert (first - second).abs().max() <= 1e-5


def test_what_was_generated_is_told_by_its_neighbours(data):
    quality, _ = measure(data)
    told = neighbours_of(quality)
    assert len(told) == 8 and all(len(one.nearest) == 4 for one in told)
    for one in told:
        assert one.nearest[0][0] == one.name and one.nearest[0][2]
        assert one.nearest[0][1] == pytest.approx(1, abs=1e-4)
        assert [itself for _, _, itself in one.nearest[1:]] == [False] * 3
    # Picture k of the chosen is place 2 k of the held-out ones, every 12 / 8 of them is shown.
    assert [one.name for one in told] == [f"held-out picture {2 * (k * 12 // 8)}" for k in range(8)]
    assert neighbours_of(None) == []


def test_there_is_nothing_to_measure_on_less_than_two_pictures(data):
    settings = TrainSettings("embeddings", "output", eval_generation_samples=1)
    assert generation_quality(settings, data) is None
    settings.eval_generation_samples = 99
    assert len(generation_quality(settings, data).targets) == 24
