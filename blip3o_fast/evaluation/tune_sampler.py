"""`blip3o-fast tune-sampler`: search, print what was found, write `sampler.json` beside the weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.data.dataset import SPLITS, EmbeddingDataset
from blip3o_fast.evaluation.samples import load_model
from blip3o_fast.evaluation.settings import device_named
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling import Sampler
from blip3o_fast.sampling.progress import bar
from blip3o_fast.sampling.settings import SamplerSettings
from blip3o_fast.sampling.tune import MOST, Search, Trial, first_level, front, tune

DEFAULT_STEPS = 30  # of Euler, what `sample` does where nobody says otherwise
TIMED_ROUNDS = 3


@dataclass
class TuneSettings:
    """What `blip3o-fast tune-sampler` is told.

    model: a run's or a checkpoint's folder, into which sampler.json is written.
    embeddings_path, split, eval_split: whose conditions, as in `blip3o-fast sample`.
    error: the largest relative L2 distance to the reference that is accepted, all samples together.
    guidance_scale: of the reference, which is guided everywhere, and of the sampler.
    num_samples: the first so many pictures of the split.
    seed: of the noise, which belongs to (seed, picture) as in `blip3o-fast sample`.
    reference_steps: of Euler on the linear grid.
    """

    model: str | Path
    embeddings_path: str | Path
    error: float = 0.01
    guidance_scale: float = 2.0
    num_samples: int = 16
    split: str = "eval"
    eval_split: float = 0.1
    seed: int = 0
    reference_steps: int = 1000
    device: str = "auto"

    def check(self) -> None:
        """ValueError naming the flag, before anything is loaded."""
        if not isinstance(self.error, int | float) or not 0 < self.error < 1:
            raise ValueError(f"--error must be a number above 0 and below 1, got {self.error!r}")
        if not -100 < self.guidance_scale < 100:
            raise ValueError(f"--guidance_scale must be a number between -100 and 100, got {self.guidance_scale!r}")
        for name, least in (("num_samples", 1), ("seed", 0), ("reference_steps", 100)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"--{name} must be a whole number >= {least}, got {value!r}")
        if self.split not in SPLITS:
            raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        device_named(self.device)
        if not Path(self.model).is_dir():
            raise ValueError(f"MODEL {self.model}: no such folder; sampler.json is written beside the weights")


def tune_sampler(settings: TuneSettings) -> SamplerSettings | None:
    """Search, print, write; returns what was written, None where nothing is within the error and nothing was.

    Raises ValueError or FileNotFoundError naming the flag or file, what was found and what is allowed.
    """
    settings.check()
    dataset = EmbeddingDataset(settings.embeddings_path, split=settings.split, eval_split=settings.eval_split)
    if len(dataset) == 0:
        raise ValueError(f"--split {settings.split}: no pictures in {settings.embeddings_path}")
    device = device_named(settings.device)
    model = load_model(settings.model, device)
    rows = slice(0, settings.num_samples)
    noise = normal_noise_at(
        settings.seed, dataset.indices[rows], (model.config.sample_size**2, model.config.in_channels)
    )
    print(
        f"{len(noise)} conditions, guidance {settings.guidance_scale:g}; errors are relative L2 distances to "
        f"{settings.reference_steps} Euler steps"
    )
    with bar(True, desc="tune", unit="run", leave=False) as shown:

        def advance(trial: Trial) -> None:
            shown.set_postfix_str(f"{trial.settings.solver} {trial.passes} passes, error {trial.error:.4f}")
            shown.update()

        search = Search(
            Sampler(model),
            dataset.conditions[rows].to(device),
            noise.to(device),
            guidance_scale=settings.guidance_scale,
            reference_steps=settings.reference_steps,
            start=first_level(model.config.prediction_type),
            progress=True,
            on_trial=advance,
        )
        best = tune(search, settings.error, MOST)
        floor = search.floor()
    default = search.measure(search.settings("euler", DEFAULT_STEPS, "linear"))
    print(table(front(search.trials), chosen=best, default=default))
    print(f"the reference's own error is about {floor:.1e}")
    if floor > settings.error / 2:
        print(f"note: that is more than half of --error {settings.error:g}; give more --reference_steps")
    if best is None:
        return None
    found = replace(
        best.settings,
        error=best.error,
        reference_steps=settings.reference_steps,
        evaluations=best.evaluations,
        passes=best.passes,
    )
    before, after = seconds_side_by_side(search, default.settings, best.settings)
    print(f"{DEFAULT_STEPS} Euler steps: {default.passes} passes, error {default.error:.4f}, {before:.3f} s")
    print(
        f"found:          {best.passes} passes, error {best.error:.4f}, {after:.3f} s ({before / after:.2f} x as fast)"
    )
    print(f"{found.write(settings.model)}: {found}")
    return found


def nothing_found(settings: TuneSettings) -> str:
    return (
        f"nothing is within --error {settings.error:g}: the last row of the table is the nearest that was tried; "
        "no file was written"
    )


def table(trials: Sequence[Trial], *, chosen: Trial | None = None, default: Trial | None = None) -> str:
    """The trials as text, one a row, from the cheapest to the best."""
    lines = [f"{'passes':>7}{'evaluations':>13}{'error':>9}  setting"]
    listed = sorted({*trials, *([default] if default else [])}, key=lambda trial: (trial.passes, trial.error))
    for trial in listed:
        mark = "  <- found" if trial == chosen else "  <- the default" if trial == default else ""
        lines.append(f"{trial.passes:>7}{trial.evaluations:>13}{trial.error:>9.4f}  {trial.settings}{mark}")
    return "\n".join(lines)


def seconds_side_by_side(search: Search, first: SamplerSettings, second: SamplerSettings) -> tuple[float, float]:
    """Medians of runs in turns, after one of each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + TIMED_ROUNDS):
        for settings, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            _wait_for(search.run(settings))
            taken.append(time.perf_counter() - start)
    before, after = (sorted(taken[1:])[TIMED_ROUNDS // 2] for taken in seconds)
    return before, after


def _wait_for(result: Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()
