"""Trackers beside metrics.jsonl: wandb and TensorBoard. Each is the Trainer's own callback, told where and under which
name to write, and to go on where a continued run left off.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import ExportableState

from blip3o_fast import env
from blip3o_fast.training.arguments import TrainSettings, trackers_named
from blip3o_fast.training.trainer_args import wandb_is_ready

_STATE = "trainer_state.json"


def trackers(settings: TrainSettings, resume: Path | None) -> tuple[list[Any], str]:
    """The callbacks that the settings ask for, and one line on why wandb is off, or "".

    Without ``--report_to``: wandb where it is installed and logged in (or WANDB_MODE says offline).
    Raises ValueError naming the flag where a tracker that was asked for cannot run.
    """
    named = trackers_named(settings.report_to)
    if named is None:
        ready, reason = (False, "") if settings.no_wandb else wandb_is_ready()
        return ([_wandb(settings, resume)], "") if ready else ([], reason)
    made: list[Any] = []
    if "tensorboard" in named:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError('--report_to tensorboard: not installed; pip install "blip3o_fast[tensorboard]"')
        made.append(EventFile(Path(settings.output_dir) / "tensorboard"))
    if "wandb" in named:
        ready, reason = wandb_is_ready()
        if not ready:
            raise ValueError(f"--report_to wandb: {reason}")
        made.append(_wandb(settings, resume))
    return made, ""


def _wandb(settings: TrainSettings, resume: Path | None) -> WandbRun:
    return WandbRun(
        {
            "project": env.read("WANDB_PROJECT") or settings.wandb_project,
            "dir": env.read("WANDB_DIR") or str(settings.output_dir),
            "name": settings.wandb_run_name or Path(settings.output_dir).name,
            "config": settings.to_dict(),
        },
        run_id_of(resume) if resume else None,
    )


def run_id_of(checkpoint: Path) -> str | None:
    """The wandb run that a checkpoint belongs to, None where it had none."""
    try:
        stored = json.loads((checkpoint / _STATE).read_text())["stateful_callbacks"][WandbRun.__name__]
        return str(stored["attributes"]["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class WandbRun(WandbCallback, ExportableState):
    """The Trainer's wandb callback in a run of its own, whose id every checkpoint holds (trainer_state.json).

    init: arguments of wandb.init. run_id: of the run to go on with, None for a new one.
    """

    def __init__(self, init: dict[str, Any], run_id: str | None = None) -> None:
        super().__init__()
        self.init, self.run_id = init, run_id or uuid.uuid4().hex[:8]

    def state(self) -> dict[str, Any]:
        return {"args": {"init": self.init}, "attributes": {"run_id": self.run_id}}

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._wandb.run is None:
            self._wandb.init(id=self.run_id, resume="allow", **self.init)
        super().setup(args, state, model, **kwargs)
        if self._wandb.run is not None:
            self.run_id = self._wandb.run.id

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # A run that began without wandb has no place for it in its state.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero and self._wandb.run is not None:
            self._wandb.finish()


class EventFile(TensorBoardCallback):
    """The Trainer's TensorBoard callback, writing into ``folder``; a continued run replaces what it trains again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.tb_writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)
        kwargs.pop("model", None)  # its configuration is no PretrainedConfig
        super().on_train_begin(args, state, control, **kwargs)
