"""Features for the conditions of a whole data set, in a folder that any number of processes fill and that a killed run
goes on with.

    conditions, a batch at a time --sample--> features --every 4096--> samples_00000.safetensors, samples_00001 ...

The unit of work is a result shard. Which pictures it has, and from what noise they start, follows from its number, so
neither the number of processes nor the batch size nor an interruption shows in the result.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.reader import ConditionReader, MemoryConditions, open_conditions
from blip3o_fast.models.adopt import as_ours
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling.arguments import Arguments, check_count, noise_levels
from blip3o_fast.sampling.prepared import PreparedModel
from blip3o_fast.sampling.progress import bar
from blip3o_fast.sampling.ranks import Rank
from blip3o_fast.sampling.result_shards import ResultFolder, shard_rows
from blip3o_fast.sampling.run import device_and_dtype
from blip3o_fast.sampling.sampler import Sampler


@dataclass(frozen=True)
class Generated:
    """What a call of `generate_from_dataset` did: the folder, the samples it will hold, the shards it will have, how
    many of these are there now, and how many of them this call wrote."""

    folder: Path
    samples: int
    shards: int
    there: int
    written: int


def generate_from_dataset(
    model: Any,
    dataset: str | os.PathLike[str] | EmbeddingDataset | ConditionReader,
    output_dir: str | os.PathLike[str],
    *,
    split: str = "all",
    eval_split: float = 0.1,
    num_samples: int | None = None,
    num_samples_per_condition: int = 1,
    num_steps: int = 30,
    guidance_scale: float = 3.0,
    solver: str = "euler",
    guidance_start: float = 1.0,
    guidance_end: float = 0.0,
    sigmas: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    samples_per_shard: int = 4096,
    storage: str = "auto",
    rank: Rank | None = None,
    overwrite: bool = False,
    progress: bool = True,
    told: dict[str, str] | None = None,
) -> Generated:
    """Sample every condition of a data set into a folder of result shards (`sampling.result_shards` has the format).

    model: what `Sampler` takes, with a `state_dict` (or a pipeline), in eval mode, on the device that is to compute.
    dataset: a folder that `extract` wrote, of which a batch at a time is read; the original's pickle, which is read
        whole; an `EmbeddingDataset` with raw features; or a `data.reader.ConditionReader`. split, eval_split and
        num_samples (the first so many pictures of the split) belong to the former two. The result's pictures stand in
        the order of the file.
    num_samples_per_condition: n; a picture has n rows, one after the other.
    num_steps, guidance_scale, solver, guidance_start, guidance_end, sigmas: as of `sample`;
        `SamplerSettings.read(folder).arguments()` has them all.
    seed: of the noise, which belongs to (seed, row of the file, which of its samples), bit for bit: batch size,
        processes, shards and n do not change it.
    batch_size: rows of a run, at least one picture. samples_per_shard: rows of a result shard, at least one picture;
        so many are held in memory.
    storage: see `prepare`.
    rank: which of how many processes this is, None: as torchrun's variables say. Process r of w makes the shards r,
        r + w, ...; they need not see each other.
    overwrite: drop what the folder holds of other settings, weights or conditions, instead of refusing it.
    progress: process 0 shows a bar where stderr is a terminal.
    told: noted in samples.json, and not compared.

    Shards that are there stay as they are: a run that was killed is continued by calling it again, with any number of
    processes. What was done since the last whole shard is done again. For that the weights and the conditions are
    compared by a digest, of all weights (a second per gigabyte) and of parts of the embeddings.

    Raises ValueError naming the argument or folder, what was given and what is allowed, before any work;
    FloatingPointError where samples are not finite.
    """
    arguments: dict[str, Any] = {
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "solver": solver,
        "guidance_start": guidance_start,
        "guidance_end": guidance_end,
        "num_samples_per_condition": num_samples_per_condition,
    }
    counts = {"num_steps": num_steps, "batch_size": batch_size, "samples_per_shard": samples_per_shard}
    for name, value in counts.items():
        check_count(name, value)
    Arguments(**arguments).check()
    model = as_ours(model)
    levels = {}
    if sigmas is not None:
        levels = {"sigmas": noise_levels(Arguments(**arguments, sigmas=sigmas), model.config.prediction_type)}
    # 2 and 2.0 are one number, and two texts.
    arguments = {name: float(value) if name.startswith("guidance") else value for name, value in arguments.items()}
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    rank = Rank.here() if rank is None else rank
    sampler = Sampler(model, storage=storage)
    reader = _reader(dataset, split, eval_split, num_samples)
    _check_width(model, reader)
    made = {
        "pictures": len(reader.indices),
        "samples_per_shard": samples_per_shard,
        **arguments,
        **{name: value.tolist() for name, value in levels.items()},
        "seed": seed,
        "storage": storage,
        "weights": weights_fingerprint(model),
        "embeddings": reader.fingerprint,
        "rows": hashlib.sha256(reader.indices.contiguous().numpy().tobytes()).hexdigest(),
    }
    results = ResultFolder(output_dir, made, dict(told or {}), overwrite)
    rows = shard_rows(made)
    mine = range(rank.number, len(rows), rank.world)
    missing = [number for number in mine if not results.holds(number, rows[number])]
    total, left = (sum(rows[number] for number in numbers) for numbers in (mine, missing))
    name = "sample" if rank.world == 1 else f"sample, process 1 of {rank.world}"
    here = {"total": total, "initial": total - left, "smoothing": 0.05}
    with bar(progress and rank.speaks, desc=name, unit="sample", **here) as shown:
        for number in missing:
            start = sum(rows[:number]) // num_samples_per_condition
            stop = start + rows[number] // num_samples_per_condition
            parts = []
            step = max(1, batch_size // num_samples_per_condition)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                parts.append(_sample(sampler, model, reader, first, last, seed, arguments | levels))
                shown.update(len(parts[-1]))
            index = reader.indices[start:stop].repeat_interleave(num_samples_per_condition)
            results.write(number, torch.cat(parts), index, reader.keys[start:stop])
    there = sum(results.holds(number, count) for number, count in enumerate(rows))
    return Generated(results.folder, sum(rows), len(rows), there, len(missing))


def noise_of(seed: int, index: Tensor, num_samples_per_condition: int, shape: tuple[int, int]) -> Tensor:
    """float32 [N * n, T, C']: of (seed, picture, which of its samples). index: int64 [N], less than 2^32."""
    each = torch.arange(num_samples_per_condition, dtype=torch.int64) << 32
    return normal_noise_at(seed, (index[:, None] + each).flatten(), shape)


def weights_fingerprint(model: Any) -> str:
    """Of every weight, bit for bit, with its name, dtype and shape, of the configuration and of the normaliser."""
    model = model.model if isinstance(model, PreparedModel) else model
    if not hasattr(model, "state_dict"):
        raise ValueError(f"model must have a state_dict, to tell its weights by; {type(model).__name__} has none")
    tensors = dict(model.state_dict())
    digest = hashlib.sha256()
    normalizer = getattr(model, "normalizer", None)
    if normalizer is not None:
        for side in ("condition", "target"):
            half = getattr(normalizer, side)
            digest.update(half.spec.encode())
            tensors |= {f"normalizer.{side}.{name}": value for name, value in half.statistics.items()}
    config = model.config
    digest.update(repr(sorted((config.to_dict() if hasattr(config, "to_dict") else dict(config)).items())).encode())
    for name in sorted(tensors):
        value = tensors[name].detach()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _reader(dataset: Any, split: str, eval_split: float, num_samples: int | None) -> ConditionReader:
    if isinstance(dataset, str | os.PathLike):
        return open_conditions(dataset, split=split, eval_split=eval_split, num_samples=num_samples)
    if isinstance(dataset, EmbeddingDataset):
        return MemoryConditions(dataset)
    if not hasattr(dataset, "read"):
        raise ValueError(f"dataset must be a path, an EmbeddingDataset or a reader, got {type(dataset).__name__}")
    return dataset


def _check_width(model: Any, reader: ConditionReader) -> None:
    normalizer = getattr(model, "normalizer", None)
    width = model.config.cross_attention_dim if normalizer is None else normalizer.condition.in_features
    if reader.width != width:
        raise ValueError(f"dataset: conditions have {reader.width} channels, the model was trained on {width}")


def _sample(
    sampler: Sampler, model: Any, reader: ConditionReader, first: int, last: int, seed: int, arguments: dict[str, Any]
) -> Tensor:
    """Float32 [rows, T, C] on the CPU: the samples of the reader's pictures from first to last."""
    conditions = reader.read(first, last)
    device, _ = device_and_dtype(model, conditions)
    shape = (model.config.sample_size**2, model.config.in_channels)
    noise = noise_of(seed, reader.indices[first:last], arguments["num_samples_per_condition"], shape)
    return sampler(conditions.to(device), noise=noise.to(device), **arguments).float().cpu()
