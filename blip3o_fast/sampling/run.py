"""One sampling run: what does not change from step to step is made first, then the loop over the noise levels.

A network call needs the condition (`conditional`), no condition (`null`) or, for classifier-free guidance, both as one
batch with the null half first (`both`): which of them is decided per call, by the guidance scale and its interval.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.loss import network_output, velocity_sign
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.solvers import evaluation_levels
from blip3o_fast.flow.timesteps import network_time
from blip3o_fast.models.condition import PreparedCondition
from blip3o_fast.models.step_modulations import StepModulations, step_bytes
from blip3o_fast.sampling.arguments import (
    Arguments,
    check_condition,
    check_given,
    check_result,
    noise_levels,
    starting_noise,
    warn_of_untrained_null,
)

MODULATION_BYTES = 256 << 20
NULL, CONDITIONAL, BOTH = "null", "conditional", "both"

Slope = tuple[Tensor, Tensor | None]
"""What the network says (with the condition, without it); None where one pass was enough."""


def draw(
    model: Any, encoder_hidden_states: Tensor, arguments: Arguments, modulation_bytes: int = MODULATION_BYTES
) -> tuple[Tensor, list[Tensor]]:
    """The features [N * n, T, C] and, where they are wanted, the states after each step.

    modulation_bytes: for modulations made before their steps; where those of one step need more, each step makes its
    own.
    """
    with torch.no_grad():
        run = _prepare(model, encoder_hidden_states, arguments, modulation_bytes)
        states: list[Tensor] = []
        with _bar(run.steps.shape[0], arguments.progress) as advance:

            def keep(state: Tensor) -> None:
                advance()
                if arguments.return_intermediates:
                    states.append(state)

            x = run.start
            if x.shape[0] > 0:
                x = run.solve(x, arguments.solver, keep)
            elif arguments.return_intermediates:
                states = [x] * run.steps.shape[0]
        check_result(x)
        normalizer = getattr(model, "normalizer", None)
        if normalizer is not None:
            states = [normalizer.target.inverse(state) for state in states]
            x = states[-1] if states else normalizer.target.inverse(x)
    return x, states


# ---- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything the loop needs, on the model's device."""

    model: Any
    path: FlowPath
    start: Tensor  # [M, T, C'], fp32 or fp64
    steps: Tensor  # [S], with the sign of the network's convention
    levels: Tensor  # [V], of each network call
    passes: list[str]  # [V]: NULL, CONDITIONAL or BOTH
    conditions: dict[str, tuple[Any, Tensor | None]]  # by pass: prepared where the model can, and then without a mask
    modulations: "Modulations"
    dtype: torch.dtype  # the network's
    guidance: Tensor  # 0-d
    truncate_time: bool

    def network(self, x: Tensor, call: int) -> Slope:
        passed, sigma = self.passes[call], self.levels[call]
        condition, mask = self.conditions[passed]
        made, config = self.modulations.of(call), self.model.config
        x_t = x.to(self.dtype)
        output = network_output(
            self.model,
            torch.cat([x_t, x_t]) if passed == BOTH else x_t,
            sigma,
            condition,
            mask,
            time_convention=config.time_convention,
            truncate_time=self.truncate_time,
            **({} if made is None else {"modulations": made}),
        )
        if config.prediction_type == "epsilon":
            # Both halves have their own x_t of the same values, so the conversion commutes with the guidance.
            output = self.path.velocity_from_epsilon(torch.cat([x, x]) if passed == BOTH else x, output, sigma)
        if passed != BOTH:
            return output, None
        null, conditional = output.chunk(2)
        return conditional, null

    def solve(self, x: Tensor, solver: str, keep: Callable[[Tensor], None]) -> Tensor:
        """The solvers of `flow.solvers` written as sums of guided steps, each one pass of `ode_step`.

        A step of several slopes is a sum of steps, rounded to x's dtype (fp32 or fp64) after each.
        """

        def step(state: Tensor, slope: Slope, h: Tensor) -> Tensor:
            conditional, null = slope
            return ops.ode_step(state, conditional, null, None if null is None else self.guidance, h)

        previous: Slope | None = None
        for i in range(self.steps.shape[0]):
            h = self.steps[i]
            if solver == "midpoint":
                half_way = step(x, self.network(x, 2 * i), h / 2)
                x = step(x, self.network(half_way, 2 * i + 1), h)
            elif solver == "heun":
                first = self.network(x, 2 * i)
                second = self.network(step(x, first, h), 2 * i + 1)
                x = step(step(x, first, h / 2), second, h / 2)
            elif solver == "ab2" and previous is not None:
                slope, extrapolated = self.network(x, i), h * h / (2 * self.steps[i - 1])
                x = step(step(x, slope, h + extrapolated), previous, -extrapolated)
                previous = slope
            else:
                previous = self.network(x, i)
                x = step(x, previous, h)
            keep(x)
        return x


@dataclass
class Modulations:
    """The modulations of every network call, made for a chunk of calls when its first one comes.

    passes: [V], by call. times: [V], what the network is fed. limits: by pass, how many fit the budget; 0 where each
    call is to make its own.
    """

    model: Any
    conditions: dict[str, tuple[Any, Tensor | None]]
    passes: list[str]
    times: Tensor
    limits: dict[str, int]
    first: int = 0
    made: list[StepModulations] = field(default_factory=list)

    def of(self, call: int) -> StepModulations | None:
        passed = self.passes[call]
        if self.limits[passed] == 0:
            return None
        if not self.first <= call < self.first + len(self.made):
            self.made = []  # what was there is freed first
            stop = call + 1
            while stop < len(self.passes) and stop - call < self.limits[passed] and self.passes[stop] == passed:
                stop += 1
            made = self.model.prepare_modulations(self.conditions[passed][0], self.times[call:stop])
            if made is None:  # a hooked module wants to be called at every step
                self.limits = dict.fromkeys(self.limits, 0)
                return None
            self.first, self.made = call, made
        return self.made[call - self.first]


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


