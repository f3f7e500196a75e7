"""How much each noise level counts in the loss.

The names and formulas are those of Stable Diffusion 3's training in diffusers
(`diffusers.training_utils.compute_loss_weighting_for_sd3`).
"""

import math

from torch import Tensor

WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
# The lowest noise level that diffusers' 1000 steps have; below it 1 / sigma^2 would let one sample rule the step.
LEAST_SIGMA = 1e-3


def loss_weight(sigma: Tensor, weighting: str) -> Tensor:
    """One factor per sample.

    sigma: floating point [B] in [0, 1]. weighting: "none" (1), "sigma_sqrt" (1 / sigma^2, sigma at least
    `LEAST_SIGMA`) or "cosmap" (2 / (pi (1 - 2 sigma + 2 sigma^2)), largest in the middle).
    Raises ValueError for another name.
    """
    if weighting == "none":
        return sigma.new_ones(sigma.shape)
    if weighting == "sigma_sqrt":
        return sigma.clamp(min=LEAST_SIGMA) ** -2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
