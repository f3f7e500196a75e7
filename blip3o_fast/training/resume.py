"""Is this a new run, one to continue, or one that is finished? Decided before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip3o_fast import env
from blip3o_fast.models.normalizer import FILE_NAME, FeatureNormalizers
from blip3o_fast.training import checkpoints
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.prepare import Data


def say(text: str) -> None:
    """Print from the main process only."""
    if (env.read("RANK") or "0") == "0":
        print(text, flush=True)


def resume_point(settings: TrainSettings) -> Path | None:
    """The checkpoint to continue from, None for a new run; ValueError where neither is possible."""
    output, wanted = Path(settings.output_dir), settings.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output} is a file; a folder is needed")
    run, last = checkpoints.read_run(output), checkpoints.last_whole(output)
    if wanted is None:
        if run is None and not checkpoints.checkpoints(output):
            return None
        state = (
            f"its last whole checkpoint is step {checkpoints.step_of(last)}" if last else "it has no whole checkpoint"
        )
        raise ValueError(
            f"--output_dir {output} already holds a run ({state}); add --resume_from_checkpoint auto to continue it, "
            "or choose another folder"
        )
    if wanted == "auto":
        if last is None and run is None:
            say(f"no run in {output} yet: starting a new one")
        elif last is None:
            say(f"the run in {output} was stopped before its first whole checkpoint: starting it again")
        return last
    folder = Path(wanted)
    if (reason := checkpoints.what_is_missing(folder)) is not None:
        hint = f"; the last whole one is {last}" if last else ""
        raise ValueError(f"--resume_from_checkpoint {folder} is not a whole checkpoint: {reason}{hint}")
    if folder.resolve().parent != output.resolve() and run is not None:
        raise ValueError(
            f"--resume_from_checkpoint {folder} lies outside --output_dir {output}, which holds another run"
        )
    return folder


def stored_normalizer(resume: Path | None) -> FeatureNormalizers | None:
    """How the features were normalised in the run that is continued."""
    if resume is None or not (resume / FILE_NAME).is_file():
        return None
    return FeatureNormalizers.load(resume)


def is_finished(settings: TrainSettings, resume: Path, run: dict[str, Any] | None) -> bool:
    if run is None or run.get("status") != "finished" or checkpoints.step_of(resume) < run.get("steps", 0):
        return False
    return settings.max_steps is None or settings.max_steps <= run.get("steps", 0)


def check_same_run(settings: TrainSettings, run: dict[str, Any] | None, data: Data, resume: Path | None) -> None:
    """A continued run must go on as it began: refuse changed settings and other data, by name."""
    if resume is None or run is None:
        return
    earlier = run.get("settings", {})
    changed = settings.differences(earlier)
    now = settings.batch_size * settings.gradient_accumulation_steps
    before = earlier.get("batch_size", 0) * earlier.get("gradient_accumulation_steps", 1)
    if before and before != now:
        changed.append(f"--batch_size x --gradient_accumulation_steps: the run has {before}, now {now}")
    described = data.describe()
    changed += [
        f"embeddings: {name} was {run['data'][name]!r}, now {described[name]!r}"
        for name in described
        if name in run.get("data", {}) and run["data"][name] != described[name]
    ]
    if changed:
        raise ValueError(
            f"{resume} cannot be continued with other settings; give the run's own, or start a new --output_dir\n"
            + "\n".join(changed)
        )
    if settings.max_steps is not None and run.get("steps") and settings.max_steps != run["steps"]:
        say(f"note: the run was planned for {run['steps']} steps; the learning rate now follows {settings.max_steps}")
