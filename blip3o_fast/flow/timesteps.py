"""Which noise levels are trained, what time the network is told, and when it loses its condition.

Every draw is a function of (seed, global sample index): the same run on one machine or on eight, with or
without gradient accumulation, sees the same sigma for the same sample. Philox-4x32-10
(`blip3o_fast/ops/_philox.py`) is keyed by the seed and counts samples, so there is no generator state to
save, and the streams of sigma, dropout and noise never overlap.
"""

import math

import torch

from blip3o_fast.flow.path import check_sigma
from blip3o_fast.ops._philox import per_sample_uniform

DISTRIBUTIONS = ("uniform", "logit_normal", "shifted")
TIME_CONVENTIONS = ("blip3o", "lumina")
NUM_TRAIN_TIMESTEPS = 1000

_SIGMA_STREAM, _DROPOUT_STREAM = 0, 1


def draw_sigma(
    seed: int,
    sample_index: torch.Tensor,
    *,
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
) -> torch.Tensor:
    """One noise level per sample, float32 `[B]` in [0, 1], on sample_index's device.

    Args:
        seed: any int64.
        sample_index: int64 `[B]`; the number of the sample in the whole run, so that an epoch later the
            same picture meets another sigma.
        distribution, logit_mean, logit_std, shift: see `sigma_quantile`.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    _check_sample_index(sample_index)
    _check_seed(seed)
    u = per_sample_uniform(seed, sample_index, _SIGMA_STREAM)
    return sigma_quantile(u, distribution=distribution, logit_mean=logit_mean, logit_std=logit_std, shift=shift)


def sigma_quantile(
    u: torch.Tensor,
    *,
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
) -> torch.Tensor:
    """The distribution's quantile function: uniform u in (0, 1] to sigma, same shape and dtype.

    - "uniform": `sigma = u`, what BLIP3-o trains (there on a grid of 1000 levels);
    - "logit_normal": `sigmoid(logit_mean + logit_std * z)` with normal z (Esser et al. 2024,
      arXiv:2403.03206, section 3.1); a positive mean moves the weight towards noise;
    - "shifted": `shift * u / (1 + (shift - 1) * u)` (the same paper, equation 23); shift > 1 moves it
      towards noise.
    """
    check_distribution(distribution, logit_mean, logit_std, shift)
    if distribution == "uniform":
        return u
    if distribution == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    return shift * u / (1 + (shift - 1) * u)


def network_time(sigma: torch.Tensor, time_convention: str = "blip3o", *, truncate: bool = False) -> torch.Tensor:
    """The time that the network is given for a noise level, in sigma's shape and dtype.

    - "blip3o": `1000 * sigma`, so 1000 is noise;
    - "lumina": `1 - sigma`, unscaled, so 0 is noise.

    `truncate=True` copies a quirk of BLIP3-o's sampler: times cast to integers (966.67 becomes 966).
    It is what the released sampler does, not what its training did, and exists for comparisons only.
    """
    check_sigma(sigma)
    check_time_convention(time_convention)
    if time_convention == "lumina":
        if truncate:
            raise ValueError(
                "truncate=True needs time_convention='blip3o': truncating times in [0, 1] would leave only 0 and 1"
            )
        return 1 - sigma
    time = NUM_TRAIN_TIMESTEPS * sigma
    return time.trunc() if truncate else time


def drop_condition(
    encoder_hidden_states: torch.Tensor,
    p: float,
    seed: int,
    sample_index: torch.Tensor,
) -> torch.Tensor:
    """Replace each sample's whole condition by zeros with probability p.

    Zeros are the null condition that the sampler's guidance uses, as in BLIP3-o.

    Args:
        encoder_hidden_states: `[B, ...]`, any floating dtype, as the network sees it (normalised).
        p: probability in [0, 1]. 0 returns the input itself.
        seed, sample_index: as in `draw_sigma`; the decisions are independent of the sigmas.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    _check_sample_index(sample_index)
    _check_seed(seed)
    if sample_index.shape[0] != encoder_hidden_states.shape[0]:
        raise ValueError(
            f"sample_index must have shape (B,) = ({encoder_hidden_states.shape[0]},), got {tuple(sample_index.shape)}"
        )
    if p == 0.0:
        return encoder_hidden_states
    kept = per_sample_uniform(seed, sample_index, _DROPOUT_STREAM) > p
    shape = (-1,) + (1,) * (encoder_hidden_states.ndim - 1)
    # where, not a product: a dropped sample must not leak its NaN into the batch.
    return torch.where(
        kept.to(encoder_hidden_states.device).reshape(shape),
        encoder_hidden_states,
        torch.zeros((), dtype=encoder_hidden_states.dtype, device=encoder_hidden_states.device),
    )


def check_time_convention(time_convention: str) -> None:
    """Raise ValueError unless it is a known time convention."""
    if time_convention not in TIME_CONVENTIONS:
        raise ValueError(f"time_convention must be one of {', '.join(TIME_CONVENTIONS)}, got {time_convention!r}")


def check_distribution(distribution: str, logit_mean: float, logit_std: float, shift: float) -> None:
    """Raise ValueError unless the settings describe a distribution of sigma."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if not math.isfinite(logit_mean):
        raise ValueError(f"logit_mean must be finite, got {logit_mean}")
    if not 0.0 < logit_std < math.inf:
        raise ValueError(f"logit_std must be positive and finite, got {logit_std}")
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {shift}")


def _check_sample_index(sample_index: torch.Tensor) -> None:
    if not isinstance(sample_index, torch.Tensor) or sample_index.dtype != torch.int64:
        given = getattr(sample_index, "dtype", type(sample_index).__name__)
        raise ValueError(f"sample_index must be an int64 tensor, got {given}")
    if sample_index.ndim != 1:
        raise ValueError(f"sample_index must have shape (B,), got {tuple(sample_index.shape)}")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer that fits into 64 bits, got {seed!r}")
