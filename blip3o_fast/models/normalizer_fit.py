"""How the statistics of ``normalizer.py`` are estimated: sums in fp64, by chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_PER_CHUNK = 1 << 14  # bounds the fp64 copy made while fitting to a few hundred MB


def fit_statistics(tokens: Tensor, kind: str, components: int | None) -> dict[str, Tensor]:
    """The fp64 statistics of ``kind`` for tokens ``[n, C]``: see the table in ``normalizer.py``.

    Raises ``ValueError`` where PCA is asked for more directions than the tokens vary in.
    """
    if kind == "l2":
        lengths = [torch.linalg.vector_norm(chunk.double(), dim=-1).sum() for chunk in _chunks(tokens)]
        return {"length": torch.stack(lengths).sum() / tokens.shape[0]}
    if kind == "standardize":
        mean = _mean(tokens)
        squares = [((chunk.double() - mean) ** 2).sum(dim=0) for chunk in _chunks(tokens)]
        std = (torch.stack(squares).sum(dim=0) / tokens.shape[0]).sqrt()
        return {"mean": mean, "std": usable_std(std, mean)}
    if components is not None:
        return _fit_pca(tokens, components)
    return {}


def _chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return tokens.split(_ROWS_PER_CHUNK)


def _mean(tokens: Tensor) -> Tensor:
    sums = [chunk.double().sum(dim=0) for chunk in _chunks(tokens)]
    return torch.stack(sums).sum(dim=0) / tokens.shape[0]


def usable_std(std: Tensor, mean: Tensor) -> Tensor:
    """A channel that never varies is only centred: dividing would amplify its rounding noise."""
    constant = std <= 1e-7 * mean.abs() + 1e-30
    return torch.where(constant, torch.ones_like(std), std)


def _fit_pca(tokens: Tensor, components: int) -> dict[str, Tensor]:
    """Mean, whitening std, basis and explained variance from the fp64 covariance matrix."""
    mean = _mean(tokens)
    channels = tokens.shape[1]
    covariance = torch.zeros(channels, channels, dtype=torch.float64, device=tokens.device)
    for chunk in _chunks(tokens):
        # The product runs in fp32 on centred rows (half the time of fp64; its relative error,
        # about 1e-6, is far below the sampling error of any covariance) and is summed in fp64.
        centred = (chunk.double() - mean).to(tokens.dtype if tokens.dtype == torch.float64 else torch.float32)
        covariance += (centred.T @ centred).double()
    return pca_statistics(mean, covariance / tokens.shape[0], tokens.shape[0], components)


def pca_statistics(mean: Tensor, covariance: Tensor, count: int, components: int) -> dict[str, Tensor]:
    """The statistics of ``pca:K`` from the fp64 mean ``[C]`` and covariance ``[C, C]`` of ``count`` tokens."""
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("features: their covariance is not finite; look for NaN or Inf in the features")
    variance, vectors = _eigh(covariance)  # ascending
    variance, vectors = variance.flip(0).clamp_min(0.0), vectors.flip(1)
    rank = int((variance > 1e-6 * variance[0]).sum()) if float(variance[0]) > 0 else 0
    if components > rank:
        raise ValueError(
            f"normalize: 'pca:{components}' asks for {components} components, but the "
            f"{count} tokens given vary in only {rank} directions; "
            f"K must be 1..{rank} (or give more pictures)"
        )
    basis = vectors[:, :components]
    # An eigenvector's sign is arbitrary and differs between LAPACK builds: make the largest entry
    # of each positive, so that the same features give the same targets on every machine.
    largest = basis.abs().argmax(dim=0, keepdim=True)
    basis = basis * torch.where(basis.gather(0, largest) < 0, -1.0, 1.0)
    return {
        "mean": mean,
        "std": variance[:components].sqrt(),
        "basis": basis.contiguous(),
        "explained_variance": variance[:components].sum() / variance.sum(),
    }


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` on one CPU thread: LAPACK's many small steps wait for each other between threads.

    Measured for 1280 x 1280 in fp64 on 2 cores that other work shares: 0.6 s on one thread, 20 s on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    return values, vectors
