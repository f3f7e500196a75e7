"""The probability path between data and noise.

One variable everywhere: `sigma` in [0, 1], 1 = pure noise, 0 = data.

    x_t = alpha(sigma) * data + s(sigma) * noise,      velocity = d x_t / d sigma

The formulas of both schedules are in `blip3o_fast/ops/_flow_schedule.py`, which the fused ops read too.
This class is the readable form, for analysis, sampling and tests; training goes through
`ops.flow_interpolate` and `ops.flow_matching_loss`.
"""

from dataclasses import dataclass

import torch

from blip3o_fast.ops._flow_schedule import check_schedule, path_coefficients

MIN_ALPHA = 1e-3
"""Where alpha falls below this, recovering data from (x_t, eps) divides by it instead."""

MAX_SIGMA_EPSILON = 0.999
"""A sampler of an epsilon-predicting network starts here: at sigma = 1 x_t holds no data to recover."""

_MIN_DETERMINANT = 1e-3


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class FlowPath:
    """Path from data to noise with its derivative.

    Args:
        schedule: "linear" (straight line, BLIP3-o) or "cosine".
        sigma_min: standard deviation of the noise that stays at sigma = 0.
        sigma_max: standard deviation of the noise at sigma = 1.

    Every method takes sigma as float32 or float64, shape `[B]` (one per sample) or 0-d. `data`,
    `noise`, `x_t` and `velocity` are `[B, ...]` of any floating dtype. Arithmetic is float32 (float64
    for float64 inputs) and the result has the first argument's dtype.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """

    schedule: str = "linear"
    sigma_min: float = 0.0
    sigma_max: float = 1.0

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.sigma_min, self.sigma_max)

    def coefficients(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(alpha, s, d alpha / d sigma, d s / d sigma)`, each with sigma's shape and dtype."""
        check_sigma(sigma)
        return path_coefficients(sigma, self.schedule, self.sigma_min, self.sigma_max)

    def alpha(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the data: 1 at sigma = 0, 0 at sigma = 1."""
        return self.coefficients(sigma)[0]

    def noise_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the noise: sigma_min at sigma = 0, sigma_max at sigma = 1."""
        return self.coefficients(sigma)[1]

    def d_alpha(self, sigma: torch.Tensor) -> torch.Tensor:
        """Derivative of `alpha` with respect to sigma."""
        return self.coefficients(sigma)[2]

    def d_noise_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """Derivative of `noise_scale` with respect to sigma."""
        return self.coefficients(sigma)[3]

    def interpolate(self, data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`x_t = alpha * data + s * noise`."""
        alpha, noise_scale, _, _ = self._for(data, sigma)
        return self._combine(alpha, data, noise_scale, noise)

    def velocity(self, data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`d x_t / d sigma = alpha' * data + s' * noise`; on the linear path `noise - data`."""
        _, _, d_alpha, d_noise_scale = self._for(data, sigma)
        return self._combine(d_alpha, data, d_noise_scale, noise)

    def velocity_from_epsilon(self, x_t: torch.Tensor, epsilon: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The velocity that belongs to a prediction of the noise.

        `data = (x_t - s * eps) / max(alpha, 1e-3)`, then `alpha' * data + s' * eps`. The clamp keeps it
        finite near sigma = 1, where x_t says nothing about the data.
        """
        alpha, noise_scale, d_alpha, d_noise_scale = self._for(x_t, sigma)
        wide_x, wide_epsilon = x_t.to(alpha.dtype), epsilon.to(alpha.dtype)
        data = (wide_x - noise_scale * wide_epsilon) / alpha.clamp(min=MIN_ALPHA)
        return (d_alpha * data + d_noise_scale * wide_epsilon).to(x_t.dtype)

    def data_from_velocity(self, x_t: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The data that x_t and its velocity point to: `(s' x_t - s v) / (alpha s' - s alpha')`.

        On the linear path with sigma_min = 0, sigma_max = 1 this is `x_t - sigma * v`. On the cosine
        path both derivatives vanish at sigma = 1, so there the velocity cannot tell; the divisor is
        clamped at 1e-3 and the answer tends to 0.
        """
        alpha, noise_scale, d_alpha, d_noise_scale = self._for(x_t, sigma)
        wide_x, wide_v = x_t.to(alpha.dtype), velocity.to(alpha.dtype)
        determinant = alpha * d_noise_scale - noise_scale * d_alpha
        numerator = d_noise_scale * wide_x - noise_scale * wide_v
        return (numerator / determinant.clamp(min=_MIN_DETERMINANT)).to(x_t.dtype)

    def _for(self, tensor: torch.Tensor, sigma: torch.Tensor) -> list[torch.Tensor]:
        check_sigma(sigma)
        if sigma.ndim == 1 and (tensor.ndim == 0 or sigma.shape[0] != tensor.shape[0]):
            raise ValueError(
                f"sigma must be 0-d or have shape (B,) = {tuple(tensor.shape[:1])}, got {tuple(sigma.shape)}"
            )
        shape = sigma.shape + (1,) * (tensor.ndim - sigma.ndim)
        wide = sigma.to(_compute_dtype(tensor)).reshape(shape)
        return list(path_coefficients(wide, self.schedule, self.sigma_min, self.sigma_max))

    @staticmethod
    def _combine(weight_a: torch.Tensor, a: torch.Tensor, weight_b: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape != b.shape:
            raise ValueError(f"noise must have the data's shape {tuple(a.shape)}, got {tuple(b.shape)}")
        return (weight_a * a.to(weight_a.dtype) + weight_b * b.to(weight_b.dtype)).to(a.dtype)


def check_sigma(sigma: torch.Tensor) -> None:
    """Raise ValueError unless sigma is a float32/float64 tensor with at most one dimension."""
    if not isinstance(sigma, torch.Tensor):
        raise ValueError(f"sigma must be a tensor, got {type(sigma).__name__}")
    if sigma.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"sigma must be float32 or float64 (bfloat16 keeps only 506 of 1000 noise levels apart), got {sigma.dtype}"
        )
    if sigma.ndim > 1:
        raise ValueError(f"sigma must be 0-d or [B], got shape {tuple(sigma.shape)}")
