"""What watches a run, put together: trackers, the profiler, the word about the linear line, and what a sample costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blip3o_fast.models.device_flops import peak_of
from blip3o_fast.models.flops import model_flops
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training.arguments import TrainSettings, steps_named
from blip3o_fast.training.clock import StepCost
from blip3o_fast.training.linear_line import LinearLine
from blip3o_fast.training.prepare import Data
from blip3o_fast.training.profiling import ProfileSteps
from blip3o_fast.training.resume import say
from blip3o_fast.training.tracking import trackers


def watchers(settings: TrainSettings, resume: Path | None, *, evaluates: bool) -> list[Any]:
    """The Trainer's callbacks that the settings ask for; ValueError for a tracker that cannot run."""
    callbacks, reason = trackers(settings, resume)
    if reason:
        say(reason)
    callbacks.append(LinearLine(evaluates))
    if (profiled := steps_named(settings.profile_steps)) is not None:
        callbacks.append(ProfileSteps(*profiled, Path(settings.output_dir)))
    return callbacks


def step_cost(settings: TrainSettings, data: Data, model: BLIP3oDiT, device: torch.device) -> StepCost:
    """Tokens, FLOPs and the device's peak in the dtype of the products."""
    dtype = (
        torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 and device.type == "cuda" else torch.float32
    )
    flops = model_flops(model.config, 1, data.conditions.shape[1], "both")
    peak = peak_of(device, dtype)
    told = f"{peak.flops / 1e12:.3g} TFLOP/s per process ({peak.source}); a sample is {flops / 1e9:.3g} GFLOP"
    say(f"MFU         of {told}")
    return StepCost(data.targets.shape[1], flops, peak.flops)
