"""The training loss of a network: noise level, noise, dropped condition, forward pass, error.

Everything random is a function of (seed, global sample index), so a step gives the same loss however the samples are
spread over ranks, accumulation steps and batches.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.timesteps import (
    check_distribution,
    check_time_convention,
    draw_sigma,
    drop_condition,
    network_time,
)
from blip3o_fast.flow.weighting import WEIGHTINGS, loss_weight
from blip3o_fast.ops._flow_schedule import check_prediction_type
from blip3o_fast.ops._philox import normal_noise_at, seed_tensor


class FlowSettings(Protocol):
    """The fields of `BLIP3oConfig` that say what a network's input and output mean."""

    @property
    def time_convention(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...


def velocity_sign(time_convention: str, prediction_type: str) -> float:
    """+1 where the network's output is the target itself, -1 where it is its negative.

    A "lumina" network predicts data - noise, the derivative along its own time 1 - sigma. Predicted noise has no
    direction of time in it.
    """
    return -1.0 if time_convention == "lumina" and prediction_type == "v_prediction" else 1.0


def network_output(
    model: Any,
    x_t: Tensor,
    sigma: Tensor,
    encoder_hidden_states: Any,
    encoder_mask: Tensor | None = None,
    *,
    time_convention: str = "blip3o",
    truncate_time: bool = False,
    **options: Any,
) -> Tensor:
    """What the network says about x_t, before any sign or prediction type.

    encoder_hidden_states: [B, L, E], or what the model itself prepared of it. options: passed on to the model.
    sigma: fp32 or fp64, [B] or 0-d. The second half of a `learn_sigma` network's channels (a variance that flow
    matching does not use) is cut off.
    """
    timestep = network_time(sigma, time_convention, truncate=truncate_time).expand(x_t.shape[0])
    if encoder_mask is not None:
        options["encoder_mask"] = encoder_mask
    output = model(x_t, timestep, encoder_hidden_states, **options)
    channel_dim = 1 if x_t.dim() == 4 else -1
    channels = x_t.shape[channel_dim]
    if output.shape[channel_dim] == 2 * channels:
        output = output.narrow(channel_dim, 0, channels)
    if output.shape != x_t.shape:
        raise ValueError(f"model must return x_t's shape {tuple(x_t.shape)}, got {tuple(output.shape)}")
    return output


def velocity_from_model(
    model: Any,
    x_t: Tensor,
    sigma: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor | None,
    config: FlowSettings,
) -> Tensor:
    """The network's velocity `d x / d sigma` at x_t, whatever its conventions are.

    x_t: [B, T, C] (or [B, C, H, W]) in the network's space; sigma: fp32, [B] or 0-d; encoder_hidden_states: [B, L, E];
    encoder_mask: bool [B, L] or None; config: anything with the fields of `FlowSettings`. Returns x_t's shape in the
    network's output dtype.
    """
    output = network_output(
        model, x_t, sigma, encoder_hidden_states, encoder_mask, time_convention=config.time_convention
    )
    if config.prediction_type == "epsilon":
        path = FlowPath(config.schedule, config.sigma_min, config.sigma_max)
        return path.velocity_from_epsilon(x_t, output, sigma)
    return output if velocity_sign(config.time_convention, config.prediction_type) > 0 else -output


@dataclass(frozen=True)
class FlowMatchingLoss:
    """`loss(model, data, condition, seed=..., sample_index=...)` -> `(loss, metrics)`.

    path, prediction_type, time_convention: must be those of the network's configuration (`from_config` takes them).
    distribution, logit_mean, logit_std, shift: of the noise levels, see `flow.timesteps.sigma_quantile`.
    condition_dropout: probability with which a training sample sees the null condition (zeros); guidance needs it.
    regularization_weight: see `ops.flow_matching_loss`.
    weighting: how much each noise level counts (`flow.weighting`). It scales the gradient of each sample; the loss and
    metrics that are returned stay those of the plain error, comparable whatever the weighting.
    Raises ValueError naming the setting, what was given and what is allowed.
    """

    path: FlowPath = FlowPath()
    prediction_type: str = "v_prediction"
    time_convention: str = "blip3o"
    distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    condition_dropout: float = 0.1
    regularization_weight: float = 0.0
    weighting: str = "none"

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        check_time_convention(self.time_convention)
        check_distribution(self.distribution, self.logit_mean, self.logit_std, self.shift)
        if not 0.0 <= self.condition_dropout <= 1.0:
            raise ValueError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}")
        if not 0.0 <= self.regularization_weight < float("inf"):
            raise ValueError(f"regularization_weight must be a finite number >= 0, got {self.regularization_weight}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}")
        if self.weighting != "none" and self.regularization_weight:
            raise ValueError("weighting would scale the gradient of the regularization too: give one of them")

    @classmethod
    def from_config(cls, config: FlowSettings, **settings: Any) -> "FlowMatchingLoss":
        """The loss that fits a network with this configuration; `settings` are the other fields."""
        return cls(
            path=FlowPath(config.schedule, config.sigma_min, config.sigma_max),
            prediction_type=config.prediction_type,
            time_convention=config.time_convention,
            **settings,
        )

    def __call__(
        self,
        model: Any,
        data: Tensor,
        encoder_hidden_states: Tensor,
        *,
        seed: int,
        sample_index: Tensor | int,
        encoder_mask: Tensor | None = None,
        sigma: Tensor | None = None,
        condition_dropout: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        model: called as `model(x_t [B, T, C], timestep [B], encoder_hidden_states, encoder_mask=...)`.
        data: [B, T, C] and encoder_hidden_states: [B, L, E], both as the network sees them (normalised).
        seed: int64. sample_index: the samples' numbers in the whole run, int64 [B]; or the first number alone where
        they are consecutive (the noise is then made inside the ops).
        encoder_mask: bool [B, L], True = attend.
        sigma: fp32 [B], to fix the noise levels (evaluation); drawn otherwise.
        condition_dropout: overrides the setting; None means the setting while `model.training`, else 0.
        Returns the 0-d loss and the metrics of `ops.flow_matching_loss`. Nothing waits for the device.
        """
        batch, device = data.shape[0], data.device
        index, first = _sample_index(sample_index, batch, device)
        if sigma is None:
            sigma = draw_sigma(
                seed,
                index,
                distribution=self.distribution,
                logit_mean=self.logit_mean,
                logit_std=self.logit_std,
                shift=self.shift,
            ).to(accumulation_of(data))
        if condition_dropout is None:
            condition_dropout = self.condition_dropout if getattr(model, "training", False) else 0.0
        encoder_hidden_states = drop_condition(encoder_hidden_states, condition_dropout, seed, index)

        noise, op_seed = None, None
        if first is None:
            noise = normal_noise_at(seed, index, data.shape[1:]).to(accumulation_of(data))
        else:
            op_seed = seed_tensor(seed, first, device)
        path: dict[str, Any] = {
            "noise": noise,
            "seed": op_seed,
            "sigma_min": self.path.sigma_min,
            "sigma_max": self.path.sigma_max,
            "schedule": self.path.schedule,
        }
        x_t = ops.flow_interpolate(data, sigma, **path)
        output = network_output(
            model, x_t, sigma, encoder_hidden_states, encoder_mask, time_convention=self.time_convention
        )
        if velocity_sign(self.time_convention, self.prediction_type) < 0:
            output = -output
        if self.weighting != "none" and output.requires_grad:
            # The gradient of a weighted mean of squares is the plain one, times each sample's weight.
            weight = loss_weight(sigma, self.weighting).reshape(-1, *[1] * (output.dim() - 1))
            # Multiplied in the weight's fp32: fp16 ends at 65504, sigma_sqrt's weights at 1e6.
            output.register_hook(lambda gradient: (gradient * weight).to(gradient.dtype))
        return ops.flow_matching_loss(
            output,
            data,
            sigma,
            prediction_type=self.prediction_type,
            regularization_weight=self.regularization_weight,
            **path,
        )


def accumulation_of(data: Tensor) -> torch.dtype:
    """dtype of the noise levels that go with data."""
    return torch.float64 if data.dtype == torch.float64 else torch.float32


def _sample_index(sample_index: Tensor | int, batch: int, device: torch.device) -> tuple[Tensor, int | None]:
    """The indices [B] on the device, and the first of them where they are known to be consecutive."""
    if isinstance(sample_index, int):
        return torch.arange(sample_index, sample_index + batch, device=device), sample_index
    if sample_index.shape != (batch,) or sample_index.dtype != torch.int64:
        raise ValueError(
            f"sample_index must be an integer or int64 of shape (B,) = ({batch},), "
            f"got {sample_index.dtype} of shape {tuple(sample_index.shape)}"
        )
    # Only on the CPU: looking at an accelerator's tensor would make the host wait for it.
    if sample_index.device.type == "cpu" and batch > 0:
        first = int(sample_index[0])
        if torch.equal(sample_index, torch.arange(first, first + batch)):
            return sample_index.to(device), first
    return sample_index.to(device), None
