"""Baselines against scikit-learn and direct enumeration."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from blip3o_fast.evaluation import baselines, metrics


def linear_data(n=30, tokens=4, e=9, c=6, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    condition = torch.randn(n, tokens, e, generator=g) * torch.linspace(0.1, 4, e) + 5
    weight = torch.randn(e, c, generator=g)
    return condition, condition @ weight + noise * torch.randn(n, tokens, c, generator=g) - 2


def test_mean_embedding_is_per_position():
    _, target = linear_data()
    mean = baselines.mean_embedding(target)
    assert mean.shape == target.shape[1:]
    assert torch.allclose(mean, target.mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="non-empty"):
        baselines.mean_embedding(target[:0])


def test_ridge_equals_scikit_learn_at_the_chosen_strength():
    condition, target = linear_data()
    ridge = baselines.fit_ridge(condition, target)
    x, y = condition.reshape(-1, 9).double().numpy(), target.reshape(-1, 6).double().numpy()
    oracle = SklearnRidge(alpha=ridge.strength).fit(x, y)
    assert np.abs(ridge.weight.numpy() - oracle.coef_.T).max() <= 1e-4
    fresh, _ = linear_data(seed=1)
    expected = oracle.predict(fresh.reshape(-1, 9).double().numpy()).reshape(30, 4, 6)
    assert np.abs(ridge(fresh).numpy() - expected).max() <= 1e-3


def test_strength_is_chosen_on_held_back_pictures():
    condition, target = linear_data(n=40, noise=2.0)
    n = 40
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    check, fit = order[:8], order[8:]
    x, y = (v[fit].reshape(-1, v.shape[-1]).double().numpy() for v in (condition, target))
    xc, yc = (v[check].reshape(-1, v.shape[-1]).double().numpy() for v in (condition, target))
    scale = np.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).mean()
    errors = [
        ((SklearnRidge(alpha=s * scale).fit(x, y).predict(xc) - yc) ** 2).sum() for s in baselines.RIDGE_STRENGTHS
    ]
    best = baselines.RIDGE_STRENGTHS[int(np.argmin(errors))] * scale * n / len(fit)
    assert baselines.fit_ridge(condition, target).strength == pytest.approx(best, rel=1e-3)


def test_ridge_keeps_its_hands_off_noise():
    g = torch.Generator().manual_seed(2)
    condition, target = torch.randn(40, 2, 30, generator=g), torch.randn(40, 2, 5, generator=g)
    ridge = baselines.fit_ridge(condition, target)
    # Nothing to learn: the prediction must stay close to the mean, not fit 30 coefficients to 80 rows.
    fresh = ridge(torch.randn(200, 2, 30, generator=g)) - ridge.y_mean
    assert float(fresh.square().mean()) <= 0.2


def test_ridge_subsamples_whole_pictures(monkeypatch):
    condition, target = linear_data(n=50)
    monkeypatch.setattr(baselines, "MAX_RIDGE_TOKENS", 40)
    ridge = baselines.fit_ridge(condition, target)
    assert metrics.token_cosine(ridge(condition), target) >= 0.9


def test_shuffled_condition_averages_over_wrong_pairs_only():
    g = torch.Generator().manual_seed(1)
    generated, target = torch.randn(6, 3, 4, generator=g), torch.randn(6, 3, 4, generator=g)
    value = baselines.shuffled_condition(generated, target, metrics.token_cosine, rounds=100)
    wrong = [
        metrics.token_cosine(generated[i : i + 1], target[j : j + 1]) for i, j in itertools.permutations(range(6), 2)
    ]
    assert abs(value - float(np.mean(wrong))) <= 1e-9
    # A perfect generator is not perfect any more under wrong conditions.
    assert baselines.shuffled_condition(target, target, metrics.token_cosine) <= 0.5


def test_bad_input_is_named():
    condition, target = linear_data()
    with pytest.raises(ValueError, match="at least 2 pictures"):
        baselines.shuffled_condition(target[:1], target[:1], metrics.token_cosine)
    with pytest.raises(ValueError, match="condition and target must be"):
        baselines.fit_ridge(condition[:3], target)
    with pytest.raises(ValueError, match="at least 4 training pictures"):
        baselines.fit_ridge(condition[:3], target[:3])
    with pytest.raises(ValueError, match="condition must have 9 channels, got 6"):
        baselines.fit_ridge(condition, target)(target)
