"""The yardstick's closed forms against least squares on drawn samples, integrals done by hand, and limits."""

import json
import math
import re

import pytest
import torch
from torch import Tensor

from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.yardstick import LINES, yardstick

PATHS = [FlowPath(), FlowPath(sigma_min=0.05), FlowPath("cosine")]


def dataset(samples: int = 300, tokens: int = 2, width: int = 3, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Correlated embeddings with a mean map, half explained by the condition."""
    condition = torch.randn(samples, tokens, width).double() @ torch.randn(width, width).double()
    condition += torch.randn(tokens, width).double()
    mixing = torch.randn(width, channels).double(), torch.randn(channels, channels).double()
    target = condition @ mixing[0] * 0.5 + torch.randn(samples, tokens, channels).double() @ mixing[1] * 0.5
    return condition, target + torch.randn(tokens, channels).double()


def ideal_noise(target: Tensor, *known: Tensor) -> Tensor:
    """Noise whose sample moments are exactly those of the theory: at every position of mean zero, over all tokens
    uncorrelated with everything in `known`, of unit covariance. Needs no limit of many samples."""
    samples, tokens, channels = target.shape
    position = torch.eye(tokens, dtype=torch.float64).repeat(samples, 1)
    known_rows = torch.cat([position, *(k.reshape(samples * tokens, -1) for k in known)], 1)
    noise = torch.randn(samples * tokens, channels).double()
    noise -= known_rows @ torch.linalg.lstsq(known_rows, noise).solution
    covariance = noise.T @ noise / len(noise)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    return noise.reshape(samples, tokens, channels)


def features(x_t: Tensor, condition: Tensor | None) -> Tensor:
    """The written linear class: the noisy token, the condition's token, one intercept per position."""
    samples, tokens, _ = x_t.shape
    columns = [x_t.flatten(0, 1), torch.eye(tokens, dtype=torch.float64).repeat(samples, 1)]
    if condition is not None:
        columns.append(condition.flatten(0, 1))
    return torch.cat(columns, 1)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_linear_lines_are_least_squares(path, prediction_type, conditional):
    condition, target = dataset()
    noise = ideal_noise(target, condition, target)
    edges = (0.1, 0.1 + 1e-9, 0.5, 0.5 + 1e-9, 0.9, 0.9 + 1e-9)  # every second bucket is one noise level
    ours = yardstick(condition, target, path=path, prediction_type=prediction_type, sigma_edges=edges, ridge=0.0)
    line = ours.linear_conditional if conditional else ours.linear_unconditional
    for bucket, level in zip((0, 2, 4), (0.1, 0.5, 0.9), strict=True):
        sigma = torch.full((len(target),), level, dtype=torch.float64)
        x_t = path.interpolate(target, noise, sigma)
        wanted = noise if prediction_type == "epsilon" else path.velocity(target, noise, sigma)
        design = features(x_t, condition if conditional else None)
        residual = wanted.flatten(0, 1) - design @ torch.linalg.lstsq(design, wanted.flatten(0, 1)).solution
        assert line.per_bucket[bucket] == pytest.approx(float(residual.square().mean()), rel=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_zero_and_mean_lines(path):
    condition, target = dataset()
    noise = ideal_noise(target, condition, target)
    ours = yardstick(condition, target, path=path, sigma_edges=(0.3, 0.3 + 1e-9))
    v = path.velocity(target, noise, torch.full((len(target),), 0.3, dtype=torch.float64))
    assert ours.zero.per_bucket[0] == pytest.approx(float(v.square().mean()), rel=1e-6)
    assert ours.mean.per_bucket[0] == pytest.approx(float((v - v.mean(0)).square().mean()), rel=1e-6)


@pytest.mark.parametrize("conditional", [False, True])
def test_held_out_lines_judge_the_fit_made_elsewhere(conditional):
    condition, target = dataset(640)
    (fit_c, judged_c), (fit_x, judged_x) = condition.split(320), target.split(320)
    ours = yardstick(fit_c, fit_x, held_out=(judged_c, judged_x), sigma_edges=(0.4, 0.4 + 1e-9), ridge=0.0)
    sigma, path = torch.full((320,), 0.4, dtype=torch.float64), FlowPath()
    fit_noise = ideal_noise(fit_x, fit_c, fit_x)
    design = features(path.interpolate(fit_x, fit_noise, sigma), fit_c if conditional else None)
    weights = torch.linalg.lstsq(design, path.velocity(fit_x, fit_noise, sigma).flatten(0, 1)).solution
    noise = ideal_noise(judged_x, judged_c, judged_x)
    design = features(path.interpolate(judged_x, noise, sigma), judged_c if conditional else None)
    error = path.velocity(judged_x, noise, sigma).flatten(0, 1) - design @ weights
    line = ours.linear_conditional if conditional else ours.linear_unconditional
    assert line.per_bucket[0] == pytest.approx(float(error.square().mean()), rel=1e-6)
    assert (ours.num_samples, ours.held_out_samples) == (320, 320)


def test_ridge_keeps_few_samples_sane():
    """With more channels in the condition than samples, plain least squares explains everything it was fitted to."""
    condition, target = torch.randn(12, 2, 60), torch.randn(12, 2, 4)
    judged = torch.randn(200, 2, 60), torch.randn(200, 2, 4)
    plain, ridged = (yardstick(condition, target, held_out=judged, ridge=ridge) for ridge in (0.0, 3.0))
    fitted = yardstick(condition, target, ridge=0.0)
    assert fitted.linear_conditional.overall < 0.05 < 1.4 < fitted.linear_unconditional.overall
    assert ridged.linear_conditional.overall < plain.linear_conditional.overall
    # sklearn's ridge has the penalty alpha on the sum over rows; ours is a fraction of the mean variance
    from sklearn.linear_model import Ridge

    centred_c = (condition - condition.mean(0)).flatten(0, 1).double()
    centred_x = (target - target.mean(0)).flatten(0, 1).double()
    alpha = 3.0 * float(centred_c.square().mean()) * len(centred_c)
    model = Ridge(alpha=alpha, fit_intercept=False).fit(centred_c.numpy(), centred_x.numpy())
    judged_c = (judged[0] - condition.mean(0)).flatten(0, 1).double()
    residual = (judged[1] - target.mean(0)).flatten(0, 1).double() - torch.from_numpy(model.predict(judged_c.numpy()))
    # at sigma = 1 the noisy token holds no data: the loss is the regression's own error
    at_one = yardstick(condition, target, held_out=judged, ridge=3.0, sigma_edges=(1 - 1e-9, 1.0))
    assert at_one.linear_conditional.per_bucket[0] == pytest.approx(float(residual.square().mean()), rel=1e-5)


def test_white_data_is_an_integral():
    """Unit covariance on the straight line: the loss is 1 / ((1 - s)^2 + s^2), its integral over [0, 1] is pi / 2."""
    target = ideal_noise(torch.zeros(100, 2, 3))
    ours = yardstick(torch.randn(100, 2, 5), target, sigma_edges=2)
    assert ours.linear_unconditional.overall == pytest.approx(math.pi / 2, rel=1e-5)
    assert ours.linear_unconditional.per_bucket == pytest.approx((math.pi / 2, math.pi / 2), rel=1e-4)
    assert ours.zero.overall == pytest.approx(2.0) and ours.mean.overall == pytest.approx(2.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"distribution": "logit_normal", "logit_mean": 0.4, "logit_std": 0.8},
        {"distribution": "shifted", "shift": 3.0},
    ],
    ids=str,
)
def test_the_overall_loss_follows_the_distribution_of_sigma(settings):
    from blip3o_fast.flow.timesteps import draw_sigma

    target = 2 * ideal_noise(torch.zeros(100, 2, 3))
    ours = yardstick(torch.randn(100, 2, 5), target, **settings)
    sigma = draw_sigma(1, torch.arange(200_000), **settings).double()
    drawn = 4 / (4 * (1 - sigma) ** 2 + sigma**2)
    error = float(drawn.std()) / len(sigma) ** 0.5
    assert abs(ours.linear_unconditional.overall - float(drawn.mean())) <= 4.5 * error


