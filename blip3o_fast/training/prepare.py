"""From settings to data and network: what comes before the first step, and what can be wrong with it."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.data.shards import META, read_meta
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.normalizer import FeatureNormalizers
from blip3o_fast.training import streamed
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.streamed import SideView
from blip3o_fast.training.validation import MAX_PICTURES, evenly_spaced


@dataclass
class Data:
    """Both splits as the network sees them (normalised), the raw held-out ones, and the way back."""

    conditions: Tensor | SideView  # [n, L, E]; a view where the set is streamed from its folder
    targets: Tensor | SideView  # [n, T, C]
    held_out_conditions: Any  # Tensor or SideView [m, L, E], m may be 0
    held_out_targets: Any  # [m, T, C]
    raw_conditions: Tensor  # of at most 256 held-out pictures, un-normalised
    raw_targets: Tensor
    raw_mean: Tensor  # [C]: of the whole train split's raw targets
    normalizer: FeatureNormalizers
    checksum: int  # of some raw training pictures
    keys: list[str] | None = None  # names of the training pictures
    raw_names: list[str] | None = None  # of raw_targets: caption and key
    made_by: dict[str, dict[str, Any]] | None = None  # the encoders of both sides, as the folder says

    def describe(self) -> dict[str, Any]:
        """For run.json: enough to notice that a continued run got other data."""
        return {
            "train": len(self.conditions),
            "held_out": len(self.held_out_conditions),
            "condition_shape": list(self.conditions.shape[1:]),
            "target_shape": list(self.targets.shape[1:]),
            "checksum": self.checksum,
            "made_by": self.made_by,
        }


def device_for(settings: TrainSettings) -> torch.device:
    """The device of the run; ValueError for one that is not there, or that cannot do the dtype."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    device = torch.device("cuda" if available and settings.device != "cpu" else "cpu")
    if settings.fp16 and device.type == "cpu":
        print("warning: --fp16 has no effect on a CPU, which trains in fp32 here; --bf16 is real", flush=True)
        settings.fp16 = False
    if settings.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"--bf16: {torch.cuda.get_device_name()} has no bfloat16; use --fp16, or neither for fp32")
    return device


def dtype_line(settings: TrainSettings, device: torch.device) -> str:
    """The compute dtype with its reason, for the header."""
    if settings.bf16:
        return "bf16 autocast over fp32 weights (--bf16)"
    if settings.fp16:
        return "fp16 autocast over fp32 weights, with loss scaling (--fp16)"
    if device.type == "cuda":
        return "fp32 (neither --bf16 nor --fp16 given; --bf16 is several times faster on this device)"
    return "fp32 (neither --bf16 nor --fp16 given)"


def load_data(settings: TrainSettings, *, normalizer: FeatureNormalizers | None = None) -> Data:
    """Read and normalise both splits. With a ``normalizer`` (of ``init_from``, or of the checkpoint to be continued: a
    fit on another number of threads differs in its last bits) that one is used, none is fitted. Otherwise, as in
    `EmbeddingDataset`, statistics come from the whole train split, also where ``subset_size`` keeps a part of it.
    """
    data = (
        _streamed_data(settings, normalizer)
        if streamed.is_streamed(settings)
        else _data_in_memory(settings, normalizer)
    )
    data.made_by = _made_by(Path(settings.embeddings_path))
    return data


def _made_by(folder: Path) -> dict[str, dict[str, Any]] | None:
    if not (folder / META).is_file():
        return None
    meta = read_meta(folder)
    return {"condition": dataclasses.asdict(meta.condition), "target": dataclasses.asdict(meta.target)}


def _data_in_memory(settings: TrainSettings, normalizer: FeatureNormalizers | None) -> Data:
    from blip3o_fast.data.dataset import EmbeddingDataset

    # The split has a seed of its own: one split for all runs, so that their held-out losses can be compared.
    train, held_out = EmbeddingDataset.splits(
        settings.embeddings_path, eval_split=settings.eval_split, split_by=settings.split_rule()
    )
    conditions, targets, keys = _subset(settings, train.conditions, train.targets, train.keys)
    held_conditions, held_targets = conditions[:0], targets[:0]
    if held_out is not None:
        held_conditions, held_targets = held_out.conditions, held_out.targets
    _check_count(settings, len(conditions), len(held_conditions))
    if normalizer is None:
        normalizer = FeatureNormalizers.fit(train.conditions, train.targets, settings.normalize)
    some = evenly_spaced(len(held_targets), MAX_PICTURES)
    raw_conditions, raw_targets = held_conditions[some], held_targets[some]
    raw_mean = train.targets.float().mean((0, 1))
    return Data(
        _normalised(normalizer.condition, conditions),
        _normalised(normalizer.target, targets),
        _normalised(normalizer.condition, held_conditions),
        _normalised(normalizer.target, held_targets),
        raw_conditions,
        raw_targets,
        raw_mean,
        normalizer,
        _checksum(conditions) ^ _checksum(targets),
        keys,
        None if held_out is None else [streamed.name_of(held_out.keys[i], held_out.captions[i]) for i in some.tolist()],
    )


