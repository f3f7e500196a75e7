"""Features between two pictures of a split, and which of its pictures each step is nearest to.

The file has, for S steps, ``generated`` (float32 ``[S, T, C]``), ``condition`` (float32 ``[S, L, E]``), ``weights``
(float64 ``[S]``, of the second picture), ``nearest`` (int64 ``[S]``, rows of the embeddings) and ``similarity``
(float64 ``[S]``); how they were made is in its metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.evaluation.samples import check_width, load_model
from blip3o_fast.evaluation.settings import SamplingSettings, check_whole, device_named
from blip3o_fast.files import replacing
from blip3o_fast.sampling import prepare
from blip3o_fast.sampling.generate import noise_of
from blip3o_fast.sampling.interpolate import METHODS, conditions_between, interpolate, steps_between


@dataclass
class InterpolateSettings:
    """What `blip3o-fast interpolate` is told; what is not explained here is as in `SamplingSettings`.

    pair: the two pictures by their place in the split, "3,17". output: the file to write. count: steps, both ends
    included. method: of `sampling.interpolate`. seed: of the noise, which is that of the first picture of the pair in
    `blip3o-fast sample`: the first step is that picture's sample.
    """

    model: str | Path
    embeddings_path: str | Path
    pair: str
    output: str | Path = "interpolation.safetensors"
    count: int = 8
    method: str = "linear"
    split: str = "eval"
    eval_split: float = 0.1
    num_steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    seed: int = 0
    device: str = "auto"
    storage: str = "auto"

    def sampling(self) -> SamplingSettings:
        own = ("pair", "output", "count", "method")
        return SamplingSettings(**{name: value for name, value in vars(self).items() if name not in own})

    def check(self) -> tuple[int, int]:
        """The pair; ValueError naming the flag, before anything is loaded."""
        self.sampling().check()
        check_whole("count", self.count, 2)
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if Path(self.output).is_dir():
            raise ValueError(f"--output {self.output} is a folder; give the name of a file")
        parts = self.pair.split(",")
        if len(parts) != 2 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
            raise ValueError(f"--pair must be two places in the split, as 3,17, got {self.pair!r}")
        return int(parts[0]), int(parts[1])


def run_interpolation(settings: InterpolateSettings) -> Path:
    """Generate, print a line per step and write the file; returns its path.

    Raises ValueError or FileNotFoundError naming the flag or file, what was found and what is allowed.
    """
    pair, how = settings.check(), settings.sampling().resolved()
    dataset = EmbeddingDataset(settings.embeddings_path, split=settings.split, eval_split=settings.eval_split)
    if max(pair) >= len(dataset):
        raise ValueError(
            f"--pair {settings.pair}: the {settings.split!r} split of {settings.embeddings_path} has {len(dataset)} "
            f"pictures, 0 to {len(dataset) - 1}"
        )
    device = device_named(settings.device)
    model = load_model(settings.model, device)
    check_width(model, dataset, how)
    first, last = (dataset.conditions[place].to(device) for place in pair)
    shape = (model.config.sample_size**2, model.config.in_channels)
    noise = noise_of(settings.seed, dataset.indices[[pair[0]]], 1, shape)[0]
    generated = interpolate(
        prepare(model, storage=settings.storage),
        first,
        last,
        count=settings.count,
        method=settings.method,
        noise=noise.to(device),
        **how.run(),
    )
    generated = generated.float().cpu()
    weights = steps_between(settings.count, None)
    place, similarity = nearest(generated, dataset.targets)
    for weight, at, cosine in zip(weights.tolist(), place.tolist(), similarity.tolist(), strict=True):
        print(f"  {weight:5.3f}  nearest is {at:>6} {dataset.keys[at]}  (centred cosine {cosine:.3f})")
    tensors = {
        "generated": generated,
        "condition": conditions_between(first, last, weights, settings.method).float().cpu().contiguous(),
        "weights": weights,
        "nearest": dataset.indices[place],
        "similarity": similarity,
    }
    path = Path(settings.output)
    names = ("model", "embeddings_path", "split", "eval_split", "pair", "method", "seed")
    _write(path, tensors, how.metadata() | {name: str(getattr(settings, name)) for name in names})
    keys = " to ".join(f"{place} ({dataset.keys[place]})" for place in pair)
    print(f"{settings.count} steps from {keys}, {settings.method}: {path}")
    return path


def nearest(generated: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each of [S, T, C] the place of the most similar of [n, T, C], int64 [S], and the similarity, fp64 [S].

    As in `metrics.recall_at_k`: mean over the tokens, centred by the mean of the targets, cosine.
    """
    mean = targets.mean((0, 1), dtype=torch.float64)
    query, pool = (
        torch.nn.functional.normalize(x.mean(1, dtype=torch.float64) - mean, dim=-1) for x in (generated, targets)
    )
    similarity, place = (query @ pool.T).max(1)
    return place, similarity


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_file(tensors, beside, metadata=metadata)
