"""Cost against batch, tokens, depth, width and world size: measured here, and what the written model says beside it.

Each axis varies one size and keeps the others small. Every point is checked against fp64 and timed by the harness. The
model (cost_model.py) has this run's own ceilings; the time of a launch is that of the least block, and the share of the
ceilings that is reached is taken at one point of the batch axis. Every other prediction is made from these alone.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import cost_model, machine, model_block, model_step
from benchmarks.harness import Settings, measure
from benchmarks.work import Work
from blip3o_fast.files import replacing
from blip3o_fast.models import BLIP3oConfig
from blip3o_fast.timing import interleaved

CONTEXT = model_block.CONTEXT_TOKENS
PROVIDERS = ("eager", "ours")
BASE = {"batch": 4, "tokens": 64, "width": 512}
ALONE = {"tokens": {"batch": 1}}  # changes of the base on an axis, so that the largest point fits
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "tokens": (16, 64, 256, 1024, 4096),
    "width": (256, 512, 1024, 1792, 2304),
    "depth": (1, 2, 4),
}
PAYLOADS = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)  # bytes of fp32 gradients, all-reduced
MOST_FLOPS = 150e9  # of a forward, beyond which a point is measured forward alone


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured: one block, or with `depth` a network of so many in sampling, batch rows at once."""

    axis: str
    value: int
    batch: int
    tokens: int
    width: int
    depth: int = 0

    def config(self) -> BLIP3oConfig:
        # heads of 64 channels, at width 2304 of 72 as the stock class has them
        heads = 32 if self.width == 2304 else max(1, self.width // 64)
        side = round(self.tokens**0.5)
        sizes: dict[str, Any] = {"hidden_size": self.width, "num_attention_heads": heads, "sample_size": side}
        return BLIP3oConfig(num_layers=max(1, self.depth), in_channels=64, cross_attention_dim=self.width, **sizes)

    def modes(self) -> tuple[str, ...]:
        if self.depth or cost_model.block_flops(self.config(), self.batch, CONTEXT) > MOST_FLOPS:
            return ("forward",)
        return ("forward", "both")

    def work(self) -> Work:
        shape = (self.batch, torch.float32, "cpu", self.config())
        if self.depth:
            made = model_step.work(*shape, compile=False)
        else:
            made = model_block.work(*shape, compile=False, modes=self.modes())
        return dataclasses.replace(made, providers={name: made.providers[name] for name in PROVIDERS})

    def cost(self, provider: str, mode: str) -> cost_model.Cost:
        of = cost_model.model_cost if self.depth else cost_model.block_cost
        return of(self.config(), self.batch, CONTEXT, provider, mode, 4)


def points(axes: dict[str, tuple[int, ...]] = AXES, base: dict[str, int] = BASE) -> list[Point]:
    found = []
    for axis, sizes in axes.items():
        for value in sizes:
            found.append(Point(axis, value, **{**base, **ALONE.get(axis, {}), axis: value}))
    return found


# The least block: all launches, next to no work.
LEAST = Point("launch", 1, batch=1, tokens=4, width=64)


def timed(point: Point, settings: Settings, ceilings: machine.Ceilings | None) -> Iterator[dict[str, Any]]:
    for rows, _ in measure(point.work(), settings, ceilings):
        for row in rows:
            kept = "mode provider status reason median_s p20_s p80_s rounds speedup".split()
            yield {**dataclasses.asdict(point), **{name: row[name] for name in kept}}


def _rank(rank: int, world: int, payloads: tuple[int, ...], rounds: int, folder: str) -> None:
    """One process of the world: all-reduces of fp32 buffers, in turns, checked; rank 0 writes the rows."""
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    buffers = {size: torch.full((size // 4,), 1.0) for size in payloads}
    wrong = []
    for size, buffer in buffers.items():
        buffer.fill_(rank + 1.0)
        distributed.all_reduce(buffer)
        if not bool((buffer == world * (world + 1) / 2).all()):
            wrong.append(size)
        buffer.zero_()  # so that sums of sums stay finite

    def run(size: int) -> Callable[[], Any]:
        return lambda: distributed.all_reduce(buffers[size])

    result = interleaved({str(size): run(size) for size in payloads}, rounds=rounds)
    if rank == 0:
        rows = [
            {"axis": "world", "value": world, "payload": size, "median_s": result[str(size)].median}
            | {"p20_s": result[str(size)].p20, "p80_s": result[str(size)].p80, "rounds": rounds}
            | {"status": "FAILED" if size in wrong else "ok", "sent": cost_model.all_reduce_bytes(size, world)}
            for size in payloads
        ]
        Path(folder, "rows.json").write_text(json.dumps(rows))
    distributed.barrier()
    distributed.destroy_process_group()


def all_reduces(world: int, rounds: int, payloads: tuple[int, ...] = PAYLOADS) -> list[dict[str, Any]]:
    """Processes on this machine, joined by gloo. A world of 1 sends nothing and is measured all the same."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, payloads, rounds, folder), nprocs=world)  # type: ignore[no-untyped-call]
        found: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return found


def save(data: dict[str, Any], path: Path) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(data, indent=1) + "\n")


def run(
    settings: Settings,
    chosen: list[Point],
    worlds: tuple[int, ...],
    keep: Callable[[dict[str, Any]], Any] = lambda data: None,
) -> dict[str, Any]:
    """Everything measured: the machine's stamp and ceilings, rows of points and of all-reduces.

    keep: called with what there is after every point. Ctrl-C ends the measurement, not what was measured.
    """
    ceilings = machine.Ceilings()
    data: dict[str, Any] = {"stamp": machine.stamp(), "rows": []}
    try:
        for point in [LEAST, *chosen]:
            print(f"{point.axis} {point.value}", file=sys.stderr, flush=True)
            data["rows"] += timed(point, settings, ceilings)
            data["ceilings"] = ceilings.finish()
            keep(data)
        for world in worlds:
            print(f"world {world}", file=sys.stderr, flush=True)
            data["rows"] += all_reduces(world, settings.min_rounds)
            keep(data)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far", file=sys.stderr)
    return {**data, "ceilings": ceilings.finish()}


def main(arguments: list[str]) -> int:
    from benchmarks import scaling_report as report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds at least (5)")
    parser.add_argument("--seconds", type=float, default=0.3, help="timed seconds per provider and mode (0.3)")
    parser.add_argument("--axis", action="append", choices=[*AXES, "world"], help="only this axis (may be repeated)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--read", type=Path, help="measure nothing: the tables and plots of such a file")
    parser.add_argument("--figures", type=Path, help="folder of the plots to write (none)")
    parser.add_argument("--page", type=Path, help="page whose measured part is replaced (docs/perf/scaling.md)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not options.seconds > 0:
        parser.error(f"--rounds and --seconds must be above 0, got {options.rounds} and {options.seconds}")
    if options.page is not None and not options.page.is_file():
        parser.error(f"argument --page: {options.page} is not a file")
    if options.read is not None:
        if not options.read.is_file():
            parser.error(f"argument --read: {options.read} is not a file")
        data = json.loads(options.read.read_text())
    else:
        axes = options.axis or [*AXES, "world"]
        start = time.perf_counter()
        # "batch" holds the point at which the share of the ceilings is taken
        chosen = [p for p in points() if p.axis in axes or p == report.REFERENCE]
        settings = Settings(min_rounds=options.rounds, max_time=options.seconds)
        keep = (lambda data: save(data, options.json)) if options.json is not None else (lambda data: None)
        data = run(settings, chosen, (1, 2) if "world" in axes else (), keep)
        data["seconds"] = time.perf_counter() - start
    if options.json is not None:
        save(data, options.json)
    print(report.tables(data))
    pictures = [] if options.figures is None else list(report.draw(data, options.figures))
    for path in pictures:
        print(path)
    if options.page is not None:
        report.write_page(data, options.page, pictures)
    return int(any(row["status"] != "ok" for row in data["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
