"""Every metric against scipy, scikit-learn, torch.nn.functional or a brute-force loop."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import cosine_similarity

from blip3o_fast.evaluation import metrics


def pair(n=7, tokens=5, channels=11, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(n, tokens, channels, generator=g, dtype=torch.float64) + 0.7
    generated = target + 0.8 * torch.randn(n, tokens, channels, generator=g, dtype=torch.float64)
    return generated.to(dtype), target.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_cosine_equals_torch(dtype):
    generated, target = pair(dtype=dtype)
    expected = F.cosine_similarity(generated.double(), target.double(), dim=-1).mean()
    assert abs(metrics.token_cosine(generated, target) - float(expected)) <= 1e-12


def test_centred_cosine_removes_the_common_direction():
    generated, target = pair()
    mean = target.mean((0, 1))
    expected = F.cosine_similarity((generated - mean).double(), (target - mean).double(), dim=-1)
    assert abs(metrics.centred_cosine(generated, target, mean) - float(expected.mean())) <= 1e-6
    # A constant prediction other than the mean is uncorrelated with the individual picture.
    many = torch.randn(4000, 1, 8, generator=torch.Generator().manual_seed(1)) + 3.0
    constant = many.mean((0, 1)) + torch.ones(8)
    value = metrics.centred_cosine(constant.expand_as(many), many, many.mean((0, 1)))
    assert abs(value) <= 0.02
    assert metrics.token_cosine(constant.expand_as(many), many) >= 0.9


def test_zero_vectors_have_cosine_zero_and_no_nan():
    zeros, target = torch.zeros(3, 2, 4), torch.ones(3, 2, 4)
    assert metrics.token_cosine(zeros, target) == 0.0
    assert metrics.centred_cosine(target, target, torch.ones(4)) == 0.0


def test_l2_distance_equals_numpy():
    generated, target = pair()
    expected = np.linalg.norm(generated.double().numpy() - target.double().numpy(), axis=-1).mean()
    assert abs(metrics.l2_distance(generated, target) - expected) <= 1e-12


@pytest.mark.parametrize("per_token_mean", [False, True])
def test_recall_equals_a_brute_force_ranking(per_token_mean):
    generated, target = pair(n=40, seed=3)
    generated = target + 2.5 * (generated - target)
    mean = target.mean(0) if per_token_mean else target.mean((0, 1))
    table = cosine_similarity((generated - mean).mean(1).double().numpy(), (target - mean).mean(1).double().numpy())
    ranks = [(row > row[i]).sum() for i, row in enumerate(table)]
    recall = metrics.recall_at_k(generated, target, mean, (1, 5, 40))
    for k in (1, 5, 40):
        assert abs(recall[k] - np.mean([rank < k for rank in ranks])) <= 1e-12
    assert 0 < recall[1] < recall[5] < recall[40] == 1.0


def test_recall_runs_in_blocks(monkeypatch):
    generated, target = pair(n=23, seed=4)
    whole = metrics.recall_at_k(generated, target, target.mean((0, 1)))
    monkeypatch.setattr(metrics, "_BLOCK", 5)
    assert metrics.recall_at_k(generated, target, target.mean((0, 1))) == whole


def test_recall_of_what_carries_no_information_is_chance():
    _, target = pair(n=20)
    mean = target.mean((0, 1))
    constant = mean.expand_as(target)  # centred: all zero, every target ties
    recall = metrics.recall_at_k(constant, target, mean, (1, 5))
    assert abs(recall[1] - 1 / 20) <= 1e-12 and abs(recall[5] - 5 / 20) <= 1e-12
    # Two copies of each picture cannot be told apart: half of the hits.
    twins = torch.cat([target, target])
    assert abs(metrics.recall_at_k(twins, twins, mean, (1,))[1] - 0.5) <= 1e-12
    assert metrics.recall_at_k(target, target, mean, (1,))[1] == 1.0


def scipy_frechet(x, y):
    x, y = (v.reshape(-1, v.shape[-1]).double().numpy() for v in (x, y))
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    offset = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return offset + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (200, 40), (90, 300)])
def test_frechet_distance_equals_scipy(n, m):
    g = torch.Generator().manual_seed(n)
    mix = torch.randn(12, 12, generator=g)
    first = torch.randn(n, 12, generator=g) @ mix + 0.5
    second = torch.randn(m, 12, generator=g) * torch.linspace(0.2, 3, 12)
    expected = scipy_frechet(first, second)
    assert abs(metrics.frechet_distance(first, second) - expected) <= 1e-7 * expected


def test_frechet_distance_with_fewer_vectors_than_channels():
    # Where sqrtm is ill conditioned there is a closed form: one set is the other one, scaled and moved.
    g = torch.Generator().manual_seed(5)
    first = torch.randn(6, 30, generator=g, dtype=torch.float64)
    second = 3 * (first - first.mean(0)) + first.mean(0) + 2
    expected = 30 * 4.0 + (1 - 3) ** 2 * float(first.var(0).sum())
    assert abs(metrics.frechet_distance(first, second) - expected) <= 1e-9 * expected
    assert metrics.frechet_distance(first, first) <= 1e-9
    assert metrics.frechet_distance(first.reshape(2, 3, 30), second) == pytest.approx(expected)


BAD = [
    (lambda x: metrics.token_cosine(x, x[:, :2]), "same shape"),
    (lambda x: metrics.token_cosine(x[0], x[0]), r"generated must have shape \[n, tokens, channels\]"),
    (lambda x: metrics.l2_distance(x.int(), x), "floating point"),
    (lambda x: metrics.token_cosine(x[:0], x[:0]), "empty"),
    (lambda x: metrics.centred_cosine(x, x, torch.zeros(3)), "mean must have shape"),
    (lambda x: metrics.recall_at_k(x, x, x.mean(0), (0,)), "positive integers"),
    (lambda x: metrics.frechet_distance(x[:1, :1], x), "at least 2 vectors"),
    (lambda x: metrics.frechet_distance(x, x[..., :4]), "channels"),
    (lambda x: metrics.frechet_distance(x[0, 0], x), "first must be"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(pair()[0])


def test_features_that_fill_few_dimensions_keep_their_distance_and_only_those_rows():
    # The same Gaussians in 5 dimensions and, turned, in 96: an isometry.
    first, second = torch.randn(300, 5, dtype=torch.float64), 2 * torch.randn(200, 5, dtype=torch.float64) + 1
    basis = torch.linalg.qr(torch.randn(96, 5, dtype=torch.float64)).Q
    wide = [metrics.Gaussian.fit(x @ basis.T) for x in (first, second)]
    assert all(5 <= len(gaussian.root) <= 10 for gaussian in wide)
    assert wide[0].distance(wide[1]) == pytest.approx(metrics.frechet_distance(first, second), rel=1e-10)
    # Nothing varies at all: the distance of the means, and what the other set varies.
    still = metrics.Gaussian.fit(torch.ones(7, 5, dtype=torch.float64))
    spread = float(first.var(0).sum() + (first.mean(0) - 1).square().sum())
    assert still.distance(metrics.Gaussian.fit(first)) == pytest.approx(spread, rel=1e-12)
    assert still.distance(still) == 0