def test_limits():
    """Useless condition: both linear lines agree. Decisive condition: nothing is left. No variance: nothing to say."""
    target = torch.randn(400, 2, 3)
    constant = yardstick(torch.ones(400, 2, 5), target)
    assert constant.linear_conditional.overall == pytest.approx(constant.linear_unconditional.overall, rel=1e-9)
    decisive = yardstick(target @ torch.randn(3, 3), target, ridge=1e-12)
    assert decisive.linear_conditional.overall < 1e-6
    still = yardstick(torch.randn(400, 2, 5), torch.full((400, 2, 3), 2.0))
    assert still.zero.overall == pytest.approx(5.0) and still.mean.overall == pytest.approx(1.0)
    assert still.linear_unconditional.overall == pytest.approx(0.0, abs=1e-9)


def test_lines_are_nested():
    condition, target = dataset()
    for prediction_type in ("v_prediction", "epsilon"):
        ours = yardstick(condition, target, prediction_type=prediction_type)
        lines = [getattr(ours, name) for name in LINES]
        for upper, lower in zip(lines[:-1], lines[1:], strict=True):
            assert lower.overall <= upper.overall * (1 + 1e-12)
            assert all(b <= a * (1 + 1e-12) for a, b in zip(upper.per_bucket, lower.per_bucket, strict=True))


