"""Searches how many warps each kernel should have on the GPU at hand and writes what is faster to kernels/_tuned.json.

    python scripts/tune.py                           what `make tune` runs
    python scripts/tune.py --only rms_norm_modulate  one op (may be repeated)
    python scripts/tune.py --dry-run                 the same logic on a CPU, through Triton's interpreter; writes
                                                     nothing unless --output says where

Every kernel that asks `kernels/_config.py` for its launch is tried with 1 to 16 warps at the model's widths, inside
CUDA graphs with a cold L2, all choices in turns (benchmarks/gpu_timing.py). A choice is kept where its results keep the
numerics contract and it is faster than the default by more than 3 % in the geometric mean over the batches.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels" / "_tuned.json"
WARPS = (1, 2, 4, 8, 16)
BATCHES = (1, 32, 256)
GAIN = 1.03
MODES = ("forward", "backward")
# The released networks' features are as wide as the network; those of the default configuration are not.
WIDTHS: dict[str, list[dict[str, Any]]] = {"flow_matching_loss": [{}, {"width": 768}]}

Key = tuple[str, int, int]  # kernel, width, capability
Choose = Callable[[str, int, int], dict[str, Any]]


@contextmanager
def chosen_by(choose: Choose) -> Iterator[list[Key]]:
    """Launches are configured by `choose` instead of the table; yields what was asked for."""
    from blip3o_fast.kernels import _config

    asked: list[Key] = []

    def tuned(kernel: str, width: int, capability: int) -> dict[str, Any]:
        asked.append((kernel, width, capability))
        return choose(kernel, width, capability)

    before = _config.tuned
    _config.tuned = tuned
    try:
        yield asked
    finally:
        _config.tuned = before


def defaults(kernel: str, width: int, capability: int) -> dict[str, Any]:
    return {}


def with_warps(key: Key, warps: int) -> Choose:
    return lambda *asked: {"num_warps": warps} if asked == key else {}


class Candidates:
    """One op, mode and batch: the default launch and others of one kernel, captured and checked."""

    def __init__(self, op: str, mode: str, batch: int, sizes: dict[str, Any], clock: Any, dtype: Any) -> None:
        from benchmarks.cases import module_of, work
        from benchmarks.gpu_timing import capture, prepared, written

        self.mode, self.clock = mode, clock
        self.work = work(module_of(op).case, batch, dtype, clock.device, triton=True, compile=False, **sizes)
        self.inputs = self.work.inputs()
        self.gold = self.work.gold(self.inputs)
        stock = capture(prepared(self.work.providers["eager"], self.inputs, mode), clock.device)
        self.baseline = written(stock, self.inputs)

    def keys(self) -> list[Key]:
        """The kernels of this mode that ask for their launch."""
        others: list[Key] = []
        if self.mode == "backward":  # whose capture runs a forward before, which is not in its time
            with chosen_by(defaults) as others:
                self._capture("forward")
        with chosen_by(defaults) as asked:
            self._capture()
        return sorted(set(asked) - set(others))

    def _capture(self, mode: str = "") -> Any:
        from benchmarks.gpu_timing import capture, prepared

        return capture(prepared(self.work.providers["ours"], self.inputs, mode or self.mode), self.clock.device)

    def times(self, choices: dict[str, Choose], rounds: int) -> dict[str, float]:
        """Median seconds of each choice; without those that break the contract or do not run."""
        from benchmarks.gpu_timing import written

        replays = {}
        for name, choose in choices.items():
            try:
                with chosen_by(choose):
                    replay = self._capture()
                    got = written(replay, self.inputs)
                verdict = self.work.judge(got, self.baseline, {n: self.gold[n] for n in got})
                problem = verdict.wrong or verdict.inexact
            except Exception as error:  # too many registers for so many warps, say
                problem = f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"
            if problem is not None:
                print(f"    {name}: {problem}", flush=True)
                continue
            replays[name] = replay
            if self.clock.device != "cuda":
                replays[name] = _under(choose, replay)
        return {name: timing.median for name, timing in self.clock.in_turns(replays, rounds).items()}


def _under(choose: Choose, replay: Any) -> Any:
    """Without a graph each run asks anew how to launch."""
    from benchmarks.gpu_timing import Replay

    def run() -> None:
        with chosen_by(choose):
            replay.run()

    return Replay(run, replay.result)


def better(times: list[dict[str, float]]) -> tuple[str, float] | None:
    """The choice with the best geometric mean of default / choice over the batches, where that is above GAIN."""
    if not times or any("default" not in batch for batch in times):
        return None
    gains = {}
    for name in set.intersection(*(set(batch) for batch in times)) - {"default"}:
        gains[name] = math.prod(batch["default"] / batch[name] for batch in times) ** (1 / len(times))
    name = max(gains, key=lambda n: gains[n], default=None)
    return None if name is None or gains[name] <= GAIN else (name, gains[name])


def save(path: Path, found: dict[str, dict[str, dict[str, Any]]], searched: set[tuple[str, str, str]]) -> None:
    """Entries that were searched are replaced, all others kept; written beside and renamed."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for capability, kernel, width in searched:
        table.get(capability, {}).get(kernel, {}).pop(width, None)
    for capability, kernels in found.items():
        for kernel, widths in kernels.items():
            table.setdefault(capability, {}).setdefault(kernel, {}).update(widths)
    table = {c: {k: w for k, w in sorted(kernels.items()) if w} for c, kernels in sorted(table.items())}
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps({c: k for c, k in table.items() if k}, indent=1) + "\n")
    os.replace(beside, path)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="OP", help="only this op's kernels")
    parser.add_argument("--output", type=Path, help="the table (kernels/_tuned.json)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds of the whole search (540)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, the host's clock")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options, start = parse(arguments), time.monotonic()
    sys.path.insert(0, str(ROOT))
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("this PyTorch sees no CUDA device (--dry-run checks the logic on a CPU)", file=sys.stderr)
        return 2
    from benchmarks import gpu_rows
    from benchmarks.cases import OPS, WITHOUT_KERNELS, module_of
    from benchmarks.gpu_timing import Clock

    clock = Clock("cpu" if options.dry_run else "cuda")
    batches, rounds = ((1, 2), 5) if options.dry_run else (BATCHES, 30)
    dtype = torch.float16 if options.dry_run else torch.bfloat16  # numpy knows no bfloat16
    path = options.output or (None if options.dry_run else TABLE)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    searched: set[tuple[str, str, str]] = set()
    ops = [op for op in OPS if op not in WITHOUT_KERNELS and (not options.only or op in options.only)]
    for op, mode in [(op, mode) for op in ops for mode in MODES]:
        for given in WIDTHS.get(op, [{}]):
            if time.monotonic() - start > options.budget:
                print(f"left out: {op} {mode} {given or ''}", flush=True)
                continue
            sizes = {**given, **(module_of(op).SMALL if options.dry_run else {})}
            keys = Candidates(op, mode, batches[0], sizes, clock, dtype).keys()
            if not keys:
                print(f"{op} {mode}: nothing to choose", flush=True)
            for key in keys:
                kernel, width, capability = key
                choices = {"default": defaults, **{str(n): with_warps(key, n) for n in WARPS}}
                times = []
                for batch in batches:
                    times.append(Candidates(op, mode, batch, sizes, clock, dtype).times(choices, rounds))
                    gpu_rows.release(clock.device)
                    told = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in times[-1].items())
                    print(f"{kernel} width {width} batch {batch}, us by warps: {told}", flush=True)
                searched.add((str(capability), kernel, str(width)))
                choice = better(times)
                if choice is not None:
                    print(f"  {kernel} width {width}: {choice[0]} warps, {choice[1]:.2f}x the default", flush=True)
                    widths = found.setdefault(str(capability), {}).setdefault(kernel, {})
                    widths[str(width)] = {"num_warps": int(choice[0])}
                if path is not None:
                    save(path, found, searched)
    kept = sum(len(widths) for kernels in found.values() for widths in kernels.values())
    print(f"{kept} of {len(searched)} launches are faster otherwise" + ("" if path is None else f": {path}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
