"""Is my loss normal? Three predictors that need no training, and the loss each of them has on your data.

A flow-matching loss has no absolute scale: it depends on the variance and the correlations of the embeddings. These
lines give it one:

- `zero`: the network says nothing;
- `mean`: it says the mean velocity, the data's mean map [T, C] and no noise;
- `linear_unconditional`: the best linear function of the noisy token;
- `linear_conditional`: the best linear function of the noisy token and of the condition's token.

A network that has learnt something is below `mean`; one that uses its condition is below `linear_unconditional`; one
that does more than linear regression is below `linear_conditional`.

**Which linear functions.** Per token, channels as features, coefficients shared by all tokens, one intercept per token
position, all of them free to change with sigma: `A(sigma) x_t[t] + B(sigma) c[t] + b(sigma)[t]` with A [C, C] and
B [C, E]. Where the condition has not as many tokens as the target, its mean over tokens stands in for c[t]. Nothing
looks at neighbouring tokens.

**Closed form.** Let r be what remains of the data when its mean map (and, with a condition, its regression on the
condition) is taken away, S its covariance with eigenvalues l_i, and the network's target p*data + q*noise (for a
velocity p = alpha', q = s'). The noise is independent of data and condition, so the best predictor works on r alone and
its error per channel is the mean over i of

    l_i (p s - alpha q)^2 / (alpha^2 l_i + s^2).

On the linear path with a velocity the numerator is l_i: 1 near sigma = 0, l_i at sigma = 1. On held-out data the same
predictor, fitted elsewhere, meets other second moments h_i along its eigenvectors: with its gain
a_i = (p alpha l_i + q s) / (alpha^2 l_i + s^2) the error is `(p - a_i alpha)^2 h_i + (q - a_i s)^2`.
Source: linear minimum-mean-square-error estimation, for instance Kay, "Fundamentals of Statistical Signal Processing:
Estimation Theory", chapter 12; derived here for the flow-matching target.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.timesteps import check_distribution, sigma_quantile
from blip3o_fast.flow.yardstick_moments import LinearFit, fit_linear
from blip3o_fast.ops._flow_schedule import check_prediction_type, target_coefficients

LINES = ("zero", "mean", "linear_unconditional", "linear_conditional")
_OVERALL_NODES = 1024
_BUCKET_NODES = 64


@dataclass(frozen=True)
class Line:
    """Loss of one predictor: over the training distribution of sigma, and in each bucket (sigma uniform inside)."""

    overall: float
    per_bucket: tuple[float, ...]


@dataclass(frozen=True)
class Yardstick:
    """The four lines, with what they were computed from. Losses are means over elements, like the training loss."""

    zero: Line
    mean: Line
    linear_unconditional: Line
    linear_conditional: Line
    sigma_edges: tuple[float, ...]
    num_samples: int
    held_out_samples: int
    ridge: float

    def loss_over_linear(self, loss: float) -> float:
        """A loss as a multiple of the best conditional linear predictor's: below 1 is better than linear."""
        return loss / self.linear_conditional.overall

    def verdict(self, loss: float) -> str:
        """One sentence that places a loss among the lines."""
        if not loss < self.zero.overall:
            return f"{loss:.4g} is no better than predicting zero ({self.zero.overall:.4g}): nothing is learnt yet"
        if not loss < self.mean.overall:
            return f"{loss:.4g} is no better than predicting the mean ({self.mean.overall:.4g})"
        if not loss < self.linear_unconditional.overall:
            return (
                f"{loss:.4g} is better than the mean ({self.mean.overall:.4g}), not yet than the best linear "
                f"function of the noisy token ({self.linear_unconditional.overall:.4g})"
            )
        if not loss < self.linear_conditional.overall:
            return (
                f"{loss:.4g} is better than linear without the condition ({self.linear_unconditional.overall:.4g}), "
                f"not yet than linear with it ({self.linear_conditional.overall:.4g})"
            )
        return (
            f"{loss:.4g} is {self.loss_over_linear(loss):.2f} times the best linear predictor's "
            f"({self.linear_conditional.overall:.4g}): normal for a network that works"
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON: each line's overall loss and buckets, and the settings."""
        lines = {
            name: {"overall": line.overall, "per_bucket": list(line.per_bucket)}
            for name, line in ((name, getattr(self, name)) for name in LINES)
        }
        return {
            **lines,
            "sigma_edges": list(self.sigma_edges),
            "num_samples": self.num_samples,
            "held_out_samples": self.held_out_samples,
            "ridge": self.ridge,
        }


def yardstick(
    condition: Tensor,
    target: Tensor,
    *,
    path: FlowPath | None = None,
    prediction_type: str = "v_prediction",
    held_out: tuple[Tensor, Tensor] | None = None,
    sigma_edges: tuple[float, ...] | int = 10,
    ridge: float = 1e-4,
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
    max_samples: int | None = 4096,
) -> Yardstick:
    """The losses of predicting zero, the mean, and the best linear function, on this data.

    condition: [n, L, E], target: [n, T, C], floating, as the network sees them (normalised), any device.
    path, prediction_type: those of the training; None is the linear path.
    held_out: another (condition, target) on which the predictors fitted here are judged; None judges them on the data
        they were fitted to, which flatters the linear ones when n * T is not much larger than C + E.
    sigma_edges: rising bucket edges in [0, 1], or the number of equal buckets.
    ridge: added to the condition's covariance as a fraction of its mean variance; keeps the regression on the condition
        sane with few samples. 0 is plain least squares.
    distribution, logit_mean, logit_std, shift: of sigma in training, see `flow.timesteps.sigma_quantile`.
    max_samples: evenly spaced samples are taken where there are more (of both sets), None takes all.

    Computed in float64, in chunks. Condition dropout is not modelled: compare with an evaluation loss.
    Raises ValueError naming the argument, what was given and what is allowed.
    """
    path = FlowPath() if path is None else path
    check_prediction_type(prediction_type)
    check_distribution(distribution, logit_mean, logit_std, shift)
    edges = _edges(sigma_edges)
    if not 0.0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1 or None, got {max_samples}")
    _check_pair("", condition, target)
    condition, target = _thin(condition, target, max_samples)
    judged = None
    if held_out is not None:
        _check_pair("held_out ", *held_out)
        for name, given, fitted in zip(("condition", "target"), held_out, (condition, target), strict=True):
            if given.shape[1:] != fitted.shape[1:]:
                raise ValueError(
                    f"held_out {name} must have shape (n, {fitted.shape[1]}, {fitted.shape[2]}), "
                    f"got {tuple(given.shape)}"
                )
        judged = _thin(*held_out, max_samples)
    fit = fit_linear(condition, target, ridge=ridge, held_out=judged)

    u = (torch.arange(_OVERALL_NODES, dtype=torch.float64) + 0.5) / _OVERALL_NODES
    overall_nodes = sigma_quantile(
        u, distribution=distribution, logit_mean=logit_mean, logit_std=logit_std, shift=shift
    )
    inner = (torch.arange(_BUCKET_NODES, dtype=torch.float64) + 0.5) / _BUCKET_NODES
    bucket_nodes = [low + (high - low) * inner for low, high in zip(edges[:-1], edges[1:], strict=True)]

    def line(loss_at: Callable[[Coefficients], Tensor]) -> Line:
        def mean_over(sigma: Tensor) -> float:
            return float(loss_at(_coefficients(sigma, path, prediction_type)).mean())

        return Line(mean_over(overall_nodes), tuple(mean_over(nodes) for nodes in bucket_nodes))

    return Yardstick(
        zero=line(lambda k: k.p**2 * fit.data_power + k.q**2),
        mean=line(lambda k: k.p**2 * fit.centred_power + k.q**2),
        linear_unconditional=line(lambda k: _linear_loss(k, fit.unconditional)),
        linear_conditional=line(lambda k: _linear_loss(k, fit.conditional)),
        sigma_edges=edges,
        num_samples=target.shape[0],
        held_out_samples=0 if judged is None else judged[1].shape[0],
        ridge=ridge,
    )


@dataclass(frozen=True)
class Coefficients:
    """Of x_t = alpha*data + s*noise and of the network's target p*data + q*noise; each [sigmas], float64."""

    alpha: Tensor
    s: Tensor
    p: Tensor
    q: Tensor


def _coefficients(sigma: Tensor, path: FlowPath, prediction_type: str) -> Coefficients:
    p, q = target_coefficients(sigma, prediction_type, path.schedule, path.sigma_min, path.sigma_max)
    return Coefficients(path.alpha(sigma), path.noise_scale(sigma), p, q)


def _linear_loss(k: Coefficients, fit: LinearFit) -> Tensor:
    """Loss of the best linear predictor at each sigma, [sigmas]."""
    alpha, s, p, q = (value[:, None] for value in (k.alpha, k.s, k.p, k.q))
    eigenvalues, moments = fit.eigenvalues[None], fit.judged_moments[None]
    power = alpha**2 * eigenvalues + s**2
    # No noise and no variance along this direction: x_t is constant there, so it gets no gain.
    gain = torch.where(power > 0, (p * alpha * eigenvalues + q * s) / power.clamp(min=1e-300), 0.0)
    return ((p - gain * alpha) ** 2 * moments + (q - gain * s) ** 2).mean(1)


def _edges(sigma_edges: tuple[float, ...] | int) -> tuple[float, ...]:
    if isinstance(sigma_edges, int):
        if sigma_edges < 1:
            raise ValueError(f"sigma_edges must be at least 1 bucket, got {sigma_edges}")
        return tuple(i / sigma_edges for i in range(sigma_edges + 1))
    edges = tuple(float(edge) for edge in sigma_edges)
    rising = all(low < high for low, high in zip(edges[:-1], edges[1:], strict=True))
    if len(edges) < 2 or not rising or not (0.0 <= edges[0] and edges[-1] <= 1.0):
        raise ValueError(f"sigma_edges must be at least two rising numbers in [0, 1], got {sigma_edges}")
    return edges


def _check_pair(prefix: str, condition: Tensor, target: Tensor) -> None:
    for name, tensor, axes in (("condition", condition, "n, L, E"), ("target", target, "n, T, C")):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or not tensor.is_floating_point():
            given: object = type(tensor).__name__
            if isinstance(tensor, Tensor):
                kind = "" if tensor.is_floating_point() else f"{tensor.dtype} "
                given = f"{kind}{tuple(tensor.shape)}"
            raise ValueError(f"{prefix}{name} must be a floating tensor of shape ({axes}), got {given}")
    if condition.shape[0] != target.shape[0] or target.numel() == 0 or condition.numel() == 0:
        raise ValueError(
            f"{prefix}condition and target must have the same number of samples, at least 1, "
            f"got {tuple(condition.shape)} and {tuple(target.shape)}"
        )


def _thin(condition: Tensor, target: Tensor, max_samples: int | None) -> tuple[Tensor, Tensor]:
    count = target.shape[0]
    if max_samples is None or count <= max_samples:
        return condition, target
    chosen = torch.linspace(0, count - 1, max_samples, dtype=torch.float64).round().long()
    return condition[chosen.to(condition.device)], target[chosen.to(target.device)]
