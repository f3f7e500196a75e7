"""Sampling: from a condition and noise to features, by integrating the network's velocity from sigma = 1 to 0.

    condition [N, L, E] --normalise--> network --velocity, guided--> ODE solver --undo normalisation--> [N * n, T, C]

The conventions are BLIP3-o's (its `sample_images`): 30 Euler steps over linear noise levels, guidance 3.0, zeros as
the null condition, the unconditional half of the batch first. What a run does is in `sampling.run`.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from blip3o_fast.models.adopt import as_ours
from blip3o_fast.sampling.arguments import Arguments
from blip3o_fast.sampling.run import draw


@overload
def sample(
    model: Any, encoder_hidden_states: Tensor, *, num_steps: int = 30, guidance_scale: float = 3.0,
    solver: str = "euler", encoder_mask: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None, num_samples_per_condition: int = 1,
    noise: Tensor | None = None, return_intermediates: Literal[False] = False, progress: bool = False,
    sigmas: Tensor | None = None, truncate_time: bool = False, guidance_start: float = 1.0, guidance_end: float = 0.0,
) -> Tensor: ...  # fmt: skip
@overload
def sample(
    model: Any, encoder_hidden_states: Tensor, *, num_steps: int = 30, guidance_scale: float = 3.0,
    solver: str = "euler", encoder_mask: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None, num_samples_per_condition: int = 1,
    noise: Tensor | None = None, return_intermediates: Literal[True], progress: bool = False,
    sigmas: Tensor | None = None, truncate_time: bool = False, guidance_start: float = 1.0, guidance_end: float = 0.0,
) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip
def sample(
    model: Any,
    encoder_hidden_states: Tensor,
    *,
    num_steps: int = 30,
    guidance_scale: float = 3.0,
    solver: str = "euler",
    encoder_mask: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    num_samples_per_condition: int = 1,
    noise: Tensor | None = None,
    return_intermediates: bool = False,
    progress: bool = False,
    sigmas: Tensor | None = None,
    truncate_time: bool = False,
    guidance_start: float = 1.0,
    guidance_end: float = 0.0,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Draw features for each condition.

    model: `BLIP3oDiT`, or any module called the same way with a `config` of the same fields. Its `normalizer`, where it
        has one, is applied to the condition and undone on the result. Put it in eval mode yourself. To sample often,
        make a `sampling.Sampler` of it. Also diffusers' `LuminaNextDiT2DModel`, a pipeline with one, and BLIP3-o's
        `NextDiTCrossAttn`, stock or fused: see `BLIP3oDiT.from_stock`. (The null condition is zeros there too.)
    encoder_hidden_states: [N, L, E], floating, as the encoder gave it (not normalised), on the model's device.
    num_steps: ODE steps; one or two network calls each, see `flow.solvers`.
    guidance_scale: classifier-free guidance w, v = v_null + w (v_cond - v_null). 1 and 0 need one forward pass a step
        (the condition alone, the null condition alone), every other number two, run as one batch.
    solver: "euler", "midpoint", "heun" or "ab2".
    encoder_mask: bool [N, L], True = attend; None attends to everything.
    generator: for the noise; drawn on the generator's device in fp32, so that a CPU generator gives one result on every
        device. None is PyTorch's global one. A list of N * n draws each row of the result from its own, so that the
        row's noise is the same bit for bit whatever the batch around it.
    num_samples_per_condition: n; the result's rows i * n to i * n + n - 1 belong to condition i.
    noise: [N * n, T, C'], standard normal, to start from instead; C' is the network's number of channels.
    return_intermediates: return `(result, states)`: the num_steps states after each step, the last one the result.
    progress: a progress bar on stderr where that is a terminal.
    sigmas: fp32 or fp64 [num_steps + 1], noise levels falling to 0, instead of `sigma_grid(num_steps)`.
    truncate_time: feed whole numbers as time, as BLIP3-o's released sampler does (966 instead of 966.67).
    guidance_start, guidance_end: guide only where guidance_end <= sigma <= guidance_start; elsewhere the condition
        alone is enough, for half the work. By default everywhere.

    What depends on the condition alone (its projection, every block's cross-attention keys and values) is made once
    and kept for the run: layers * 3 * L * key channels per sample, twice with guidance. What depends on the time too
    (every block's modulation) is made for many steps at once, in at most 256 MB.

    What `blip3o-fast tune-sampler` found for a model is `**SamplerSettings.read(folder).arguments()`, see
    `sampling.settings`; nothing reads it here unasked.

    Returns [N * n, T, C], fp32 (fp64 for an fp64 network). The state is kept in that dtype; the network gets its own.
    Raises ValueError naming the argument, what was given and what is allowed; FloatingPointError where the result is
    not finite.
    """
    arguments = Arguments(
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        solver=solver,
        encoder_mask=encoder_mask,
        generator=generator,
        num_samples_per_condition=num_samples_per_condition,
        noise=noise,
        return_intermediates=return_intermediates,
        progress=progress,
        sigmas=sigmas,
        truncate_time=truncate_time,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
    )
    result, states = draw(as_ours(model), encoder_hidden_states, arguments)
    return (result, states) if return_intermediates else result
