"""The probability path's four coefficients: the one place where the two schedules are written down.

    x_sigma = alpha(sigma) * data + s(sigma) * noise          sigma in [0, 1], 1 = pure noise
    v       = d x_sigma / d sigma = alpha'(sigma) * data + s'(sigma) * noise

linear (conditional optimal transport, Lipman et al. 2023, arXiv:2210.02747; what BLIP3-o trains):
    alpha = 1 - sigma                    alpha' = -1
    s     = sigma_min + span * sigma     s'     = span               span = sigma_max - sigma_min
cosine:
    alpha = (1 + cos(pi sigma)) / 2      alpha' = -(pi / 2) sin(pi sigma)
    s     = sigma_min + span * sin(pi sigma / 2)
                                         s'     = span * (pi / 2) cos(pi sigma / 2)

Both give alpha(0) = 1, alpha(1) = 0, s(0) = sigma_min and s(1) = sigma_max, exactly in floating point.
"""

import math

import torch

SCHEDULES = ("linear", "cosine")
PREDICTION_TYPES = ("v_prediction", "epsilon")


def path_coefficients(
    sigma: torch.Tensor, schedule: str, sigma_min: float, sigma_max: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(alpha, s, alpha', s')`, each with sigma's shape and dtype. sigma is float32 or float64."""
    span = sigma_max - sigma_min
    if schedule == "linear":
        return (
            1 - sigma,
            sigma_min + span * sigma,
            torch.full_like(sigma, -1.0),
            torch.full_like(sigma, span),
        )
    assert schedule == "cosine", schedule
    angle, half_angle = math.pi * sigma, (math.pi / 2) * sigma
    return (
        (1 + torch.cos(angle)) / 2,
        sigma_min + span * torch.sin(half_angle),
        (-math.pi / 2) * torch.sin(angle),
        (span * math.pi / 2) * torch.cos(half_angle),
    )


def target_coefficients(
    sigma: torch.Tensor, prediction_type: str, schedule: str, sigma_min: float, sigma_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(p, q)` such that the network's target is `p * data + q * noise`."""
    if prediction_type == "epsilon":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    assert prediction_type == "v_prediction", prediction_type
    _, _, d_alpha, d_noise_scale = path_coefficients(sigma, schedule, sigma_min, sigma_max)
    return d_alpha, d_noise_scale


def check_schedule(schedule: str, sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless the three settings describe a path."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not (0.0 <= sigma_min < sigma_max < math.inf):
        raise ValueError(
            "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max < inf, "
            f"got sigma_min={sigma_min}, sigma_max={sigma_max}"
        )


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless the network's target is one that this package knows."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
