"""Sampling: from a condition and noise to features, by integrating the network's velocity from sigma = 1 to 0.

    condition [N, L, E] --normalise--> network --velocity, guided--> ODE solver --undo normalisation--> [N * n, T, C]

The conventions are BLIP3-o's (its `sample_images`): 30 Euler steps over linear noise levels, guidance 3.0, zeros as
the null condition, the unconditional half of the batch first.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.loss import network_output, velocity_sign
from blip3o_fast.flow.path import MAX_SIGMA_EPSILON, FlowPath
from blip3o_fast.flow.solvers import check_sigmas, check_solver, integrate, sigma_grid


@overload
def sample(
    model: Any, encoder_hidden_states: Tensor, *, num_steps: int = 30, guidance_scale: float = 3.0,
    solver: str = "euler", encoder_mask: Tensor | None = None, generator: torch.Generator | None = None,
    num_samples_per_condition: int = 1, noise: Tensor | None = None, return_intermediates: Literal[False] = False,
    progress: bool = False, sigmas: Tensor | None = None, truncate_time: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def sample(
    model: Any, encoder_hidden_states: Tensor, *, num_steps: int = 30, guidance_scale: float = 3.0,
    solver: str = "euler", encoder_mask: Tensor | None = None, generator: torch.Generator | None = None,
    num_samples_per_condition: int = 1, noise: Tensor | None = None, return_intermediates: Literal[True],
    progress: bool = False, sigmas: Tensor | None = None, truncate_time: bool = False,
) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip
def sample(
    model: Any,
    encoder_hidden_states: Tensor,
    *,
    num_steps: int = 30,
    guidance_scale: float = 3.0,
    solver: str = "euler",
    encoder_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_samples_per_condition: int = 1,
    noise: Tensor | None = None,
    return_intermediates: bool = False,
    progress: bool = False,
    sigmas: Tensor | None = None,
    truncate_time: bool = False,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Draw features for each condition.

    model: `BLIP3oDiT`, or any module called the same way with a `config` of the same fields. Its `normalizer`, where it
        has one, is applied to the condition and undone on the result. Put it in eval mode yourself.
    encoder_hidden_states: [N, L, E], floating, as the encoder gave it (not normalised), on the model's device.
    num_steps: ODE steps; one or two network calls each, see `flow.solvers`.
    guidance_scale: classifier-free guidance w, v = v_null + w (v_cond - v_null). 1 and 0 need one forward pass a step
        (the condition alone, the null condition alone), every other number two, run as one batch.
    solver: "euler", "midpoint", "heun" or "ab2".
    encoder_mask: bool [N, L], True = attend; None attends to everything.
    generator: for the noise; drawn on the generator's device in fp32, so that a CPU generator gives one result on every
        device. None is PyTorch's global one.
    num_samples_per_condition: n; the result's rows i * n to i * n + n - 1 belong to condition i.
    noise: [N * n, T, C'], standard normal, to start from instead; C' is the network's number of channels.
    return_intermediates: return `(result, states)`: the num_steps states after each step, the last one the result.
    progress: a progress bar on stderr where that is a terminal.
    sigmas: fp32 or fp64 [num_steps + 1], noise levels falling to 0, instead of `sigma_grid(num_steps)`.
    truncate_time: feed whole numbers as time, as BLIP3-o's released sampler does (966 instead of 966.67).

    What depends on the condition alone (its projection, every block's cross-attention keys and values) is made once
    and kept for the run: layers * 2 * L * key channels per sample, twice with guidance.

    Returns [N * n, T, C], fp32 (fp64 for an fp64 network). The state is kept in that dtype; the network gets its own.
    Raises ValueError naming the argument, what was given and what is allowed; FloatingPointError where the result is
    not finite.
    """
    run = _prepare(
        model, encoder_hidden_states, num_steps, guidance_scale, solver, encoder_mask,
        generator, num_samples_per_condition, noise, sigmas, truncate_time,
    )  # fmt: skip
    normalizer = getattr(model, "normalizer", None)
    states: list[Tensor] = []
    with torch.no_grad(), _bar(run.sigmas.shape[0] - 1, progress) as advance:

        def keep(state: Tensor) -> None:
            advance()
            if return_intermediates:
                states.append(state)

        x = run.start
        if x.shape[0] > 0:
            x = _euler(run, x, keep) if solver == "euler" else _by_solver(run, x, solver, keep)
        else:
            states = [x] * (run.sigmas.shape[0] - 1) if return_intermediates else []
        _check_finite(x, encoder_hidden_states, noise)
        if normalizer is not None:
            states = [normalizer.target.inverse(state) for state in states]
            x = states[-1] if states else normalizer.target.inverse(x)
    return (x, states) if return_intermediates else x


