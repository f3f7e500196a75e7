"""What the verbs that sample are told, checked before anything is loaded, and what holds where they are not told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from blip3o_fast.data.dataset import SPLITS
from blip3o_fast.flow.solvers import check_solver
from blip3o_fast.models.reading import folder_of
from blip3o_fast.ops.packed_linear import STORAGE
from blip3o_fast.sampling.ranks import Rank
from blip3o_fast.sampling.settings import fill

DEVICES = ("auto", "cpu", "cuda")

# What a flag that is None becomes where the model has no sampler.json: the one place for it. BLIP3-o samples with
# guidance 3; embeddings score best near 2.
DEFAULTS: dict[str, Any] = {
    "num_steps": 30,
    "guidance_scale": 2.0,
    "solver": "euler",
    "guidance_start": 1.0,
    "guidance_end": 0.0,
}
OUTPUT = "samples.safetensors"

Settings = TypeVar("Settings", bound="SamplingSettings")


@dataclass
class SamplingSettings:
    """How to sample.

    model: a run's folder, a checkpoint folder (its averaged weights are used where it has some) or a hub name.
    embeddings_path: as in training; with the same ``eval_split`` the split is the one that training held out.
    num_samples: the first so many pictures of the split; None: all.
    num_steps, guidance_scale, solver, guidance_start, guidance_end: as of `sample`; None: as sampler.json beside the
        weights says, or DEFAULTS where there is none; where none of them is None the file is not looked at.
        guidance_scale 1 is none, 0 ignores the condition; it is used between the two noise levels.
    batch_size: pictures of a run. seed: of the noise, which belongs to (seed, picture): batch size and num_samples do
        not change it.
    storage: of the weights while sampling on a CPU, see `sampling.prepare`; "auto" loses nothing.
    sigmas: the num_steps + 1 noise levels of sampler.json, set by `resolved`; None: the linear ones. Not a flag.
    """

    model: str | Path
    embeddings_path: str | Path
    split: str = "eval"
    eval_split: float = 0.1
    num_samples: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"
    storage: str = "auto"
    sigmas: tuple[float, ...] | None = field(default=None, metadata={"flag": False})

    def resolved(self: Settings) -> Settings:
        """A copy in which nothing of DEFAULTS is None. Where sampler.json is used, one line about it is printed.

        Raises ValueError naming the file where it is broken.
        """
        given = {name: getattr(self, name) for name in DEFAULTS}
        if None not in given.values():
            return replace(self)
        rank = Rank.here()
        filled = fill(given, folder_of(Path(self.model)), print if rank.speaks else lambda line: None)
        sigmas = filled.pop("sigmas", None)
        return replace(self, **DEFAULTS | filled, sigmas=None if sigmas is None else tuple(sigmas.tolist()))

    def run(self) -> dict[str, Any]:
        """The arguments of `sample` that these settings are."""
        settings = self.resolved()
        arguments = {name: getattr(settings, name) for name in DEFAULTS}
        if settings.sigmas is not None:
            arguments["sigmas"] = torch.tensor(settings.sigmas, dtype=torch.float32)
        return arguments

    def metadata(self) -> dict[str, str]:
        """The same as texts, as a file of samples says how it was made; sigmas are a list in JSON."""
        run = self.run()
        return {name: str(value.tolist() if name == "sigmas" else value) for name, value in run.items()}

    def check(self) -> None:
        """ValueError naming the flag, before anything is loaded or a file is read."""
        told = {
            name: default if (value := getattr(self, name)) is None else value for name, default in DEFAULTS.items()
        }
        for name, value in told.items():
            _CHECKS[name](value)
        check_whole("batch_size", self.batch_size)
        if self.num_samples is not None:
            check_whole("num_samples", self.num_samples)
        start, end = told["guidance_start"], told["guidance_end"]
        if start < end:
            raise ValueError(
                f"--guidance_start must be at least --guidance_end, as noise levels fall: got {start} and {end}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        check_whole("seed", self.seed, 0)
        if self.storage not in ("auto", *STORAGE):
            raise ValueError(f"--storage must be one of {', '.join(('auto', *STORAGE))}, got {self.storage!r}")
        device_named(self.device)


@dataclass
class SampleSettings(SamplingSettings):
    """What `blip3o-fast sample` is told: how to sample, and

    output: the file to write, "samples.safetensors" where nothing is said. output_dir: instead, a folder that is filled
        shard by shard, continued after an interruption, and shared by the processes of torchrun.
    num_samples_per_condition: so many samples of each picture, from different noise.
    samples_per_shard: of a folder. overwrite: drop what the folder holds of other settings.
    """

    output: str | Path | None = None
    output_dir: str | Path | None = None
    num_samples_per_condition: int = 1
    samples_per_shard: int = 4096
    overwrite: bool = False

    def check(self) -> None:
        super().check()
        check_whole("num_samples_per_condition", self.num_samples_per_condition)
        check_whole("samples_per_shard", self.samples_per_shard)
        if self.output is not None and self.output_dir is not None:
            raise ValueError(f"--output {self.output} and --output_dir {self.output_dir} exclude each other: give one")
        if self.output_dir is None and self.overwrite:
            raise ValueError("--overwrite belongs to --output_dir; a file of --output is replaced anyway")


def check_whole(flag: str, value: Any, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"--{flag} must be a whole number >= {least}, got {value!r}")


def _check_scale(value: Any) -> None:
    if not -100 < value < 100:
        raise ValueError(f"--guidance_scale must be a number between -100 and 100, got {value!r}")


def _check_level(flag: str, value: Any) -> None:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"--{flag} must be a noise level between 0 and 1, got {value!r}")


_CHECKS = {
    "num_steps": lambda value: check_whole("num_steps", value),
    "guidance_scale": _check_scale,
    "solver": check_solver,
    "guidance_start": lambda value: _check_level("guidance_start", value),
    "guidance_end": lambda value: _check_level("guidance_end", value),
}


def device_named(name: str) -> torch.device:
    """ "auto" is CUDA where there is one; of several GPUs the one of this process."""
    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cpu") if name == "cpu" else Rank.here().device()
