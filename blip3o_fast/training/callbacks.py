"""What happens around the steps: averaging, clean stops, metrics.jsonl, progress."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blip3o_fast.training import checkpoints

if TYPE_CHECKING:
    from blip3o_fast.training.trainer import BLIP3oTrainer


class StopRequest:
    """Set by Ctrl-C or a scheduler's SIGTERM: finish the step, write a whole checkpoint, stop."""

    def __init__(self) -> None:
        self.requested = False
        self._group: Any = None

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop. Every rank must call this at the same steps.

        A signal reaches the ranks at different steps, or only one of them; a rank that stopped alone would leave the
        others waiting for its gradients. With GPUs the question goes from host to host, in a group of its own: a flag
        on the device would make every host wait for its step to end.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None and device.type == "cuda":
                self._group = dist.new_group(backend="gloo")
            flag = torch.tensor(int(self.requested), dtype=torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            self.requested = bool(flag)
        return self.requested

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the first signal; a second Ctrl-C stops at once, and what it cuts off is never taken for whole."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request(number: int, frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(number, before[signal.Signals(number)])
            print("\nstopping after this step, with a checkpoint (again: stop at once)", file=sys.stderr, flush=True)

        for number in before:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class EachStep(TrainerCallback):
    """What BLIP3oTrainer itself has to do around a step: gradient check, weight average, step times, true epoch."""

    def __init__(self, trainer: BLIP3oTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.clock.start(self.trainer.samples_seen())  # the first step, not the construction

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.check_grad_norm()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.watch.reads_are_free:
            trainer.tell_bad_steps()
        if trainer.ema is not None:
            trainer.ema.update(trainer.model)
        trainer.clock.step()
        # The Trainer counts one endless epoch.
        state.epoch = trainer.samples_seen() / trainer.order.n


class StepCallback(TrainerCallback):
    """Of a whole run: clean stop, last evaluation, old checkpoints."""

    def __init__(self, trainer: BLIP3oTrainer, stop: StopRequest, keep: int | None, *, keep_best: bool = False) -> None:
        self.trainer, self.stop, self.keep, self.keep_best = trainer, stop, keep, keep_best

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = self.trainer.validation is not None
        elif self.stop.agreed(args.device):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not while steps are bad: what they come from may be in the newest checkpoint, and the good one must stay.
        if args.should_save and not self.trainer.watch.row:
            checkpoints.rotate(Path(args.output_dir), self.keep, keep_best=self.keep_best)


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one JSON object per log, with the step and the seconds since this process began to train."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            checkpoints.truncate_metrics(self.path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer's summary at the end says nothing that is not logged, and has a wrong loss after a continuation.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        entry = {"step": state.global_step, **logs, "seconds": round(time.perf_counter() - self.started, 3)}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Progress(TrainerCallback):
    """A bar on a terminal; elsewhere one plain line per log, so that a redirected output stays readable."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.begun = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun, self.first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs and self.bar is not None:
            shown = {"loss": f"{logs['loss']:.4f}"}
            if "loss_over_linear" in logs:
                shown["x linear"] = f"{logs['loss_over_linear']:.2f}"
            self.bar.set_postfix(shown)
        elif "loss" in logs:
            print(self._line(state, logs), flush=True)
        elif "eval_loss" in logs:
            line = _evaluation_line(state, logs)
            if self.bar is not None:
                self.bar.write(line)
            else:
                print(line, flush=True)

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        done = state.global_step - self.first_step
        each = (time.perf_counter() - self.begun) / max(done, 1)
        left = int(each * (state.max_steps - state.global_step))
        parts = [_step(state), f"loss {logs['loss']:.4f}"]
        if "loss_over_linear" in logs:
            parts.append(f"{logs['loss_over_linear']:.2f} x linear")
        if "grad_norm" in logs:
            parts.append(f"grad {logs['grad_norm']:.2f}")
        parts += [f"lr {logs['learning_rate']:.1e}", f"{each:.2f} s/step"]
        if "samples_per_second" in logs:
            parts.append(f"{logs['samples_per_second']:.3g} samples/s")
        if "mfu" in logs:
            parts.append(f"MFU {logs['mfu']:.0%}")
        if logs.get("data_wait", 0) >= 0.05:
            parts.append(f"{logs['data_wait']:.0%} of it waiting for data")
        parts.append(f"left {left // 60}:{left % 60:02d}")
        return " | ".join(parts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is; called again after an exception."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _step(state: TrainerState) -> str:
    width = len(str(state.max_steps))
    return f"step {state.global_step:>{width}}/{state.max_steps}"


def _evaluation_line(state: TrainerState, logs: dict[str, Any]) -> str:
    parts = [_step(state), f"held-out loss {logs['eval_loss']:.4f}"]
    if "eval_loss_over_linear" in logs:
        parts.append(f"{logs['eval_loss_over_linear']:.2f} x linear")
    if "eval_token_cosine" in logs:
        parts.append(f"generated token cosine {logs['eval_token_cosine']:.3f}")
    if "eval_recall_at_1" in logs:
        beside = f"chance {logs['eval_recall_at_1_chance']:.2f}"
        if "eval_recall_at_1_ridge" in logs:
            beside += f", ridge {logs['eval_recall_at_1_ridge']:.2f}"
        parts.append(f"recall@1 {logs['eval_recall_at_1']:.2f} ({beside})")
    return " | ".join(parts)
