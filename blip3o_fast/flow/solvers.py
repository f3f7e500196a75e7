"""Solvers of `d x / d sigma = v(x, sigma)` on a given grid of noise levels.

| solver   | order | evaluations per step | step from sigma to sigma + h                              |
|----------|-------|----------------------|-----------------------------------------------------------|
| euler    | 1     | 1                    | x + h v                                                   |
| midpoint | 2     | 2                    | x + h v(x + h/2 v, sigma + h/2)                           |
| heun     | 2     | 2                    | x + h/2 (v + v(x + h v, sigma + h))                       |
| ab2      | 2     | 1                    | x + h (v + h / (2 h_prev) (v - v_prev)); first step Euler |

(Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", II.1 and III.5, the last in its
form for unequal steps.) ab2 costs what Euler costs; its one Euler step at the start has a local error of
order h^2 and therefore leaves the global order 2.
"""

import math
from collections.abc import Callable

import torch

from blip3o_fast.flow.timesteps import NUM_TRAIN_TIMESTEPS

SOLVERS = ("euler", "midpoint", "heun", "ab2")
GRIDS = ("linear", "shifted", "cosine", "blip3o", "diffusers")

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`velocity(x, sigma)` with sigma 0-d; returns a tensor of x's shape."""


def sigma_grid(num_steps: int, kind: str = "linear", *, shift: float = 1.0, start: float = 1.0) -> torch.Tensor:
    """Noise levels of a sampling run: float32 `[num_steps + 1]`, from `start` down to exactly 0.

    With u = 1, 1 - 1/S, ..., 1/S, 0 and S = num_steps:

    - "linear": `u`;
    - "shifted": `shift * u / (1 + (shift - 1) * u)`, more steps near the noise for shift > 1
      (diffusers' `FlowMatchEulerDiscreteScheduler(shift=...)` given BLIP3-o's sigmas);
    - "cosine": `(1 - cos(pi u)) / 2`, short steps at both ends;
    - "blip3o": `linspace(1, 1/S, S)`, then 0: BLIP3-o's list, "linear" up to one rounding;
    - "diffusers": what that scheduler chooses when given only a number of steps: S levels from 1 down
      to 1/1000, then 0. Its constructor and `set_timesteps` each apply the shift, so with
      `shift` != 1 the last level before 0 is shifted twice; copied as is.

    Args:
        num_steps: S >= 1.
        kind: one of the above.
        shift: positive; used by "shifted" and "diffusers".
        start: in (0, 1]; the whole grid is scaled by it. An epsilon-predicting network starts at 0.999.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer >= 1, got {num_steps!r}")
    if kind not in GRIDS:
        raise ValueError(f"kind must be one of {', '.join(GRIDS)}, got {kind!r}")
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {shift}")
    if kind not in ("shifted", "diffusers") and shift != 1.0:
        raise ValueError(f"shift = {shift} needs kind='shifted' or 'diffusers', got kind={kind!r}")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start must be in (0, 1], got {start}")
    levels = _levels(num_steps, kind, shift) * start
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]).to(torch.float32)


def _levels(num_steps: int, kind: str, shift: float) -> torch.Tensor:
    """The float64 levels before the final 0."""

    def shifted(u: torch.Tensor) -> torch.Tensor:
        return shift * u / (1 + (shift - 1) * u)

    if kind == "blip3o":
        return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    if kind == "diffusers":
        lowest = shifted(torch.tensor(1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float64))
        return shifted(torch.linspace(1, float(lowest), num_steps, dtype=torch.float64))
    u = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    if kind == "shifted":
        return shifted(u)
    return (1 - torch.cos(math.pi * u)) / 2 if kind == "cosine" else u


def evaluation_levels(sigmas: torch.Tensor, solver: str) -> torch.Tensor:
    """The noise level of each evaluation of the velocity, in order; sigmas [S + 1] as in `integrate`."""
    now, after = sigmas[:-1], sigmas[1:]
    if solver == "midpoint":
        return torch.stack([now, now + (after - now) / 2], dim=1).flatten()
    return torch.stack([now, after], dim=1).flatten() if solver == "heun" else now


def integrate(
    velocity: Velocity,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    solver: str = "euler",
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Carry x from `sigmas[0]` to `sigmas[-1]`.

    Args:
        velocity: `velocity(x, sigma)`, sigma a 0-d element of `sigmas` (or a point between two, for
            midpoint); may return another floating dtype than x's.
        x: state, any shape, floating. Steps are computed in float32 (float64 for float64) and rounded
            once to x's dtype.
        sigmas: `[S + 1]`, S >= 1, float32 or float64, strictly monotone: falling from noise to data, or
            rising to go back from data to noise. The order is checked only on the CPU, because checking
            it on an accelerator would make the host wait.
        solver: "euler", "midpoint", "heun" or "ab2".
        on_step: called with each of the S states after its step, the last of which is the result:
            `on_step=states.append` keeps them all.

    Returns:
        x at `sigmas[-1]`.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    check_solver(solver)
    check_sigmas(sigmas)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    previous_v: torch.Tensor | None = None
    previous_h: torch.Tensor | None = None

    def advance(state: torch.Tensor, h: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return (state.to(wide) + h.to(wide) * slope.to(wide)).to(state.dtype)

    for i in range(sigmas.shape[0] - 1):
        sigma, h = sigmas[i], sigmas[i + 1] - sigmas[i]
        v = velocity(x, sigma)
        if v.shape != x.shape:
            raise ValueError(f"velocity must return x's shape {tuple(x.shape)}, got {tuple(v.shape)}")
        slope = v
        if solver == "midpoint":
            slope = velocity(advance(x, h / 2, v), sigma + h / 2)
        elif solver == "heun":
            slope = (v.to(wide) + velocity(advance(x, h, v), sigmas[i + 1]).to(wide)) / 2
        elif solver == "ab2" and previous_v is not None and previous_h is not None:
            slope = v.to(wide) + (h / (2 * previous_h)).to(wide) * (v.to(wide) - previous_v.to(wide))
        x = advance(x, h, slope)
        previous_v, previous_h = v, h
        if on_step is not None:
            on_step(x)
    return x


def check_solver(solver: str) -> None:
    """Raise ValueError unless the solver is known."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")


def check_sigmas(sigmas: torch.Tensor) -> None:
    """Raise ValueError unless sigmas is a usable grid of noise levels."""
    if not isinstance(sigmas, torch.Tensor) or sigmas.dtype not in (torch.float32, torch.float64):
        given = getattr(sigmas, "dtype", type(sigmas).__name__)
        raise ValueError(f"sigmas must be a float32 or float64 tensor, got {given}")
    if sigmas.ndim != 1 or sigmas.shape[0] < 2:
        raise ValueError(f"sigmas must have shape (S + 1,), S >= 1, got {tuple(sigmas.shape)}")
    if sigmas.device.type == "cpu":
        steps = sigmas.diff()
        if not (bool((steps < 0).all()) or bool((steps > 0).all())):
            raise ValueError(f"sigmas must be strictly monotone, got {sigmas.tolist()}")
