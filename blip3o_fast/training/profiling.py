"""`--profile_steps 10:15`: what the time of some steps goes to, as a trace file and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blip3o_fast.files import replacing

FOLDER = "profile"
_NAME_WIDTH = 60


class ProfileSteps(TrainerCallback):
    """Profiles the steps ``first`` to ``last``, both included, on the main process.

    Leaves ``profile/steps_FIRST-LAST.json`` (open it in https://ui.perfetto.dev or chrome://tracing) and the table
    ``.txt`` in the run's folder, and prints the table. The evaluations, logs and checkpoints of the steps between are
    in the trace too.
    """

    def __init__(self, first: int, last: int, output_dir: Path) -> None:
        self.first, self.last = first, last
        self.path = output_dir / FOLDER / f"steps_{first}-{last}.json"
        self.profiler: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run continued within the range profiles the rest of it.
        inside = self.first <= state.global_step + 1 <= self.last
        if state.is_world_process_zero and self.profiler is None and inside:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if args.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.profiler is not None and (state.global_step >= self.last or control.should_training_stop):
            self._finish()

    def _finish(self) -> None:
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as beside:
            profiler.export_chrome_trace(str(beside))
        table = longest(profiler.key_averages())
        with replacing(self.path.with_suffix(".txt")) as beside:
            beside.write_text(table + "\n")
        print(f"{table}\ntrace: {self.path}", flush=True)


def longest(events: Iterable[Any], count: int = 10) -> str:
    """The ``count`` GPU kernels, or without a GPU the operations, that took longest by themselves, as a table.

    events: of torch's ``profiler.key_averages()``.
    """
    everything = [event for event in events if not event.key.startswith("ProfilerStep")]
    kernels = [event for event in everything if event.device_type.name != "CPU"]
    rows = (
        [(event.key, event.count, event.self_device_time_total) for event in kernels]
        if kernels
        else [(event.key, event.count, event.self_cpu_time_total) for event in everything]
    )
    total = sum(microseconds for _, _, microseconds in rows) or 1.0
    rows.sort(key=lambda row: -row[2])
    what = "kernel" if kernels else "operation"
    lines = [f"{'longest ' + what + 's':{_NAME_WIDTH}} {'calls':>7} {'ms':>10} {'share':>7}"]
    for name, calls, microseconds in rows[:count]:
        shown = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
        lines.append(f"{shown:{_NAME_WIDTH}} {calls:>7} {microseconds / 1000:>10.2f} {microseconds / total:>7.1%}")
    return "\n".join(lines)
