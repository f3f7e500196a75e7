"""The arguments of a sampling run, and what is refused with a message that says what was given and what is allowed."""

import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from blip3o_fast.flow.path import MAX_SIGMA_EPSILON
from blip3o_fast.flow.solvers import check_sigmas, check_solver, sigma_grid

_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()
_LISTED = 10


@dataclass(frozen=True)
class Arguments:
    """Of `sample`, which documents them, beside the model and the condition."""

    num_steps: int = 30
    guidance_scale: float = 3.0
    solver: str = "euler"
    encoder_mask: Tensor | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    num_samples_per_condition: int = 1
    noise: Tensor | None = None
    return_intermediates: bool = False
    progress: bool = False
    sigmas: Tensor | None = None
    truncate_time: bool = False
    guidance_start: float = 1.0
    guidance_end: float = 0.0

    def check(self) -> None:
        """What can be said without a model."""
        check_solver(self.solver)
        check_count("num_samples_per_condition", self.num_samples_per_condition)
        scale, start, end = self.guidance_scale, self.guidance_start, self.guidance_end
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, got {scale!r}")
        for name, value in (("guidance_start", start), ("guidance_end", end)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a noise level between 0 and 1, got {value!r}")
        if start < end:
            raise ValueError(
                f"guidance_start must be at least guidance_end, as noise levels fall: got {start!r} and {end!r}"
            )


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_condition(condition: Any, width: int, mask: Any) -> None:
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


def starting_noise(arguments: Arguments, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """[N * n, T, C], as given or drawn."""
    noise, generator = arguments.noise, arguments.generator
    if noise is None:
        return _drawn(generator, shape, device)
    if generator is not None:
        raise ValueError("noise and generator exclude each other: the generator would have nothing to draw")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or tuple(noise.shape) != shape:
        given = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise must be a floating tensor of shape (N * n, T, C) = {shape}, got {given}")
    if noise.device != device:
        raise ValueError(f"noise must be on the model's device {device}, got {noise.device}")
    check_given("noise", noise)
    return noise


def _drawn(generator: Any, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        drawn_on = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=drawn_on, dtype=torch.float32).to(device)
    if not isinstance(generator, list | tuple):
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    strange = [type(one).__name__ for one in generator if not isinstance(one, torch.Generator)]
    if strange:
        raise ValueError(f"generator must be a torch.Generator or a list of them, got a list with {strange[0]}")
    if len(generator) != shape[0]:
        raise ValueError(f"generator must have one element per result row = {shape[0]}, got {len(generator)}")
    rows = [torch.randn(shape[1:], generator=g, device=g.device, dtype=torch.float32).to(device) for g in generator]
    return torch.stack(rows) if rows else torch.empty(shape, device=device)


def noise_levels(arguments: Arguments, prediction_type: str) -> Tensor:
    """[num_steps + 1], falling to 0, on the device where they were given."""
    start = MAX_SIGMA_EPSILON if prediction_type == "epsilon" else 1.0
    sigmas, num_steps = arguments.sigmas, arguments.num_steps
    if sigmas is None:
        return sigma_grid(num_steps, start=start)
    check_count("num_steps", num_steps)
    check_sigmas(sigmas)
    if sigmas.shape[0] != num_steps + 1:
        raise ValueError(f"sigmas must have num_steps + 1 = {num_steps + 1} elements, got {sigmas.shape[0]}")
    first, last = float(sigmas[0]), float(sigmas[-1])
    if not (last == 0.0 < first <= start):
        raise ValueError(f"sigmas must fall from at most {start} ({prediction_type}) to 0, got {first} to {last}")
    return sigmas


def _broken_rows(x: Tensor) -> list[int]:
    """The samples of x with a NaN or an infinity. Without values (meta, fake tensors) there is nothing to find."""
    if x.is_meta or isinstance(x, FakeTensor) or bool(torch.isfinite(x).all()):
        return []
    return (~torch.isfinite(x)).flatten(1).any(1).nonzero()[:, 0].tolist()


def _listed(rows: Sequence[int]) -> str:
    """1, 4, 7; the first ten of a long list."""
    some = ", ".join(map(str, rows[:_LISTED]))
    return some if len(rows) <= _LISTED else f"{some} and {len(rows) - _LISTED} more"


def check_given(name: str, tensor: Tensor) -> None:
    """That an argument [samples, ...] is finite, before any work: one reduction and one look at its result."""
    if rows := _broken_rows(tensor):
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in {len(rows)} of {tensor.shape[0]} samples: {_listed(rows)}"
        )


def check_result(x: Tensor) -> None:
    """That the result [samples, ...] of a run is finite; what was given has been looked at before."""
    if rows := _broken_rows(x):
        raise FloatingPointError(
            f"sampling gave NaN or infinity in {len(rows)} of {x.shape[0]} samples ({_listed(rows)}) although "
            "condition and noise are finite: the weights may be broken or untrained, guidance_scale too large, or "
            "float16 too narrow (try bfloat16)"
        )


def warn_of_untrained_null(model: Any, guidance_scale: float) -> None:
    """Once per model: guidance away from a null condition that the network never saw in training."""
    if getattr(model.config, "condition_dropout", None) != 0 or guidance_scale in (0, 1):
        return
    # Prepared models and those of a stock network are made anew; the layers in them are the same ones.
    owner = getattr(model, "model", model)
    owner = getattr(owner, "patch_embedder", owner)
    owner = getattr(owner, "proj", owner)
    if owner in _WARNED:
        return
    _WARNED.add(owner)
    warnings.warn(
        f"guidance_scale {guidance_scale:g} moves away from what the network predicts without a condition, and this "
        "one was trained with condition_dropout 0, so it never learned that: sample with guidance_scale=1, or train "
        "with --condition_dropout 0.1",
        UserWarning,
        stacklevel=2,
    )