# ---- before the loop -------------------------------------------------------------------------------------------------


def _prepare(model: Any, given: Tensor, arguments: Arguments, modulation_bytes: int) -> Run:
    """Check everything, then make what does not change. given: the condition."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model must have a config (BLIP3oDiT has one), got {type(model).__name__} without")
    normalizer = getattr(model, "normalizer", None)
    arguments.check()
    width = config.cross_attention_dim if normalizer is None else normalizer.condition.in_features
    check_condition(given, width, arguments.encoder_mask)
    device, dtype = device_and_dtype(model, given)
    if given.device != device:
        raise ValueError(f"encoder_hidden_states must be on the model's device {device}, got {given.device}")
    check_given("encoder_hidden_states", given)
    samples_each = arguments.num_samples_per_condition
    shape = (given.shape[0] * samples_each, config.sample_size**2, config.in_channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = starting_noise(arguments, shape, device).to(wide)
    sigmas = noise_levels(arguments, config.prediction_type)
    levels = evaluation_levels(sigmas.to(wide), arguments.solver)
    times = network_time(levels, config.time_convention, truncate=arguments.truncate_time)

    passes = needed_passes(levels, arguments)
    if BOTH in passes:
        warn_of_untrained_null(model, arguments.guidance_scale)
    context = given if normalizer is None else normalizer.condition(given)
    context = context.to(dtype).repeat_interleave(samples_each, 0)
    mask = arguments.encoder_mask
    mask = None if mask is None else mask.repeat_interleave(samples_each, 0)
    conditions = _conditions(model, context, mask, set(passes))
    path = FlowPath(config.schedule, config.sigma_min, config.sigma_max)
    return Run(
        model,
        path,
        path.noise_scale(sigmas[0].to(device, wide)) * start,
        sigmas.to(device, wide).diff() * velocity_sign(config.time_convention, config.prediction_type),
        levels.to(device),
        passes,
        conditions,
        Modulations(model, conditions, passes, times.to(device), _limits(model, conditions, dtype, modulation_bytes)),
        dtype,
        torch.full((), arguments.guidance_scale, dtype=wide, device=device),
        arguments.truncate_time,
    )


def device_and_dtype(model: Any, condition: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where the network computes. An offloaded network has its weights on meta; then the condition says where."""
    parameter = next(iter(model.parameters()), condition)
    device = condition.device if parameter.device.type == "meta" else parameter.device
    return device, parameter.dtype if parameter.dtype.is_floating_point else condition.dtype


def needed_passes(levels: Tensor, arguments: Arguments) -> list[str]:
    """Which pass each network call is. One look at the host here: the loop itself never waits."""
    scale = arguments.guidance_scale
    inside = CONDITIONAL if scale == 1 else NULL if scale == 0 else BOTH
    # As exact as the levels, so that a bound which is one of them includes it.
    bounds = torch.tensor([arguments.guidance_end, arguments.guidance_start], dtype=levels.dtype).tolist()
    return [inside if bounds[0] <= level <= bounds[1] else CONDITIONAL for level in levels.tolist()]


def _conditions(
    model: Any, context: Tensor, mask: Tensor | None, needed: set[str]
) -> dict[str, tuple[Any, Tensor | None]]:
    """The condition of each pass, [M or 2 M, L, E], prepared where the model can; the null condition is zero."""
    samples = context.shape[0]
    whole = next(iter(needed)) if len(needed) == 1 else BOTH
    if whole == NULL:
        context = torch.zeros_like(context)
    elif whole == BOTH:
        context = torch.cat([torch.zeros_like(context), context])
        mask = None if mask is None else torch.cat([mask, mask])
    made: Any = context
    if samples > 0 and can_prepare(model):
        made, mask = model.prepare_condition(context, mask), None
    if whole != BOTH:
        return {whole: (made, mask)}

    def rows(start: int) -> tuple[Any, Tensor | None]:
        stop = start + samples
        part = made.rows(start, stop) if isinstance(made, PreparedCondition) else made[start:stop]
        return part, None if mask is None else mask[start:stop]

    return {BOTH: (made, mask), NULL: rows(0), CONDITIONAL: rows(samples)}


def can_prepare(model: Any) -> bool:
    """Not every model that is called like ours can, and a sharded one has no whole weights outside its forward."""
    return hasattr(model, "prepare_condition") and all(type(p) is torch.nn.Parameter for p in model.parameters())


def _limits(
    model: Any, conditions: dict[str, tuple[Any, Tensor | None]], dtype: torch.dtype, budget: int
) -> dict[str, int]:
    """How many calls of each pass have modulations of `budget` bytes."""
    if not hasattr(model, "prepare_modulations"):
        return dict.fromkeys(conditions, 0)
    return {
        passed: budget // step_bytes(model.config, made.pooled.shape[0], dtype)
        if isinstance(made, PreparedCondition)
        else 0
        for passed, (made, _) in conditions.items()
    }