# ---- the two loops ---------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Everything a sampling run needs, on the model's device."""

    model: Any
    config: Any
    path: FlowPath
    start: Tensor  # [M, T, C'], fp32 or fp64
    sigmas: Tensor  # [S + 1]
    condition: Any  # [M or 2 M, L, E], the null half first; prepared where the model can, and then with its mask
    dtype: torch.dtype  # the network's
    mask: Tensor | None
    guidance: Tensor | None  # 0-d; None where one pass is enough
    truncate_time: bool

    def network(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network says, `(with the condition, without it)`; the second is None without guidance."""
        x_t = x.to(self.dtype)
        if self.guidance is not None:
            x_t = torch.cat([x_t, x_t])
        output = network_output(
            self.model,
            x_t,
            sigma,
            self.condition,
            self.mask,
            time_convention=self.config.time_convention,
            truncate_time=self.truncate_time,
        )
        if self.config.prediction_type == "epsilon":
            # Both halves have their own x_t of the same values, so the conversion commutes with the guidance.
            wide = torch.cat([x, x]) if self.guidance is not None else x
            output = self.path.velocity_from_epsilon(wide, output, sigma)
        if self.guidance is None:
            return output, None
        null, conditional = output.chunk(2)
        return conditional, null

    @property
    def sign(self) -> float:
        return velocity_sign(self.config.time_convention, self.config.prediction_type)


def _euler(run: _Run, x: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
    """One fused step per noise level; the sign of the network's convention is folded into the step."""
    steps = run.sigmas.diff() * run.sign
    for i in range(steps.shape[0]):
        conditional, null = run.network(x, run.sigmas[i])
        x = ops.ode_step(x, conditional, null, run.guidance, steps[i])
        keep(x)
    return x


def _by_solver(run: _Run, x: Tensor, solver: str, keep: Callable[[Tensor], None]) -> Tensor:
    def velocity(state: Tensor, sigma: Tensor) -> Tensor:
        conditional, null = run.network(state, sigma)
        v = conditional.to(state.dtype)
        if null is not None:
            wide_null = null.to(state.dtype)
            assert run.guidance is not None
            v = wide_null + run.guidance * (v - wide_null)
        return v * run.sign

    return integrate(velocity, x, run.sigmas, solver=solver, on_step=keep)


class _bar:
    """`with _bar(total, wanted) as advance`: a tqdm bar where it is wanted and stderr is a terminal, else nothing."""

    def __init__(self, total: int, wanted: bool) -> None:
        self.bar: Any = None
        if wanted and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc="sampling", unit="step", leave=False)

    def __enter__(self) -> Callable[[], Any]:
        return (lambda: None) if self.bar is None else self.bar.update

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- arguments -------------------------------------------------------------------------------------------------------


