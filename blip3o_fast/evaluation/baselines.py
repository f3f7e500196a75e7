"""What a model must beat: the mean embedding, a wrong condition, and the best linear map.

Baselines are fitted on the training split only and predict the held-out pictures, like the model.
Shapes: condition ``[n, T, E]``, target ``[n, T, C]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Candidate ridge strengths in units of the mean eigenvalue of the condition's covariance: free of
# the feature scale.
RIDGE_STRENGTHS = tuple(10.0 ** (e / 2) for e in range(-10, 5))
# Enough for a 4096-wide condition (50 rows per unknown); a larger training split is subsampled
# evenly.
MAX_RIDGE_TOKENS = 200_000


def mean_embedding(target: Tensor) -> Tensor:
    """``[T, C]`` float32: the mean training target at each token position, the best constant
    prediction.
    """
    if target.ndim != 3 or len(target) == 0:
        raise ValueError(f"target must be a non-empty [n, T, C] tensor, got shape {list(target.shape)}")
    return target.double().mean(0).float()


def shuffled_condition(
    generated: Tensor,
    target: Tensor,
    metric: Callable[[Tensor, Tensor], float],
    *,
    rounds: int = 8,
    seed: int = 0,
) -> float:
    """``metric`` when each picture is judged against what was generated for *another* picture's
    condition.

    Generating from permuted conditions and comparing with the targets in order is the same as
    permuting what was generated, so no second sampling run is needed. Averaged over ``rounds``
    permutations without fixed points.
    """
    n = len(generated)
    if n < 2:
        raise ValueError(f"a shuffled condition needs at least 2 pictures, got {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(generated.device)
    # Cyclic shifts of one random order: never a picture with itself, and no pair counted twice.
    shifts = range(1, min(rounds, n - 1) + 1)
    values = [metric(generated[order.roll(shift)], target[order]) for shift in shifts]
    return sum(values) / len(values)


@dataclass(frozen=True)
class Ridge:
    """A linear map from a condition token to a target token: ``(x - x_mean) @ weight + y_mean``,
    float32.
    """

    weight: Tensor  # [E, C]
    x_mean: Tensor  # [E]
    y_mean: Tensor  # [C]
    strength: float  # lambda: |Y - XW|^2 + lambda |W|^2, X and Y centred

    def __call__(self, condition: Tensor) -> Tensor:
        """``[n, T, E]`` to ``[n, T, C]``, float32."""
        if condition.shape[-1] != len(self.x_mean):
            raise ValueError(f"condition must have {len(self.x_mean)} channels, got {condition.shape[-1]}")
        return (condition.float() - self.x_mean) @ self.weight + self.y_mean


def fit_ridge(condition: Tensor, target: Tensor, *, holdout: float = 0.2, seed: int = 0) -> Ridge:
    """Ridge regression per token (all positions share one map), in closed form.

    Lambda is the one with the least squared error on a ``holdout`` part of the *training* pictures
    (whole pictures: tokens of one picture resemble each other); then the map is fitted again on all
    of them. Products run in fp32 blocks and add up in float64.
    """
    if condition.ndim != 3 or target.ndim != 3 or condition.shape[:2] != target.shape[:2]:
        raise ValueError(
            f"condition and target must be [n, T, E] and [n, T, C], got {list(condition.shape)}, {list(target.shape)}"
        )
    n, tokens = condition.shape[:2]
    if n < 4:
        raise ValueError(f"ridge regression needs at least 4 training pictures, got {n}")
    keep = max(4, min(n, MAX_RIDGE_TOKENS // tokens))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:keep].to(condition.device)
    held = max(1, int(keep * holdout))
    shifts = condition[order[:64]].float().mean((0, 1)), target[order[:64]].float().mean((0, 1))
    fitting = _moments(condition, target, order[held:], shifts)
    checking = _moments(condition, target, order[:held], shifts)
    total = fitting + checking
    # The whole split has more rows than the part on which lambda was chosen: keep lambda per row.
    strength = _best_strength(fitting, checking) * total.count / fitting.count
    mean_x, mean_y = total.means()
    gram, cross = total.about(mean_x, mean_y)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + strength * eye, cross)
    return Ridge(weight.float(), (mean_x + shifts[0]).float(), (mean_y + shifts[1]).float(), strength)


@dataclass
class _Moments:
    """Raw second moments of rows (x - shift, y - shift) in float64: those of two parts add up.

    The shifts are close to the means: without them the fp32 products would lose the digits that a
    common offset of the features takes.
    """

    shift_x: Tensor
    shift_y: Tensor
    count: int
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    xy: Tensor

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.shift_x,
            self.shift_y,
            self.count + other.count,
            self.sum_x + other.sum_x,
            self.sum_y + other.sum_y,
            self.xx + other.xx,
            self.xy + other.xy,
        )

    def about(self, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor]:
        """``X'X`` and ``X'Y`` of the rows minus the given (shifted) means."""
        outer, sum_x, sum_y, count = torch.outer, self.sum_x, self.sum_y, self.count
        xx = outer(sum_x, mean_x) + outer(mean_x, sum_x) - count * outer(mean_x, mean_x)
        xy = outer(sum_x, mean_y) + outer(mean_x, sum_y) - count * outer(mean_x, mean_y)
        return self.xx - xx, self.xy - xy

    def means(self) -> tuple[Tensor, Tensor]:
        return self.sum_x / self.count, self.sum_y / self.count


def _moments(condition: Tensor, target: Tensor, pictures: Tensor, shifts: tuple[Tensor, Tensor]) -> _Moments:
    e, c = condition.shape[-1], target.shape[-1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=condition.device)

    out = _Moments(*shifts, 0, zeros(e), zeros(c), zeros(e, e), zeros(e, c))
    for chunk in pictures.split(64):
        x = condition[chunk].reshape(-1, e).float() - shifts[0]
        y = target[chunk].reshape(-1, c).float() - shifts[1]
        out.count += len(x)
        out.sum_x += x.sum(0, dtype=torch.float64)
        out.sum_y += y.sum(0, dtype=torch.float64)
        out.xx += (x.T @ x).double()
        out.xy += (x.T @ y).double()
    return out


def _best_strength(fitting: _Moments, checking: _Moments) -> float:
    """The candidate lambda with the least squared error on the checking rows, from moments."""
    means = fitting.means()
    gram, cross = fitting.about(*means)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    projected = vectors.T @ cross
    # About the *fitting* means: a map fitted there is judged with its own intercept.
    xx, xy = checking.about(*means)
    xx, xy = vectors.T @ xx @ vectors, vectors.T @ xy
    scale = float(values.mean()) or 1.0
    best, best_error = RIDGE_STRENGTHS[-1] * scale, float("inf")
    for candidate in RIDGE_STRENGTHS:
        weight = projected / (values + candidate * scale)[:, None]
        # sum |y - xW|^2 without its constant part sum |y|^2.
        error = float((weight * (xx @ weight)).sum() - 2 * (weight * xy).sum())
        if error < best_error:
            best, best_error = candidate * scale, error
    return best
