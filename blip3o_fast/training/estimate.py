"""What a training run needs, before its network is built: memory, disk, reading, and the preset that would fit."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from blip3o_fast.models.config import PRESETS, BLIP3oConfig
from blip3o_fast.models.memory import memory_bytes
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.free_memory import available_memory
from blip3o_fast.training.prepare import Data, config_for

# What the libraries that are still to be imported take, and their workspaces.
LIBRARIES_BYTES = 1 << 29


@dataclass(frozen=True)
class Needs:
    """Bytes of one process.

    shared: gradients that take the place of activations as the backward uses these up. data: features in the host's
    memory, which are there before the network is.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    shared: int
    data: int

    def on(self, device: torch.device) -> int:
        """What the device's memory must hold beside what is there already."""
        network = self.weights + self.gradients + self.optimizer + self.average + self.activations - self.shared
        return network + (LIBRARIES_BYTES if device.type == "cpu" else 0)

    @property
    def checkpoint(self) -> int:
        """A checkpoint on disk: fp32 weights, AdamW's two moments, the average."""
        return self.weights + self.optimizer + self.average


def needs(settings: TrainSettings, config: BLIP3oConfig, data_bytes: int, context: int, world: int = 1) -> Needs:
    """The estimate for a network of this configuration, in fp32 weights with AdamW."""
    with torch.device("meta"):
        network = BLIP3oDiT(config)
    if settings.gradient_checkpointing:
        network.gradient_checkpointing_enable({"mode": settings.checkpointing_mode})
    count = sum(parameter.numel() for parameter in network.parameters())
    weights, half = 4 * count, settings.bf16 or settings.fp16
    size: dict[str, Any] = {"training": True, "dtype": torch.bfloat16 if half else torch.float32, "context": context}
    activations = memory_bytes(network, settings.batch_size, **size) - memory_bytes(network, 0, **size)
    # x_t, the noise, the network's output and its gradient, in fp32; under autocast the weights' casts until the end.
    activations += 16 * settings.batch_size * config.num_tokens * config.in_channels + (2 * count if half else 0)
    activations = int(1.1 * activations)  # temporaries of operations, the allocator's holes
    # Gradients that are there before the backward begins share nothing, nor where whole blocks are computed again.
    blockwise = settings.gradient_checkpointing and settings.checkpointing_mode == "block"
    fresh = settings.gradient_accumulation_steps == 1 and world == 1 and not blockwise
    shared = min(activations, weights) if fresh else 0
    average = weights if settings.ema_decay else 0
    return Needs(count, weights, weights, 2 * weights, average, activations, shared, data_bytes)


def needs_of(settings: TrainSettings, data: Data, config: BLIP3oConfig, world: int = 1) -> Needs:
    held = (data.conditions, data.targets, data.held_out_conditions, data.held_out_targets)
    # what is streamed from its folder takes none
    features = sum(side.numel() * side.element_size() for side in held if isinstance(side, torch.Tensor))
    return needs(settings, config, features, data.conditions.shape[1], world)


def check_memory(
    settings: TrainSettings, data: Data, device: torch.device, config: BLIP3oConfig, world: int = 1
) -> None:
    """ValueError where the estimate is above what there is, naming the preset that fits; `--force` goes on anyway."""
    has, wants = available_memory(device), needs_of(settings, data, config, world)
    if settings.force or has is None or wants.on(device) <= has:
        return
    where = "GPU" if device.type == "cuda" else "machine"
    fits = _preset_that_fits(settings, data, device, has, world)
    advice = f"--preset {fits} would fit" if fits else "no preset fits with this --batch_size; take a smaller one"
    raise ValueError(
        f"this run needs about {in_words(wants.on(device))} and this {where} has {in_words(has)} free "
        f"(weights, gradients, AdamW{', average' if wants.average else ''} "
        f"{in_words(wants.weights + wants.gradients + wants.optimizer + wants.average)}, activations "
        f"{in_words(wants.activations)})\n"
        f"hint: {advice}; --force begins anyway"
    )


def _preset_that_fits(settings: TrainSettings, data: Data, device: torch.device, has: int, world: int) -> str | None:
    for name in sorted(PRESETS, key=_size, reverse=True):
        smaller = copy.copy(settings)
        for field in ("model_dim", "num_layers", "num_heads", "num_kv_heads", "multiple_of", "ffn_dim_multiplier"):
            setattr(smaller, field, None)
        smaller.preset = name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that is only thought of
            config = config_for(smaller, data)
        if name != "tiny" and needs_of(smaller, data, config, world).on(device) <= has:
            return name
    return None


def _size(preset: str) -> int:
    config = BLIP3oConfig.preset(preset)
    return config.num_layers * config.hidden_size**2


def in_words(amount: int) -> str:
    return f"{amount / 2**30:.1f} GB" if amount >= 1 << 30 else f"{amount / 2**20:.0f} MB"


def plan(
    settings: TrainSettings,
    data: Data,
    config: BLIP3oConfig,
    device: torch.device,
    steps: int,
    world: int,
    step_seconds: float,
) -> str:
    """What `--dry_run` says of a run whose step took so long: memory, hours, disk, reading."""
    wants, has = needs_of(settings, data, config, world), available_memory(device)
    kept = settings.save_total_limit or -(-steps // settings.save_steps)
    # while the newest is written the oldest is still there; the trained model at the end
    disk = (min(kept, -(-steps // settings.save_steps)) + 1) * wants.checkpoint + wants.weights
    samples = settings.batch_size * settings.gradient_accumulation_steps * world / step_seconds
    # as stored: a projection (--normalize pca:64) narrows what has been read
    sample = 2 * (data.raw_conditions.shape[1:].numel() + data.raw_targets.shape[1:].numel())
    hours = steps * step_seconds / 3600
    return "\n".join(
        [
            f"memory      about {in_words(wants.on(device))} a process: weights {in_words(wants.weights)}, gradients "
            f"{in_words(wants.gradients)}, AdamW {in_words(wants.optimizer)}, average {in_words(wants.average)}, "
            f"activations {in_words(wants.activations)}, less {in_words(wants.shared)} that gradients take over"
            + ("" if has is None else f"; {in_words(has)} free beside {in_words(wants.data)} of data"),
            f"time        {step_seconds:.2f} s a step here: {hours:.2f} hours for {steps} steps, without evaluations",
            f"disk        up to {in_words(disk)}: checkpoints of {in_words(wants.checkpoint)}",
            f"reading     {samples * sample / 1e6:.1f} MB/s of half-precision features ({samples:.1f} samples/s)",
        ]
    )
