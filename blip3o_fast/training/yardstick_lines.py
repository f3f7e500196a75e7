"""What the losses of a run are compared with: the best linear predictions on its own pictures."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.yardstick import Yardstick, yardstick
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.prepare import Data
from blip3o_fast.training.validation import MAX_PICTURES, evenly_spaced, levels

# Pictures that the yardstick is computed from: seconds.
YARDSTICK_PICTURES = 512
# Its ridge, as a share of the condition's mean variance: tried in this order while the held-out loss falls.
_RIDGES = (1.0, 0.1, 1e-3)
# Half the width of the bucket around each evaluation level: the yardstick averages over buckets.
_HALF_BUCKET = 1e-6


def yardstick_for(settings: TrainSettings, data: Data, config: BLIP3oConfig) -> dict[str, Any]:
    """The loss's yardstick, judged on held-out pictures where there are some.

    Returns ``Yardstick.as_dict()`` with three more keys: ``linear_at_levels``, the best linear velocity's loss at each
    evaluation level; ``training``, what the best linear prediction would reach as *training* loss (on the training
    pictures, with dropped conditions among them), None for epsilon; ``seconds``.
    """
    begun = time.perf_counter()
    some = evenly_spaced(len(data.conditions), YARDSTICK_PICTURES)
    fitted = data.conditions[some], data.targets[some]
    held_out = None
    if len(data.held_out_conditions):
        chosen = evenly_spaced(len(data.held_out_conditions), MAX_PICTURES)
        held_out = data.held_out_conditions[chosen], data.held_out_targets[chosen]
    edges = tuple(edge for level in levels() for edge in (level - _HALF_BUCKET, level + _HALF_BUCKET))

    def judged_on(pictures: tuple[Tensor, Tensor] | None, ridge: float) -> Yardstick:
        return yardstick(
            *fitted,
            path=FlowPath(config.schedule, config.sigma_min, config.sigma_max),
            held_out=pictures,
            ridge=ridge,
            sigma_edges=edges,
            distribution=settings.timestep_sampling,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            shift=settings.timestep_shift,
        )

    if held_out is None:
        lines = in_sample = judged_on(None, _RIDGES[1])
    else:
        # The tokens of a picture resemble each other, so there is much less data than there are tokens and a fit with
        # too little ridge is a line that anything beats. The strongest line is the one to compare with.
        lines = judged_on(held_out, _RIDGES[0])
        for ridge in _RIDGES[1:]:
            other = judged_on(held_out, ridge)
            if other.linear_conditional.overall >= lines.linear_conditional.overall:
                break
            lines = other
        in_sample = judged_on(None, lines.ridge)
    out = lines.as_dict()
    # Every second bucket is the tiny one around a level.
    out["linear_at_levels"] = list(lines.linear_conditional.per_bucket[::2])
    dropped = settings.condition_dropout
    mixed = (1 - dropped) * in_sample.linear_conditional.overall + dropped * in_sample.linear_unconditional.overall
    out["training"] = mixed if config.prediction_type == "v_prediction" else None
    out["seconds"] = round(time.perf_counter() - begun, 2)
    return out