def test_other_token_counts_see_the_mean_condition():
    condition, target = torch.randn(200, 7, 3), torch.randn(200, 2, 4)
    ours = yardstick(condition, target)
    pooled = yardstick(condition.mean(1, keepdim=True).expand(-1, 2, -1), target)
    assert ours.linear_conditional.overall == pytest.approx(pooled.linear_conditional.overall, rel=1e-9)


def test_chunks_and_dtypes_do_not_matter(monkeypatch):
    from blip3o_fast.flow import yardstick_moments

    condition, target = (t.float() for t in dataset())
    whole = yardstick(condition, target)
    monkeypatch.setattr(yardstick_moments, "_CHUNK_ELEMENTS", 50)
    pieces = yardstick(condition, target)
    for name in LINES:
        assert getattr(pieces, name).overall == pytest.approx(getattr(whole, name).overall, rel=1e-10)
    half = yardstick(condition.bfloat16(), target.bfloat16())
    assert half.mean.overall == pytest.approx(whole.mean.overall, rel=1e-2)


def test_max_samples_takes_evenly_spaced_ones():
    condition, target = dataset(100)
    chosen = torch.tensor([0, 33, 66, 99])
    thinned, few = yardstick(condition, target, max_samples=4), yardstick(condition[chosen], target[chosen])
    assert thinned == few and thinned.num_samples == 4


def test_the_sentence_and_the_json():
    condition, target = dataset()
    ours = yardstick(condition, target)
    words = (
        (ours.zero.overall * 1.1, "no better than predicting zero"),
        (math.nan, "no better than predicting zero"),
        ((ours.zero.overall + ours.mean.overall) / 2, "no better than predicting the mean"),
        ((ours.mean.overall + ours.linear_unconditional.overall) / 2, "better than the mean"),
        ((ours.linear_unconditional.overall + ours.linear_conditional.overall) / 2, "better than linear without"),
        (ours.linear_conditional.overall / 2, "is 0.50 times the best linear predictor's"),
    )
    for loss, text in words:
        assert text in ours.verdict(loss)
    assert ours.loss_over_linear(ours.linear_conditional.overall) == 1.0
    read = json.loads(json.dumps(ours.as_dict()))
    assert read["mean"]["overall"] == ours.mean.overall and len(read["zero"]["per_bucket"]) == 10
    assert read["sigma_edges"][0] == 0.0 and read["sigma_edges"][-1] == 1.0


C, X = torch.zeros(3, 2, 5), torch.zeros(3, 2, 4)
BAD = [
    ({"condition": C[0]}, "condition must be a floating tensor of shape (n, L, E), got (2, 5)"),
    ({"target": X.long()}, "target must be a floating tensor of shape (n, T, C), got torch.int64 (3, 2, 4)"),
    ({"target": [1]}, "target must be a floating tensor of shape (n, T, C), got list"),
    ({"condition": C[:2]}, "condition and target must have the same number of samples, at least 1, got (2, 2, 5)"),
    ({"condition": C[:0], "target": X[:0]}, "condition and target must have the same number of samples, at least 1"),
    ({"held_out": (C, X[:1])}, "held_out condition and target must have the same number of samples"),
    ({"held_out": (C, X[..., :3])}, "held_out target must have shape (n, 2, 4), got (3, 2, 3)"),
    ({"prediction_type": "x0"}, "prediction_type must be one of v_prediction, epsilon, got 'x0'"),
    ({"sigma_edges": 0}, "sigma_edges must be at least 1 bucket, got 0"),
    ({"sigma_edges": (0.5, 0.2)}, "sigma_edges must be at least two rising numbers in [0, 1], got (0.5, 0.2)"),
    ({"sigma_edges": (0.0, 1.5)}, "sigma_edges must be at least two rising numbers in [0, 1], got (0.0, 1.5)"),
    ({"ridge": -1.0}, "ridge must be a finite number >= 0, got -1.0"),
    ({"max_samples": 0}, "max_samples must be at least 1 or None, got 0"),
    ({"distribution": "beta"}, "distribution must be one of uniform, logit_normal, shifted, got 'beta'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = {"condition": C, "target": X} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        yardstick(call.pop("condition"), call.pop("target"), **call)
