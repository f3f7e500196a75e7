"""Metrics between generated and true token embeddings.

All functions take ``[n, T, C]`` tensors of any floating dtype and device (n pictures, T tokens, C
channels) in raw feature space, compute in float64 (fp32 sums over millions of values lose the third
digit), and return a Python float. They are written with torch alone, so an evaluation needs neither
scipy nor scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A row of a triangular factor that is shorter than this part of the whole says nothing.
_ROUNDING = 32 * torch.finfo(torch.float64).eps
# Rows per block of a pairwise table: 1024 x 1024 float64 similarities are 8 MB.
_BLOCK = 1024


def _check_pair(generated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, after checking that they are two non-empty finite ``[n, T, C]`` tensors of
    one shape.
    """
    for name, value in (("generated", generated), ("target", target)):
        if value.ndim != 3:
            raise ValueError(f"{name} must have shape [n, tokens, channels], got {list(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {value.dtype}")
    if generated.shape != target.shape:
        raise ValueError(
            f"generated and target must have the same shape, got {list(generated.shape)} and {list(target.shape)}"
        )
    if generated.numel() == 0:
        raise ValueError(f"generated and target are empty (shape {list(generated.shape)})")
    return generated.double(), target.double()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last axis; a zero vector has cosine 0 with everything instead of NaN."""
    tiny = torch.finfo(torch.float64).tiny
    scale = (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(tiny)
    return (a * b).sum(-1) / scale


def token_cosine(generated: Tensor, target: Tensor) -> float:
    """Mean over all n*T tokens of the cosine between the generated token and the true token at its
    place.
    """
    generated, target = _check_pair(generated, target)
    return float(_cosine(generated, target).mean())


def centred_cosine(generated: Tensor, target: Tensor, mean: Tensor) -> float:
    """Token cosine after subtracting ``mean`` (``[C]`` or ``[T, C]``, of the training pictures)
    from both.

    Embeddings share a large common direction; without it, a constant prediction scores near 0
    instead of near 0.5, so this number speaks about the individual picture.
    """
    generated, target = _check_pair(generated, target)
    mean = _check_mean(mean, target)
    return float(_cosine(generated - mean, target - mean).mean())


def l2_distance(generated: Tensor, target: Tensor) -> float:
    """Mean over all n*T tokens of the Euclidean distance ``|generated - target|``, in feature
    units.
    """
    generated, target = _check_pair(generated, target)
    return float((generated - target).norm(dim=-1).mean())


def _check_mean(mean: Tensor, target: Tensor) -> Tensor:
    allowed = (target.shape[-1:], target.shape[-2:])
    if mean.shape not in allowed:
        raise ValueError(f"mean must have shape {list(allowed[0])} or {list(allowed[1])}, got {list(mean.shape)}")
    return mean.to(device=target.device, dtype=torch.float64)


def recall_at_k(generated: Tensor, target: Tensor, mean: Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[int, float]:
    """Retrieval: how often is a picture's own target among the k nearest targets of its generated
    embedding?

    Both sides are mean-pooled over the tokens, centred by ``mean`` (``[C]`` or ``[T, C]``) and
    compared by cosine with all n targets. Ties count with the probability that a random order of
    the tied targets would give, so a generator that ignores its condition scores exactly chance,
    ``min(k, n) / n``, and never more by luck of order.

    Returns:
        ``{k: recall}`` with recall in [0, 1].
    """
    generated, target = _check_pair(generated, target)
    mean = _check_mean(mean, target)
    if not ks or any(k < 1 for k in ks):
        raise ValueError(f"ks must hold positive integers, got {ks}")
    query = torch.nn.functional.normalize((generated - mean).mean(1), dim=-1)
    pool = torch.nn.functional.normalize((target - mean).mean(1), dim=-1)
    hits = dict.fromkeys(ks, 0.0)
    for start in range(0, len(query), _BLOCK):
        similarity = query[start : start + _BLOCK] @ pool.T
        own = similarity.diagonal(start)[:, None]
        # Duplicate pictures differ in the last bits after a matrix product: near-equal is equal.
        tied = (similarity - own).abs() <= 1e-12
        tied.diagonal(start).fill_(True)
        ahead = ((similarity > own) & ~tied).sum(1)
        for k in ks:
            hits[k] += float(((k - ahead).double() / tied.sum(1)).clamp(0, 1).sum())
    return {k: hit / len(query) for k, hit in hits.items()}


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[C]`` and covariance ``root' root`` of a set of vectors, float64; fitted once, compared with many."""

    mean: Tensor
    root: Tensor  # [r, C], r at most min(n, C)

    @classmethod
    def fit(cls, features: Tensor, name: str = "features") -> Gaussian:
        """Fit ``[n, ..., C]`` (all leading axes are samples), with the unbiased covariance."""
        if features.ndim < 2 or not features.is_floating_point():
            raise ValueError(
                f"{name} must be a floating [n, ..., C] tensor, got {list(features.shape)} of {features.dtype}"
            )
        rows = features.reshape(-1, features.shape[-1]).double()
        if len(rows) < 2:
            raise ValueError(f"{name} must hold at least 2 vectors for a covariance, got {len(rows)}")
        mean = rows.mean(0)
        # R of a QR decomposition has the same R'R and at most C rows. Of features that fill few dimensions (mapped back
        # from a PCA, say) most rows are rounding, with which the decomposition in `distance` takes ten times as long.
        root = torch.linalg.qr((rows - mean) / (len(rows) - 1) ** 0.5, mode="r").R
        lengths = root.norm(dim=1)
        return cls(mean, root[lengths > _ROUNDING * lengths.norm()])

    def distance(self, other: Gaussian) -> float:
        """Fréchet distance to another Gaussian, see `frechet_distance`."""
        if len(self.mean) != len(other.mean):
            raise ValueError(f"first and second have {len(self.mean)} and {len(other.mean)} channels")
        cross = torch.linalg.svdvals(self.root @ other.root.to(self.root.device).T).sum()
        offset = (self.mean - other.mean.to(self.mean.device)).square().sum()
        traces = float(self.root.square().sum()) + float(other.root.square().sum())
        # Rounding may leave -1e-15 where two sets are equal.
        return max(0.0, float(offset) + traces - 2 * float(cross))


def frechet_distance(first: Tensor | Gaussian, second: Tensor | Gaussian) -> float:
    """Fréchet distance between Gaussians fitted to two sets of vectors, in squared feature units.

        ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))``     (Heusel et al. 2017, arXiv:1706.08500)

    with unbiased covariances. With ``S1 = A'A`` and ``S2 = B'B`` the last trace is the nuclear norm of ``A B'``: no
    matrix square root is taken, so rank-deficient covariances (fewer vectors than channels) lose no accuracy.

    Args:
        first, second: ``[n, ..., C]`` and ``[m, ..., C]``, or fitted `Gaussian`s. The distance falls with the number of
            samples, so compare only numbers from equally large sets.
    """
    fits = [
        given if isinstance(given, Gaussian) else Gaussian.fit(given, name)
        for name, given in (("first", first), ("second", second))
    ]
    return fits[0].distance(fits[1])
