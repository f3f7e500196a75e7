"""Samples of a trained model for a split of embeddings, and the file that holds them.

``samples.safetensors`` has ``generated``, ``target`` and ``condition`` (float32 ``[n, T, *]``, raw feature space) and
``index`` (int64 ``[n]``, rows of the embeddings); how they were made is in its metadata.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.data.dataset import SPLITS, EmbeddingDataset
from blip3o_fast.flow.solvers import check_solver
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.reading import AVERAGED_WEIGHTS
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.ops.packed_linear import STORAGE
from blip3o_fast.sampling import prepare, sample

DEVICES = ("auto", "cpu", "cuda")


@dataclass
class SampleSettings:
    """What `blip3o-fast sample` is told.

    model: a run's folder, a checkpoint folder (its averaged weights are used where it has some) or a hub name.
    embeddings_path: as in training; with the same ``eval_split`` the split is the one that training held out.
    output: the file to write.
    num_samples: the first so many pictures of the split; None: all.
    guidance_scale: 1 is none, 0 ignores the condition. BLIP3-o samples with 3; embeddings score best near 2.
    seed: of the noise, which belongs to (seed, picture): batch size and num_samples do not change it.
    storage: of the weights while sampling on a CPU, see `sampling.prepare`; "auto" loses nothing.
    """

    model: str | Path
    embeddings_path: str | Path
    output: str | Path = "samples.safetensors"
    split: str = "eval"
    eval_split: float = 0.1
    num_samples: int | None = None
    num_steps: int = 30
    guidance_scale: float = 2.0
    solver: str = "euler"
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"
    storage: str = "auto"

    def check(self) -> None:
        """ValueError naming the flag, before anything is loaded."""
        for name in ("num_steps", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"--{name} must be a whole number >= 1, got {value!r}")
        if self.num_samples is not None and (type(self.num_samples) is not int or self.num_samples < 1):
            raise ValueError(f"--num_samples must be a whole number >= 1, got {self.num_samples!r}")
        if not -100 < self.guidance_scale < 100:
            raise ValueError(f"--guidance_scale must be a number between -100 and 100, got {self.guidance_scale!r}")
        if self.split not in SPLITS:
            raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"--seed must be a whole number >= 0, got {self.seed!r}")
        check_solver(self.solver)
        if self.storage not in ("auto", *STORAGE):
            raise ValueError(f"--storage must be one of {', '.join(('auto', *STORAGE))}, got {self.storage!r}")
        device_named(self.device)


@dataclass
class Samples:
    """The content of a samples file."""

    generated: Tensor
    target: Tensor
    condition: Tensor
    index: Tensor
    metadata: dict[str, str]


def device_named(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(path: str | Path, device: torch.device) -> BLIP3oDiT:
    """The model in eval mode; from a training checkpoint with its averaged weights."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        whole = [p for p in folder.glob("checkpoint-*") if (p / "config.json").is_file()]
        last = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
        hint = f"; the run is not finished, its last checkpoint is {last}" if last else ""
        raise ValueError(f"--model {folder}: there is no config.json in it{hint}")
    model = BLIP3oDiT.from_pretrained(path)
    if (folder / AVERAGED_WEIGHTS).is_file():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / AVERAGED_WEIGHTS), strict=True)
    return model.to(device).eval()


def generate(model: BLIP3oDiT, dataset: EmbeddingDataset, settings: SampleSettings, *, progress: bool = True) -> Tensor:
    """float32 ``[n, T, C]`` on the CPU, raw features, one per picture of a raw (un-normalised) dataset."""
    device = next(model.parameters()).device
    width = model.config.cross_attention_dim if model.normalizer is None else model.normalizer.condition.in_features
    if dataset.conditions.shape[2] != width:
        raise ValueError(
            f"--embeddings_path {settings.embeddings_path}: conditions have {dataset.conditions.shape[2]} channels, "
            f"the model was trained on {width}"
        )
    count = len(dataset) if settings.num_samples is None else min(settings.num_samples, len(dataset))
    prepared = prepare(model, storage=settings.storage)
    parts = []
    with _bar(count, progress) as advance:
        for start in range(0, count, settings.batch_size):
            rows = slice(start, min(start + settings.batch_size, count))
            shape = (model.config.num_tokens, model.config.in_channels)
            noise = normal_noise_at(settings.seed, dataset.indices[rows], shape)
            generated = sample(
                prepared,
                dataset.conditions[rows].to(device),
                num_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                solver=settings.solver,
                noise=noise.to(device),
            )
            parts.append(generated.float().cpu())
            advance(len(parts[-1]))
    return torch.cat(parts)


def sample_to_file(settings: SampleSettings) -> Path:
    """Generate for every picture of the split and write the file; returns its path.

    Raises ValueError or FileNotFoundError naming the flag or file, what was found and what is allowed.
    """
    settings.check()
    output = Path(settings.output)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file")
    dataset = EmbeddingDataset(settings.embeddings_path, split=settings.split, eval_split=settings.eval_split)
    model = load_model(settings.model, device_named(settings.device))
    samples = Samples(generate(model, dataset, settings), *_truth(dataset, settings), describe(settings))
    write_samples(output, samples)
    print(
        f"{len(samples.generated)} samples, guidance {settings.guidance_scale:g}, {settings.num_steps} steps: {output}"
    )
    return output


def _truth(dataset: EmbeddingDataset, settings: SampleSettings) -> tuple[Tensor, Tensor, Tensor]:
    count = settings.num_samples
    return dataset.targets[:count], dataset.conditions[:count], dataset.indices[:count]


def describe(settings: SampleSettings) -> dict[str, str]:
    """What a samples file says about how it was made."""
    names = ("model", "embeddings_path", "split", "eval_split", "num_steps", "guidance_scale", "solver", "seed")
    return {name: str(getattr(settings, name)) for name in names}


def write_samples(path: Path, samples: Samples) -> None:
    """Write beside, then rename."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {
        "generated": samples.generated.float().contiguous(),
        "target": samples.target.float().contiguous(),
        "condition": samples.condition.float().contiguous(),
        "index": samples.index.contiguous(),
    }
    try:
        save_file(tensors, beside, metadata=samples.metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_samples(path: str | Path) -> Samples:
    """Read and check a samples file; FileNotFoundError or ValueError naming it."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--samples {path}: no such file; `blip3o-fast sample` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"--samples {path}: not a whole safetensors file ({error})") from error
    missing = {"generated", "target", "condition", "index"} - set(tensors)
    if missing:
        raise ValueError(f"--samples {path}: has no {', '.join(sorted(missing))}, it holds {sorted(tensors)}")
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1 or tensors["generated"].shape != tensors["target"].shape:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"--samples {path}: the tensors do not belong together: {shapes}")
    return Samples(tensors["generated"], tensors["target"], tensors["condition"], tensors["index"], metadata)


class _bar:
    """``with _bar(total, wanted) as advance``: a progress bar where it is wanted and stderr is a terminal."""

    def __init__(self, total: int, wanted: bool) -> None:
        import sys

        self.bar: Any = None
        if wanted and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc="sample", unit="picture")

    def __enter__(self) -> Any:
        return (lambda count: None) if self.bar is None else self.bar.update

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
