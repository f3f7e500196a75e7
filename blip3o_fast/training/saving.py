"""What a checkpoint holds beside weights and optimizer, and what happens when it cannot be written.

state.json    step, next_sample (where the data stream goes on), seed, skipped steps, eval_loss of this step,
              wandb_run_id, and `run`: settings, data and versions that the weights came from
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_fast.training import checkpoints

if TYPE_CHECKING:
    from blip3o_fast.training.trainer import BLIP3oTrainer

INTERRUPTED = "interrupted_checkpoint"


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Around the writing of one checkpoint: where it fails, the half folder goes, and its space with it.

    Raises CheckpointError naming the folder, the cause, the space left and the checkpoint to continue from.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save says RuntimeError where the disk is full; not every RuntimeError is about writing.
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        checkpoints.unmark(folder)
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**30
        last = checkpoints.last_whole(folder.parent)
        after = (
            f"{last} is whole: continue from it with --resume_from_checkpoint auto"
            if last
            else "there is no earlier checkpoint"
        )
        raise CheckpointError(
            f"{folder} could not be written ({str(error).splitlines()[0]}); {free:.2f} GB are free there. "
            f"Its half was removed. Make room, then: {after}"
        ) from error


def write_state(folder: Path, trainer: BLIP3oTrainer) -> None:
    """state.json of a checkpoint that is being written."""
    step = trainer.state.global_step
    wandb = sys.modules.get("wandb")
    evaluated_at, loss = trainer.last_evaluation
    state = {
        "format_version": 1,
        "step": step,
        "next_sample": trainer.samples_seen(),
        "seed": trainer.args.seed,
        **trainer.watch.state(),
        "eval_loss": loss if evaluated_at == step else None,
        "wandb_run_id": getattr(getattr(wandb, "run", None), "id", None),
        "run": trainer.record,
    }
    checkpoints.write_json(folder / checkpoints.STATE_FILE, state)


def restore_state(folder: Path, trainer: BLIP3oTrainer) -> None:
    """Take up what `write_state` wrote; ValueError where this trainer would go on with other samples."""
    state = checkpoints.read_state(folder)
    if not state:
        return  # of an earlier version
    trainer.watch.load_state(state)
    batch, seed = state["next_sample"] // max(state["step"], 1), state["seed"]
    if (batch, seed) != (trainer.effective_batch, trainer.args.seed) and state["step"]:
        raise ValueError(
            f"{folder} was made with an effective batch of {batch} and seed {seed}, this run has "
            f"{trainer.effective_batch} and {trainer.args.seed}: other samples would follow"
        )


def point_to_interrupted(output_dir: Path, checkpoint: Path | None) -> None:
    """``interrupted_checkpoint``, the original's name, as a link to ``checkpoint``; None removes it.

    A link, so that it costs nothing; ``--resume_from_checkpoint auto`` finds the checkpoint under its own name anyway,
    also on a file system without links.
    """
    link = output_dir / INTERRUPTED
    if link.is_symlink():
        link.unlink()
    if checkpoint is not None and not link.exists():
        try:
            link.symlink_to(checkpoint.name, target_is_directory=True)
        except OSError:
            return


def evaluation_of(entries: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The evaluation of ``step`` in metrics.jsonl, or the last one."""
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    of_step = [entry for entry in evaluations if entry["step"] == step]
    return (of_step or evaluations or [{}])[-1]