def _prepare(
    model: Any,
    condition: Tensor,
    num_steps: int,
    guidance_scale: float,
    solver: str,
    encoder_mask: Tensor | None,
    generator: torch.Generator | None,
    samples_each: int,
    noise: Tensor | None,
    sigmas: Tensor | None,
    truncate_time: bool,
) -> _Run:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model must have a config (BLIP3oDiT has one), got {type(model).__name__} without")
    normalizer = getattr(model, "normalizer", None)
    check_solver(solver)
    _check_count("num_samples_per_condition", samples_each)
    if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    width = config.cross_attention_dim if normalizer is None else normalizer.condition.in_features
    _check_condition(condition, width, encoder_mask)
    device, dtype = _device_and_dtype(model, condition)
    if condition.device != device:
        raise ValueError(f"encoder_hidden_states must be on the model's device {device}, got {condition.device}")

    shape = (condition.shape[0] * samples_each, config.sample_size**2, config.in_channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = _noise(noise, generator, shape, device).to(wide)
    path = FlowPath(config.schedule, config.sigma_min, config.sigma_max)
    levels = _sigmas(sigmas, num_steps, config.prediction_type).to(device, wide)

    context = condition if normalizer is None else normalizer.condition(condition)
    context = context.to(dtype).repeat_interleave(samples_each, 0)
    mask = None if encoder_mask is None else encoder_mask.repeat_interleave(samples_each, 0)
    guidance = None
    if guidance_scale == 0:
        context = torch.zeros_like(context)
    elif guidance_scale != 1:
        guidance = torch.full((), guidance_scale, dtype=wide, device=device)
        context = torch.cat([torch.zeros_like(context), context])
        mask = None if mask is None else torch.cat([mask, mask])
    start = path.noise_scale(levels[0]) * start
    made: Any = context
    if start.shape[0] > 0 and _can_prepare(model):
        with torch.no_grad():
            made, mask = model.prepare_condition(context, mask), None
    return _Run(model, config, path, start, levels, made, dtype, mask, guidance, truncate_time)


def _can_prepare(model: Any) -> bool:
    """Not every model that is called like ours can, and a sharded one has no whole weights outside its forward."""
    return hasattr(model, "prepare_condition") and all(type(p) is torch.nn.Parameter for p in model.parameters())


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_condition(condition: Tensor, width: int, mask: Tensor | None) -> None:
    if not isinstance(condition, Tensor) or not condition.is_floating_point():
        given = getattr(condition, "dtype", type(condition).__name__)
        raise ValueError(f"encoder_hidden_states must be a floating tensor of shape (N, L, {width}), got {given}")
    if condition.dim() != 3 or condition.shape[1] == 0 or condition.shape[2] != width:
        raise ValueError(f"encoder_hidden_states must have shape (N, L, {width}), got {tuple(condition.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != condition.shape[:2]:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"encoder_mask must be bool of shape (N, L) = {tuple(condition.shape[:2])}, got {given}")
    if mask.device != condition.device:
        raise ValueError(f"encoder_mask must be on {condition.device}, got {mask.device}")


def _device_and_dtype(model: Any, condition: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where the network computes. An offloaded network has its weights on meta; then the condition says where."""
    parameter = next(iter(model.parameters()), condition)
    device = condition.device if parameter.device.type == "meta" else parameter.device
    return device, parameter.dtype if parameter.dtype.is_floating_point else condition.dtype


def _noise(
    noise: Tensor | None, generator: torch.Generator | None, shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    if noise is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        drawn_on = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=drawn_on, dtype=torch.float32).to(device)
    if generator is not None:
        raise ValueError("noise and generator exclude each other: the generator would have nothing to draw")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or tuple(noise.shape) != shape:
        given = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise must be a floating tensor of shape (N * n, T, C) = {shape}, got {given}")
    if noise.device != device:
        raise ValueError(f"noise must be on the model's device {device}, got {noise.device}")
    return noise


def _sigmas(sigmas: Tensor | None, num_steps: int, prediction_type: str) -> Tensor:
    start = MAX_SIGMA_EPSILON if prediction_type == "epsilon" else 1.0
    if sigmas is None:
        return sigma_grid(num_steps, start=start)
    _check_count("num_steps", num_steps)
    check_sigmas(sigmas)
    if sigmas.shape[0] != num_steps + 1:
        raise ValueError(f"sigmas must have num_steps + 1 = {num_steps + 1} elements, got {sigmas.shape[0]}")
    # One look at the host before the loop starts: the loop itself never waits.
    first, last = float(sigmas[0]), float(sigmas[-1])
    if not (last == 0.0 < first <= start):
        raise ValueError(f"sigmas must fall from at most {start} ({prediction_type}) to 0, got {first} to {last}")
    return sigmas


def _check_finite(x: Tensor, condition: Tensor, noise: Tensor | None) -> None:
    if bool(torch.isfinite(x).all()):
        return
    for name, tensor in (("encoder_hidden_states", condition), ("noise", noise)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    raise FloatingPointError(
        f"sampling gave NaN or infinity in {bad} of {x.shape[0]} samples although condition and noise are finite: "
        "the weights may be broken or untrained, guidance_scale too large, or float16 too narrow (try bfloat16)"
    )
