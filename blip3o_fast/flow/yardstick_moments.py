"""Means, covariances and the regression on the condition: what the yardstick needs to know about the data.

Everything is float64 and accumulated over chunks of samples, so that neither set is ever held twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 4_000_000
_BLOCKS = 4


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
    explained = weight.T @ moments.cross
    residual = moments.target - explained - explained.T + weight.T @ moments.condition @ weight

    judged, judged_residual, power = moments.target, residual, float(_power(target))
    if held_out is not None:
        judged, judged_residual = _residual_moments(*held_out, means, weight)
        power = float(_power(held_out[1]))
    return Fit(
        data_power=power,
        centred_power=float(judged.diagonal().mean()),
        unconditional=_along_eigenvectors(moments.target, judged),
        conditional=_along_eigenvectors(residual, judged_residual),
    )


@dataclass(frozen=True)
class _Moments:
    """Second moments about the fitted mean maps, averaged over samples and token positions."""

    condition: Tensor  # [E, E]
    cross: Tensor  # [E, C]
    target: Tensor  # [C, C]


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


def _power(tensor: Tensor) -> Tensor:
    """Mean square of an element, 0-d."""
    return torch.stack([chunk.square().sum() for (chunk,) in _chunks(tensor)]).sum() / tensor.numel()


def _centred_rows(condition: Tensor, target: Tensor, means: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """One row per token, mean maps taken away: ([rows, E], [rows, C]) chunk by chunk."""
    for c, x in _chunks(condition, target):
        yield (_per_token(c, x.shape[1]) - means[0]).flatten(0, 1), (x - means[1]).flatten(0, 1)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """total += rows.T @ rows, computing the blocks on and above the diagonal only: most of the work is here."""
    edges = [round(i * rows.shape[1] / _BLOCKS) for i in range(_BLOCKS + 1)]
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        product = rows[:, low:high].T @ rows[:, low:]
        total[low:high, low:] += product
        if i + 1 < _BLOCKS:
            total[high:, low:high] += product[:, high - low :].T


def _second_moments(condition: Tensor, target: Tensor, means: tuple[Tensor, Tensor]) -> _Moments:
    dims = condition.shape[2], target.shape[2]
    cc = torch.zeros(dims[0], dims[0], dtype=torch.float64, device=target.device)
    cx, xx = cc.new_zeros(dims), cc.new_zeros(dims[1], dims[1])
    for c, x in _centred_rows(condition, target, means):
        _add_gram(cc, c)
        _add_gram(xx, x)
        cx += c.T @ x
    rows = target.shape[0] * target.shape[1]
    return _Moments(cc / rows, cx / rows, xx / rows)


def _residual_moments(
    condition: Tensor, target: Tensor, means: tuple[Tensor, Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Second moments [C, C] of the centred target, and of what the regression leaves of it, on other data."""
    centred = torch.zeros(target.shape[2], target.shape[2], dtype=torch.float64, device=target.device)
    residual = torch.zeros_like(centred)
    for c, x in _centred_rows(condition, target, means):
        _add_gram(centred, x)
        _add_gram(residual, x - c @ weight)
    rows = target.shape[0] * target.shape[1]
    return centred / rows, residual / rows


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


def _along_eigenvectors(fitted: Tensor, judged: Tensor) -> LinearFit:
    eigenvalues, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    # Rounding may leave a covariance's zero eigenvalue a little below zero.
    eigenvalues = eigenvalues.clamp(min=0.0)
    if judged is fitted:
        return LinearFit(eigenvalues, eigenvalues)
    return LinearFit(eigenvalues, ((judged @ vectors) * vectors).sum(0).clamp(min=0.0))
