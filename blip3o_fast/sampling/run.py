"""One sampling run: what does not change from step to step is made first, then the loop over the noise levels.

Which of its passes a network call is (`sampling.steps`) is decided here, by the guidance scale and its interval.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.flow.loss import velocity_sign
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
from blip3o_fast.sampling.graphs import Graphs, mapped
from blip3o_fast.sampling.progress import bar
from blip3o_fast.sampling.steps import (
    BOTH,
    CONDITIONAL,
    NULL,
    Call,
    Conditions,
    Kept,
    Moment,
    Rules,
    Slope,
    by_pass,
    take_step,
)

MODULATION_BYTES = 256 << 20


def draw(
    model: Any,
    encoder_hidden_states: Tensor,
    arguments: Arguments,
    modulation_bytes: int = MODULATION_BYTES,
    graphs: Graphs | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The features [N * n, T, C] and, where they are wanted, the states after each step.

    modulation_bytes: for modulations made before their steps; where those of one step need more, each step makes its
    own. graphs: of the model's steps, which take the place of the steps where they can.
    """
    with torch.no_grad():
        run = _prepare(model, encoder_hidden_states, arguments, modulation_bytes)
        states: list[Tensor] = []
        with bar(arguments.progress, total=run.steps.shape[0], desc="sampling", unit="step", leave=False) as shown:

            def keep(state: Tensor) -> None:
                shown.update()
                if arguments.return_intermediates:
                    states.append(state)

            x = run.start
            if x.shape[0] > 0:
                x = run.solve(x, keep, graphs)
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

    rules: Rules
    kept: Kept
    start: Tensor  # [M, T, C'], fp32 or fp64
    steps: Tensor  # [S], with the sign of the network's convention
    levels: Tensor  # [V], of each network call
    passes: list[str]  # [V]: NULL, CONDITIONAL or BOTH
    modulations: "Modulations"

    def solve(self, x: Tensor, keep: Callable[[Tensor], None], graphs: Graphs | None = None) -> Tensor:
        step = None if graphs is None else graphs.stepper(self.rules, self.kept, x)
        if step is None:
            step = partial(take_step, self.rules, self.kept)
        slope: Slope | None = None
        for i in range(self.steps.shape[0]):
            x, slope = step(self.moment(x, i, slope))
            keep(x)
        return x

    def moment(self, x: Tensor, i: int, previous: Slope | None) -> Moment:
        """What step i reads. previous: the slope of the step before it, in a solver that has one."""
        h, each = self.steps[i], self.levels.shape[0] // self.steps.shape[0]
        numbers = range(each * i, each * (i + 1))
        made = self.modulations.of(numbers)
        calls = tuple(Call(self.passes[n], self.levels[n], m) for n, m in zip(numbers, made, strict=True))
        return Moment(x, h, calls, previous, None if previous is None else h * h / (2 * self.steps[i - 1]))


@dataclass
class Modulations:
    """The modulations of every network call, made for a chunk of calls when its first one comes.

    passes: [V], by call. times: [V], what the network is fed. limits: by pass, how many fit the budget; 0 where each
    call is to make its own.
    """

    model: Any
    conditions: Conditions
    passes: list[str]
    times: Tensor
    limits: dict[str, int]
    first: int = 0
    made: list[StepModulations] = field(default_factory=list)

    def of(self, calls: range) -> list[StepModulations | None]:
        """Those of one step's calls."""
        made: list[StepModulations | None] = []
        for call in calls:
            if made and not self._has(call):
                # A chunk ends within the step: what is still needed of it, one call's, is copied, so that the rest can
                # be freed.
                made = [mapped(one, torch.clone) for one in made]
            made.append(self._of(call))
        return made

    def _has(self, call: int) -> bool:
        return self.first <= call < self.first + len(self.made)

    def _of(self, call: int) -> StepModulations | None:
        passed = self.passes[call]
        if self.limits[passed] == 0:
            return None
        if not self._has(call):
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
        Rules(model, path, arguments.solver, dtype, arguments.truncate_time),
        Kept(torch.full((), arguments.guidance_scale, dtype=wide, device=device), conditions),
        path.noise_scale(sigmas[0].to(device, wide)) * start,
        sigmas.to(device, wide).diff() * velocity_sign(config.time_convention, config.prediction_type),
        levels.to(device),
        passes,
        Modulations(model, conditions, passes, times.to(device), _limits(model, conditions, dtype, modulation_bytes)),
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


def _conditions(model: Any, context: Tensor, mask: Tensor | None, needed: set[str]) -> Conditions:
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
    return by_pass(whole, made, mask)


def can_prepare(model: Any) -> bool:
    """Not every model that is called like ours can, and a sharded one has no whole weights outside its forward."""
    return hasattr(model, "prepare_condition") and all(type(p) is torch.nn.Parameter for p in model.parameters())


def _limits(model: Any, conditions: Conditions, dtype: torch.dtype, budget: int) -> dict[str, int]:
    """How many calls of each pass have modulations of `budget` bytes."""
    if not hasattr(model, "prepare_modulations"):
        return dict.fromkeys(conditions, 0)
    return {
        passed: budget // step_bytes(model.config, made.pooled.shape[0], dtype)
        if isinstance(made, PreparedCondition)
        else 0
        for passed, (made, _) in conditions.items()
    }