def _check_count(settings: TrainSettings, found: int, held_out: int) -> None:
    if settings.eval_split and not held_out:
        raise ValueError(
            f"--eval_split {settings.eval_split}: none of the {found} pictures of {settings.embeddings_path} is held "
            "out; give a larger share, or 0 to train without evaluations"
        )
    effective = settings.batch_size * settings.gradient_accumulation_steps
    if found < 2:
        raise ValueError(f"{settings.embeddings_path}: {found} training pictures; at least 2 are needed")
    if found < effective:
        # Allowed (the stream wraps around), but hardly meant.
        print(f"note: {found} training pictures are fewer than the effective batch of {effective}")


def _streamed_data(settings: TrainSettings, normalizer: FeatureNormalizers | None) -> Data:
    """`Data` of views; only what evaluation looks at again and again is taken into memory."""
    given = streamed.load(settings, normalizer)
    _check_count(settings, len(given["conditions"]), len(given["held_out_conditions"]))
    raw, raw_train = given.pop("raw"), given.pop("raw_train")
    some = evenly_spaced(len(raw[0]), MAX_PICTURES)
    checksum = _checksum(raw_train[0]) ^ _checksum(raw_train[1])
    names = streamed.names_of(raw[0], some)
    return Data(**given, raw_conditions=raw[0][some], raw_targets=raw[1][some], checksum=checksum, raw_names=names)


def _checksum(features: Tensor | SideView) -> int:
    """CRC-32 of the bytes of about 64 pictures, evenly spread."""
    some = features[evenly_spaced(len(features), 64)].float().contiguous()
    return zlib.crc32(some.numpy().tobytes())


def _subset(
    settings: TrainSettings, conditions: Tensor, targets: Tensor, keys: list[str]
) -> tuple[Tensor, Tensor, list[str]]:
    """The training pictures that --subset_size keeps, chosen as EmbeddingDataset would."""
    found, wanted = len(conditions), settings.subset_size
    if wanted is None or wanted == found or (settings.debug and wanted > found):
        return conditions, targets, keys
    if wanted > found:
        raise ValueError(f"--subset_size {wanted}: {settings.embeddings_path} has only {found} training pictures")
    rows = torch.randperm(found, generator=torch.Generator().manual_seed(42))[:wanted]
    return conditions[rows], targets[rows], [keys[row] for row in rows.tolist()]


def _normalised(normalizer: Any, features: Tensor, block: int = 256) -> Tensor:
    """fp32, in blocks: a whole float32 copy of everything in flight would double the memory."""
    if normalizer.spec == "none":
        return features.float()
    out = torch.empty(*features.shape[:2], normalizer.out_features)
    for start in range(0, len(features), block):
        out[start : start + block] = normalizer(features[start : start + block].float())
    return out


