"""What watching a training run costs, as a share of its steps.

A run of its own on random embeddings is trained as `blip3o-fast train` trains, and the time of everything that only
watches is added up: the log with its callbacks (metrics.jsonl, progress, trackers), the sums of the loss's metrics, the
clock. The difference of two runs, with and without, would be smaller than what a shared machine scatters.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.models.config import PRESETS
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.clock import StepClock
from blip3o_fast.training.run import train
from blip3o_fast.training.trainer import BLIP3oTrainer

PICTURES, TOKENS = 64, 64


@dataclass
class Spent:
    """seconds of all calls of a function that it wraps."""

    seconds: float = 0.0
    calls: int = 0

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun
                self.calls += 1

        return timed


@dataclass(frozen=True)
class Overhead:
    """step: seconds of a median step. per_log and per_step: seconds of watching."""

    step: float
    per_log: float
    per_step: float

    def share(self, logging_steps: int) -> float:
        """Of a step's time, with a log every so many steps."""
        return (self.per_step + self.per_log / logging_steps) / self.step


def waiting_cost(rounds: int = 10_000) -> float:
    """Seconds of the clock around the loader: too short to be timed inside a run."""
    clock = StepClock(torch.device("cpu"))
    begun = time.perf_counter()
    for _ in range(rounds):
        with clock.waiting():
            pass
    return (time.perf_counter() - begun) / rounds


def measure(folder: Path, **settings: Any) -> Overhead:
    """Train in ``folder`` (empty), with a log at every step. settings: of `TrainSettings`."""
    log, losses, alone, step = Spent(), Spent(), Spent(), Spent()
    originals = {name: getattr(BLIP3oTrainer, name) for name in ("__init__", "compute_loss", "log")}
    times: list[float] = []

    def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
        originals["__init__"](trainer, *args, **kwargs)
        trainer.loss_function = alone.timing(trainer.loss_function)
        trainer.clock.step = step.timing(trainer.clock.step)

    def logged(trainer: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        first = not times
        (Spent() if first else log).timing(originals["log"])(trainer, logs, *args, **kwargs)  # the first sets up
        if "step_seconds" in logs:
            times.append(logs["step_seconds"])

    BLIP3oTrainer.__init__, BLIP3oTrainer.log = init, logged  # type: ignore[method-assign]
    BLIP3oTrainer.compute_loss = losses.timing(originals["compute_loss"])  # type: ignore[method-assign]
    try:
        train(TrainSettings(folder / "embeddings", folder / "run", logging_steps=1, eval_split=0.0, **settings))
    finally:
        for name, original in originals.items():
            setattr(BLIP3oTrainer, name, original)
    per_step = (losses.seconds - alone.seconds + step.seconds) / step.calls + waiting_cost()
    # The log reads the loss, and so waits for a device's step: that time is the step's.
    return Overhead(sorted(times)[len(times) // 2], log.seconds / log.calls, per_step)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logging_overhead", description=__doc__)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS), help="the network (small)")
    parser.add_argument("--batch_size", type=int, default=32, help="samples of a step (32)")
    parser.add_argument("--steps", type=int, default=30, help="to train (30)")
    parser.add_argument("--report_to", default="none", help="wandb, tensorboard, both with a comma, or none (none)")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"argument --steps: must be at least 3, got {options.steps}")
    size = {"in_channels": 768, "cross_attention_dim": 1280} | PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "embeddings").mkdir()
        meta = Meta(EncoderInfo("a", size["cross_attention_dim"]), EncoderInfo("b", size["in_channels"]), tokens=TOKENS)
        features = [torch.randn(PICTURES, TOKENS, size[side]) for side in ("cross_attention_dim", "in_channels")]
        keys = [str(k) for k in range(PICTURES)]
        ShardWriter(folder / "embeddings", meta).write(0, *features, keys, keys, "random")
        found = measure(
            folder,
            preset=options.preset,
            batch_size=options.batch_size,
            max_steps=options.steps,
            save_steps=10**9,
            report_to=options.report_to,
        )
    stamp = machine.stamp()
    print(f"{stamp['cpu']['model']}, {stamp['threads']} threads, commit {stamp['commit']}")
    print(f"{options.preset}, {options.batch_size} samples a step, report_to {options.report_to}")
    print(f"step {found.step * 1e3:.1f} ms, watching {found.per_step * 1e6:.0f} us a step and ", end="")
    print(f"{found.per_log * 1e3:.2f} ms a log: " + ", ".join(
        f"{found.share(every):.3%} with a log every {every} steps" for every in (1, 10, 100)
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
