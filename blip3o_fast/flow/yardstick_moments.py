"""Means, covariances and the regression on the condition: what the yardstick needs to know about the data.

Everything is float64 and accumulated over chunks of samples, so that neither set is ever held twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class LinearFit:
    """Residual covariance along its own eigenvectors.

    eigenvalues: [C], of the residual's covariance on the fitted data.
    judged_moments: [C], second moments of the residual along the same vectors, on the data that is judged.
    """

    eigenvalues: Tensor
    judged_moments: Tensor


@dataclass(frozen=True)
class Fit:
    """All that the four lines depend on.

    data_power: mean square of an element of the judged data; centred_power: the same after subtracting the fitted
    mean map [T, C].
    """

    data_power: float
    centred_power: float
    unconditional: LinearFit
    conditional: LinearFit


def fit_linear(
    condition: Tensor, target: Tensor, *, ridge: float, held_out: tuple[Tensor, Tensor] | None = None
) -> Fit:
    """Fit mean map, covariance and ridge regression on (condition [n, L, E], target [n, T, C])."""
    tokens = target.shape[1]
    means = _mean_map(condition, tokens), _mean_map(target, tokens)
    moments = _second_moments(condition, target, means)
    weight = _ridge_regression(moments, ridge)  # [E, C]

    judged = moments if held_out is None else _second_moments(*held_out, means)
    residual, judged_residual = (_residual_covariance(m, weight) for m in (moments, judged))
    return Fit(
        data_power=judged.data_power,
        centred_power=float(judged.target.diagonal().mean()),
        unconditional=_along_eigenvectors(moments.target, judged.target),
        conditional=_along_eigenvectors(residual, judged_residual),
    )


@dataclass(frozen=True)
class _Moments:
    """Second moments about the fitted mean maps, averaged over samples and token positions."""

    condition: Tensor  # [E, E]
    cross: Tensor  # [E, C]
    target: Tensor  # [C, C]
    data_power: float


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices over samples, in float64, of bounded size."""
    per_sample = max(t.shape[1] * t.shape[2] for t in tensors)
    step = max(1, _CHUNK_ELEMENTS // per_sample)
    for start in range(0, tensors[0].shape[0], step):
        yield tuple(t[start : start + step].detach().double() for t in tensors)


def _per_token(condition: Tensor, tokens: int) -> Tensor:
    """The condition's token beside each target token; its mean over tokens where the counts differ."""
    if condition.shape[1] == tokens:
        return condition
    return condition.mean(1, keepdim=True).expand(-1, tokens, -1)


def _mean_map(tensor: Tensor, tokens: int) -> Tensor:
    """Mean over samples, [T, channels]."""
    total = torch.zeros(tokens, tensor.shape[2], dtype=torch.float64, device=tensor.device)
    for (chunk,) in _chunks(tensor):
        total += _per_token(chunk, tokens).sum(0)
    return total / tensor.shape[0]


def _second_moments(condition: Tensor, target: Tensor, means: tuple[Tensor, Tensor]) -> _Moments:
    tokens = target.shape[1]
    condition_mean, target_mean = means
    dims = condition.shape[2], target.shape[2]
    cc = torch.zeros(dims[0], dims[0], dtype=torch.float64, device=target.device)
    cx, xx = cc.new_zeros(dims), cc.new_zeros(dims[1], dims[1])
    power = cc.new_zeros(())
    for condition_chunk, target_chunk in _chunks(condition, target):
        power += target_chunk.square().sum()
        c = (_per_token(condition_chunk, tokens) - condition_mean).reshape(-1, dims[0])
        x = (target_chunk - target_mean).reshape(-1, dims[1])
        cc += c.T @ c
        cx += c.T @ x
        xx += x.T @ x
    rows = target.shape[0] * tokens
    return _Moments(cc / rows, cx / rows, xx / rows, float(power) / target.numel())


def _ridge_regression(moments: _Moments, ridge: float) -> Tensor:
    """Coefficients [E, C] of the target's token on the condition's."""
    covariance = moments.condition
    penalty = ridge * float(covariance.diagonal().mean())
    if penalty > 0:
        regularised = covariance + penalty * torch.eye(
            covariance.shape[0], dtype=covariance.dtype, device=covariance.device
        )
        factor, info = torch.linalg.cholesky_ex(regularised)
        if int(info) == 0:
            return torch.cholesky_solve(moments.cross, factor)
    # Without a penalty the covariance may be singular: the least-squares solution of smallest norm.
    return torch.linalg.pinv(covariance, hermitian=True, rtol=1e-12) @ moments.cross


def _residual_covariance(moments: _Moments, weight: Tensor) -> Tensor:
    """Second moment of `target - weight.T @ condition`, [C, C]. weight need not be optimal for these moments."""
    explained = weight.T @ moments.cross
    return moments.target - explained - explained.T + weight.T @ moments.condition @ weight


def _along_eigenvectors(fitted: Tensor, judged: Tensor) -> LinearFit:
    eigenvalues, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    # Rounding may leave a covariance's zero eigenvalue a little below zero.
    eigenvalues = eigenvalues.clamp(min=0.0)
    if judged is fitted:
        return LinearFit(eigenvalues, eigenvalues)
    return LinearFit(eigenvalues, ((judged @ vectors) * vectors).sum(0).clamp(min=0.0))
