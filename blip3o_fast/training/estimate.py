"""What a training run needs, before its network is built: memory, disk, reading, and the preset that would fit."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blip3o_fast.models.config import PRESETS, BLIP3oConfig
from blip3o_fast.models.memory import memory_bytes
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.prepare import Data, config_for

# Under autocast products keep half-precision inputs, the residual stream and the norms' inputs stay in fp32.
AUTOCAST_SHARE = 0.65
# What the libraries that are still to be imported take, and their workspaces.
LIBRARIES_BYTES = 1 << 29


@dataclass(frozen=True)
class Needs:
    """Bytes of one process. data: features in the host's memory, which are there before the network is."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    data: int

    def on(self, device: torch.device) -> int:
        """What the device's memory must hold beside what is there already."""
        network = self.weights + self.gradients + self.optimizer + self.average + self.activations
        return network + (LIBRARIES_BYTES if device.type == "cpu" else 0)

    @property
    def checkpoint(self) -> int:
        """A checkpoint on disk: fp32 weights, AdamW's two moments, the average."""
        return self.weights + self.optimizer + self.average


def needs(settings: TrainSettings, config: BLIP3oConfig, data_bytes: int, context: int) -> Needs:
    """The estimate for a network of this configuration, in fp32 weights with AdamW."""
    with torch.device("meta"):
        network = BLIP3oDiT(config)
    if settings.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    weights = sum(parameter.numel() for parameter in network.parameters()) * 4
    size: dict[str, Any] = {"training": True, "dtype": torch.float32, "context": context}
    activations = memory_bytes(network, settings.batch_size, **size) - memory_bytes(network, 0, **size)
    if settings.bf16 or settings.fp16:
        activations = int(AUTOCAST_SHARE * activations)
    average = weights if settings.ema_decay else 0
    return Needs(weights // 4, weights, weights, 2 * weights, average, activations, data_bytes)


def needs_of(settings: TrainSettings, data: Data, config: BLIP3oConfig) -> Needs:
    held = (data.conditions, data.targets, data.held_out_conditions, data.held_out_targets)
    features = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return needs(settings, config, features, data.conditions.shape[1])


def available_bytes(device: torch.device) -> int | None:
    """Memory that a run may take: the GPU's own; on a CPU what the machine has free, or the container's limit leaves.
    None where nobody says.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_free_of_machine(), _free_of_container()) if value is not None]
    return min(found, default=None)


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if len(line.split()) >= 2}
    return values.get("MemAvailable")


def _free_of_container() -> int | None:
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def check_memory(settings: TrainSettings, data: Data, device: torch.device, config: BLIP3oConfig) -> None:
    """ValueError where the estimate is above what there is, naming the preset that fits; `--force` goes on anyway."""
    has, wants = available_bytes(device), needs_of(settings, data, config)
    if settings.force or has is None or wants.on(device) <= has:
        return
    where = "GPU" if device.type == "cuda" else "machine"
    fits = _preset_that_fits(settings, data, device, has)
    advice = f"--preset {fits} would fit" if fits else "no preset fits with this --batch_size; take a smaller one"
    raise ValueError(
        f"this run needs about {in_words(wants.on(device))} and this {where} has {in_words(has)} free "
        f"(weights, gradients, AdamW{', average' if wants.average else ''} "
        f"{in_words(wants.weights + wants.gradients + wants.optimizer + wants.average)}, activations "
        f"{in_words(wants.activations)})\n"
        f"hint: {advice}; --force begins anyway"
    )


def _preset_that_fits(settings: TrainSettings, data: Data, device: torch.device, has: int) -> str | None:
    for name in sorted(PRESETS, key=_size, reverse=True):
        smaller = copy.copy(settings)
        for field in ("model_dim", "num_layers", "num_heads", "num_kv_heads", "multiple_of", "ffn_dim_multiplier"):
            setattr(smaller, field, None)
        smaller.preset = name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that is only thought of
            config = config_for(smaller, data)
        if name != "tiny" and needs_of(smaller, data, config).on(device) <= has:
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
    wants, has = needs_of(settings, data, config), available_bytes(device)
    kept = settings.save_total_limit or -(-steps // settings.save_steps)
    # while the newest is written the oldest is still there; the trained model at the end
    disk = (min(kept, -(-steps // settings.save_steps)) + 1) * wants.checkpoint + wants.weights
    samples = settings.batch_size * settings.gradient_accumulation_steps * world / step_seconds
    sample = 2 * (data.conditions[0].numel() + data.targets[0].numel())
    hours = steps * step_seconds / 3600
    return "\n".join(
        [
            f"memory      about {in_words(wants.on(device))} a process: weights {in_words(wants.weights)}, gradients "
            f"{in_words(wants.gradients)}, AdamW {in_words(wants.optimizer)}, average {in_words(wants.average)}, "
            f"activations {in_words(wants.activations)}"
            + ("" if has is None else f"; {in_words(has)} free beside {in_words(wants.data)} of data"),
            f"time        {step_seconds:.2f} s a step here: {hours:.2f} hours for {steps} steps, without evaluations",
            f"disk        up to {in_words(disk)}: checkpoints of {in_words(wants.checkpoint)}",
            f"reading     {samples * sample / 1e6:.1f} MB/s of half-precision features ({samples:.1f} samples/s)",
        ]
    )
