"""Is this a new run, one to continue, or one that is finished? Decided before anything is loaded or written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from blip3o_fast import env
from blip3o_fast.models.normalizer import FILE_NAME, FeatureNormalizers
from blip3o_fast.models.reading import OUR_WEIGHTS, STOCK_WEIGHTS
from blip3o_fast.training import checkpoints
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.group import job, restarts
from blip3o_fast.training.prepare import Data, effective_batch


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
    if run is None and last is None and any((output / name).exists() for name in (OUR_WEIGHTS, STOCK_WEIGHTS)):
        raise ValueError(f"--output_dir {output} holds a model that no run here made; choose another folder")
    # A folder that this job did not begin to write is as closed to its second life as it was to its first.
    ours = not checkpoints.checkpoints(output) if run is None else run.get("job") == job()
    if (again := restarts()) and ours and (wanted is None or last is not None):
        # Whoever started the job is not there to add the flag, and a named checkpoint is older than what was saved.
        say(f"restart {again} by torchrun: continuing from the newest whole checkpoint")
        wanted = "auto"
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
        elif last is None and run is not None and run.get("status") != "finished":
            say(f"the run in {output} was stopped before its first whole checkpoint: starting it again")
        return last
    folder = Path(wanted)
    if folder.is_symlink():  # interrupted_checkpoint
        folder = folder.parent / folder.readlink()
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


def finished_without_checkpoints(settings: TrainSettings) -> int | None:
    """The steps of a finished run in ``output_dir`` that has no checkpoint any more, None where there is none such.

    Asked when `resume_point` has nothing to continue from: the run is not to be made again over its own model.
    ValueError where other settings or more steps of it are asked for.
    """
    run = checkpoints.read_run(Path(settings.output_dir))
    if run is None or run.get("status") != "finished":
        return None
    steps, earlier = run.get("steps", 0), run.get("settings", {})
    changed = settings.differences(earlier)
    if (settings.max_steps or 0) > steps or (
        settings.max_steps is None and settings.num_epochs > earlier.get("num_epochs", settings.num_epochs)
    ):
        changed.append(f"it has {steps} steps; more were asked for")
    if changed:
        raise ValueError(
            f"--output_dir {settings.output_dir} holds a finished run whose checkpoints are gone: it cannot be "
            "continued; train on from its model in another folder, with --init_from\n" + "\n".join(changed)
        )
    return steps


def is_finished(settings: TrainSettings, resume: Path, run: dict[str, Any] | None, steps: int) -> bool:
    """Whether nothing is left to do of ``steps``, the total that the present flags give."""
    if run is None or run.get("status") != "finished" or checkpoints.step_of(resume) < run.get("steps", 0):
        return False
    # A run that was begun with --max_steps is also finished where its folder alone is named.
    epochs = run.get("settings", {}).get("num_epochs", settings.num_epochs)
    asked = settings.max_steps is not None or settings.num_epochs != epochs
    return not asked or steps <= run.get("steps", 0)


def check_same_run(
    settings: TrainSettings, run: dict[str, Any] | None, data: Data, resume: Path | None, world_size: int
) -> None:
    """A continued run must go on as it began: refuse changed settings, another effective batch and other data."""
    if resume is not None and run is None:  # continued in another folder: the checkpoint says what it belongs to
        run = checkpoints.read_state(resume).get("run")
    if resume is None or run is None:
        return
    earlier = run.get("settings", {})
    changed = settings.differences(earlier)
    # run.json of earlier versions does not say how many processes there were
    sizes = (earlier.get("batch_size"), earlier.get("gradient_accumulation_steps"), run.get("world_size", world_size))
    before, now = math.prod(size or 0 for size in sizes), effective_batch(settings, world_size)
    if before and before != now:
        mine = (settings.batch_size, settings.gradient_accumulation_steps, world_size)
        changed.append(
            f"--batch_size x --gradient_accumulation_steps x processes: the run has {' x '.join(map(str, sizes))} = "
            f"{before}, now {' x '.join(map(str, mine))} = {now}; each may change, their product may not"
        )
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


def tell_other_length(run: dict[str, Any] | None, steps: int) -> None:
    """Say so where --max_steps or --num_epochs gives a continued run another length: the schedule follows it."""
    if run is not None and run.get("steps") and run["steps"] != steps:
        say(f"note: the run was planned for {run['steps']} steps; the learning rate now follows {steps}")