def config_for(settings: TrainSettings, data: Data) -> BLIP3oConfig:
    """The network's configuration: sizes from the flags and the preset, channels and grid from the embeddings."""
    tokens, channels = data.targets.shape[1:]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(
            f"{settings.embeddings_path}: targets have {tokens} tokens; they must be a square grid (64 = 8 x 8, say)"
        )
    given = {
        "hidden_size": settings.model_dim,
        "num_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_kv_heads": settings.num_kv_heads,
        "multiple_of": settings.multiple_of,
        "ffn_dim_multiplier": settings.ffn_dim_multiplier,
        "context_projection": settings.context_projection,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fields |= {
        "sample_size": grid,
        "patch_size": 1,
        "in_channels": channels,
        "cross_attention_dim": data.conditions.shape[2],
        "prediction_type": settings.prediction_type,
        "schedule": settings.schedule_type,
        "sigma_min": settings.sigma_min,
        "sigma_max": settings.sigma_max,
        "condition_dropout": settings.condition_dropout,
    }
    return BLIP3oConfig.preset(settings.preset, **fields) if settings.preset else BLIP3oConfig(**fields)


def model_for(
    settings: TrainSettings, data: Data, start: BLIP3oDiT | None, config: BLIP3oConfig | None = None
) -> BLIP3oDiT:
    """A new network with weights drawn from the seed, or the one to start from.

    config: of the run that is continued. The flags alone do not say it: the run may have begun with --init_from.
    """
    if start is None:
        config = config_for(settings, data) if config is None else config
        model = BLIP3oDiT(config, generator=torch.Generator().manual_seed(settings.seed))
    else:
        model = start
        if problems := _flags_against(settings, model.config, data.normalizer.target.spec):
            raise ValueError("\n".join(problems))
        found = (data.targets.shape[2], data.conditions.shape[2], data.targets.shape[1])
        wanted = (model.config.in_channels, model.config.cross_attention_dim, model.config.num_tokens)
        if found != wanted:
            raise ValueError(
                f"--init_from {settings.init_from}: its network has target channels, condition channels, tokens "
                f"{wanted}, the embeddings (normalised) have {found}"
            )
    if model.config.condition_dropout != settings.condition_dropout:
        # Of this run, whatever the network began with: what it was last trained on is what it knows.
        model.config = dataclasses.replace(model.config, condition_dropout=settings.condition_dropout)
    model.normalizer = data.normalizer
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"mode": settings.checkpointing_mode})
    return model.train()


# Flags that describe a network, and its field.
_OF_THE_NETWORK = {
    "model_dim": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "context_projection": "context_projection",
    "prediction_type": "prediction_type",
    "schedule_type": "schedule",
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
}


def _flags_against(settings: TrainSettings, config: BLIP3oConfig, spec: str) -> list[str]:
    """Flags that say otherwise than the network of --init_from, which brings its own values: one line each."""
    theirs = {flag: getattr(config, name) for flag, name in _OF_THE_NETWORK.items()} | {"normalize": spec}
    given = {
        flag: getattr(settings, flag) for flag in theirs if getattr(settings, flag) != getattr(TrainSettings, flag)
    }
    lines = [f"--{flag} {value}: the network of --init_from has {theirs[flag]}; leave the flag out"
             for flag, value in given.items() if value != theirs[flag]]  # fmt: skip
    return lines + (["--preset: --init_from brings its network along; leave the flag out"] if settings.preset else [])


def effective_batch(settings: TrainSettings, world_size: int) -> int:
    """Samples per optimizer step over all processes."""
    return settings.batch_size * settings.gradient_accumulation_steps * world_size


def total_steps(settings: TrainSettings, pictures: int, world_size: int) -> int:
    """Optimizer steps of the run: as given, or the epochs in steps of full batches, rounded up."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(settings.num_epochs * pictures / effective_batch(settings, world_size)))


def header(settings: TrainSettings, data: Data, model: BLIP3oDiT, device: torch.device, steps: int, world: int) -> str:
    """What is about to happen, one fact per line."""
    from blip3o_fast.training.arguments import warmup_steps

    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    effective = effective_batch(settings, world)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    average = f"decay {settings.ema_decay:g}, fp32, {parameters * 4 / 2**20:.0f} MB" if settings.ema_decay else "off"
    target = data.normalizer.target
    folder = Path(settings.embeddings_path)
    meta = read_meta(folder) if (folder / META).is_file() else None
    made = [f"features    condition: {meta.condition}", f"            target: {meta.target}"] if meta else []
    return "\n".join(
        [
            f"device      {name}" + (f", {world} processes" if world > 1 else ""),
            f"dtype       {dtype_line(settings, device)}",
            f"network     {parameters / 1e6:.2f} M parameters: width {config.hidden_size}, {config.num_layers} layers, "
            f"{config.num_attention_heads} heads of {config.head_dim}, FFN {config.ffn_dim}"
            + (f", preset {settings.preset}" if settings.preset else ""),
            f"data        {len(data.conditions)} training and {len(data.held_out_conditions)} held-out pictures, "
            f"condition {list(data.conditions.shape[1:])}, target {list(data.targets.shape[1:])} "
            f"(normalize {target.spec}, {100 * target.explained_variance:.0f} % of the variance)",
            *made,
            f"batch       {effective} = {settings.batch_size} x {settings.gradient_accumulation_steps} accumulated "
            f"x {world} processes",
            f"steps       {steps} ({steps * effective / len(data.conditions):.1f} epochs), "
            f"warmup {warmup_steps(settings, steps)}, {settings.lr_scheduler} from {settings.learning_rate:g}",
            f"average     {average}",
            f"output      {Path(settings.output_dir)}",
        ]
    )
