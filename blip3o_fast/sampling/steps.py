"""One step of a solver as a function of tensors alone, so that a CUDA graph can take the place of it.

A network call needs the condition (`conditional`), no condition (`null`) or, for classifier-free guidance, both as one
batch with the null half first (`both`). Nothing here looks at a value on the host: every number that changes from step
to step (the noise level, the step's size) is a 0-d tensor on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.loss import network_output
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.models.condition import PreparedCondition
from blip3o_fast.models.step_modulations import StepModulations

NULL, CONDITIONAL, BOTH = "null", "conditional", "both"

Slope = tuple[Tensor, Tensor | None]
"""What the network says (with the condition, without it); None where one pass was enough."""

Conditions = dict[str, tuple[Any, Tensor | None]]
"""By pass, the condition and its mask: prepared where the model can, and then without a mask of its own."""


@dataclass(frozen=True)
class Rules:
    """How steps are made: nothing of it is a tensor, and nothing changes during a run.

    dtype: the network's.
    """

    model: Any
    path: FlowPath
    solver: str
    dtype: torch.dtype
    truncate_time: bool


@dataclass(frozen=True, eq=False)
class Kept:
    """What all steps of a run read. guidance: 0-d."""

    guidance: Tensor
    conditions: Conditions


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the network: which pass it is, its noise level (0-d), its modulations where they were made before."""

    passed: str
    sigma: Tensor
    modulations: StepModulations | None


@dataclass(frozen=True, eq=False)
class Moment:
    """What one step reads of its own.

    x: [M, T, C'], fp32 or fp64. h: 0-d, the step with the sign of the network's convention. calls: of the network, one
    or two. previous: the last step's slope and extrapolation: its weight, 0-d, in an "ab2" step that has one before it.
    """

    x: Tensor
    h: Tensor
    calls: tuple[Call, ...]
    previous: Slope | None = None
    extrapolation: Tensor | None = None


def take_step(rules: Rules, kept: Kept, moment: Moment) -> tuple[Tensor, Slope | None]:
    """(x after the step, for "ab2" its slope). The solvers of `flow.solvers` as sums of guided steps of `ode_step`.

    A step of several slopes is a sum of steps, rounded to x's dtype (fp32 or fp64) after each.
    """

    def move(state: Tensor, slope: Slope, h: Tensor) -> Tensor:
        conditional, null = slope
        return ops.ode_step(state, conditional, null, None if null is None else kept.guidance, h)

    x, h, calls = moment.x, moment.h, moment.calls
    slope = slope_at(rules, kept, x, calls[0])
    if rules.solver == "midpoint":
        half_way = move(x, slope, h / 2)
        return move(x, slope_at(rules, kept, half_way, calls[1]), h), None
    if rules.solver == "heun":
        second = slope_at(rules, kept, move(x, slope, h), calls[1])
        return move(move(x, slope, h / 2), second, h / 2), None
    if moment.previous is not None and moment.extrapolation is not None:
        x = move(move(x, slope, h + moment.extrapolation), moment.previous, -moment.extrapolation)
    else:
        x = move(x, slope, h)
    return x, slope if rules.solver == "ab2" else None


def slope_at(rules: Rules, kept: Kept, x: Tensor, call: Call) -> Slope:
    """What the network says at x."""
    condition, mask = kept.conditions[call.passed]
    both, config = call.passed == BOTH, rules.model.config
    x_t = x.to(rules.dtype)
    output = network_output(
        rules.model,
        torch.cat([x_t, x_t]) if both else x_t,
        call.sigma,
        condition,
        mask,
        time_convention=config.time_convention,
        truncate_time=rules.truncate_time,
        **({} if call.modulations is None else {"modulations": call.modulations}),
    )
    if config.prediction_type == "epsilon":
        # Both halves have their own x_t of the same values, so the conversion commutes with the guidance.
        output = rules.path.velocity_from_epsilon(torch.cat([x, x]) if both else x, output, call.sigma)
    if not both:
        return output, None
    null, conditional = output.chunk(2)
    return conditional, null


def by_pass(whole: str, made: Any, mask: Tensor | None) -> Conditions:
    """The conditions of each pass as views of the whole run's: [2 M, L, E], the null half first, where that is BOTH."""
    if whole != BOTH:
        return {whole: (made, mask)}
    samples = (made.context if isinstance(made, PreparedCondition) else made).shape[0] // 2

    def rows(start: int) -> tuple[Any, Tensor | None]:
        stop = start + samples
        part = made.rows(start, stop) if isinstance(made, PreparedCondition) else made[start:stop]
        return part, None if mask is None else mask[start:stop]

    return {BOTH: (made, mask), NULL: rows(0), CONDITIONAL: rows(samples)}
