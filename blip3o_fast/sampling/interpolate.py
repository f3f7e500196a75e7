"""Features on the way from one condition to another, all from one noise: what changes is the condition alone.

The way leads through the raw conditions, as the encoder gave them:

    linear       (1 - w) a + w b. It commutes with a model's standardisation, so nothing depends on the normaliser.
    spherical    each token turns from a's direction to b's at a constant rate, and its length changes evenly: half-way
                 tokens are as long as the encoder's, where the linear ones are shorter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.models.adopt import as_ours
from blip3o_fast.sampling.arguments import check_count
from blip3o_fast.sampling.sample import sample

METHODS = ("linear", "spherical")


def interpolate(
    model: Any,
    condition_a: Tensor,
    condition_b: Tensor,
    *,
    count: int | None = None,
    weights: Sequence[float] | Tensor | None = None,
    method: str = "linear",
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """Draw features for conditions between two, all from the same noise.

    model: what `sample` takes.
    condition_a, condition_b: [L, E], floating, as the encoder gave them, on the model's device.
    count: so many steps at even distances, both ends included; 8 where neither this nor weights is given.
    weights: [S], of b, instead: 0 is a and 1 is b, bit for bit; what is outside extrapolates (linear only).
    method: "linear" or "spherical", see the head of this file.
    generator: one, for the noise. noise: [T, C'], standard normal, instead.
    arguments: others of `sample`, except encoder_mask, num_samples_per_condition and return_intermediates.

    Returns [S, T, C], fp32 (fp64 for an fp64 network), as one run of `sample` over the S conditions gives them; so the
    ends are what `sample` gives for a and for b.
    Raises ValueError naming the argument, what was given and what is allowed; and what `sample` raises.
    """
    for name in ("encoder_mask", "num_samples_per_condition", "return_intermediates"):
        if name in arguments:
            raise ValueError(f"{name} is no argument of interpolate; allowed are the others of sample")
    at = steps_between(count, weights)
    conditions = conditions_between(condition_a, condition_b, at, method)
    if noise is not None and generator is not None:
        raise ValueError("noise and generator exclude each other: the generator would have nothing to draw")
    model = as_ours(model)
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model must have a config (BLIP3oDiT has one), got {type(model).__name__} without")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be one torch.Generator, as there is one noise, got {type(generator).__name__}"
        )
    shape = (config.sample_size**2, config.in_channels)
    if noise is None:
        noise = torch.randn(shape, generator=generator, device=None if generator is None else generator.device)
    elif not isinstance(noise, Tensor) or not noise.is_floating_point() or tuple(noise.shape) != shape:
        given = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise must be a floating tensor of shape (T, C) = {shape}, got {given}")
    return sample(model, conditions, noise=noise.to(conditions.device).expand(len(at), *shape), **arguments)


def steps_between(count: int | None, weights: Sequence[float] | Tensor | None) -> Tensor:
    """fp64 [S]: the weights of the second end."""
    if weights is None:
        count = 8 if count is None else count
        check_count("count", count)
        if count < 2:
            raise ValueError(f"count must be at least 2, for both ends are included, got {count}")
        return torch.linspace(0, 1, count, dtype=torch.float64)
    if count is not None:
        raise ValueError("count and weights exclude each other: the weights say how many steps there are")
    try:
        at = torch.as_tensor(weights, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"weights must be numbers, got {weights!r:.80}") from error
    if at.dim() != 1 or at.numel() == 0 or not bool(torch.isfinite(at).all()):
        raise ValueError(f"weights must be one or more finite numbers, got {weights!r:.80}")
    return at


def conditions_between(a: Tensor, b: Tensor, weights: Tensor, method: str) -> Tensor:
    """[S, L, E] in a's dtype on its device, computed in fp64."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("condition_a", a), ("condition_b", b)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2:
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a floating tensor of shape (L, E), got {given}")
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            "condition_a and condition_b must agree in shape, dtype and device, "
            f"got {tuple(a.shape)} {a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}"
        )
    w = weights.to(a.device)[:, None, None]
    if method == "linear":
        between = torch.lerp(a.double(), b.double(), w)
    else:
        if bool(((w < 0) | (w > 1)).any()):
            raise ValueError(f"weights must be between 0 and 1 with method 'spherical', got {weights.tolist()}")
        between = _slerp(a.double(), b.double(), w)
    between = torch.where(w == 0, a.double(), torch.where(w == 1, b.double(), between))
    return between.to(a.dtype)


def _slerp(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Directions along the great circle, lengths evenly. Where a and b are parallel, or one is zero: linearly."""
    tiny = torch.finfo(torch.float64).tiny
    long_a, long_b = (x.norm(dim=-1, keepdim=True) for x in (a, b))
    u, v = a / long_a.clamp_min(tiny), b / long_b.clamp_min(tiny)
    # Not acos of the product, which loses half of the digits near 1.
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sine = torch.sin(angle)
    turned = (torch.sin((1 - w) * angle) * u + torch.sin(w * angle) * v) / sine.clamp_min(tiny)
    turned = turned * torch.lerp(long_a, long_b, w)
    turns = (sine > 1e-9) & (long_a > 0) & (long_b > 0)
    return torch.where(turns, turned, torch.lerp(a, b, w))
