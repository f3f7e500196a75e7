"""What `benchmarks/scaling.py` measured, as tables in Markdown and as plots, the written model beside each point."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cost_model
from benchmarks.cost_model import Machine
from benchmarks.scaling import BASE, Point
from blip3o_fast.files import replacing
from blip3o_fast.models import BLIP3oConfig

REFERENCE = Point("batch", BASE["batch"], **BASE)
IMAGES = 60_000_000
MFUS = (0.35, 0.55)
FLEETS = ((8, 256), (64, 32), (64, 256))  # GPUs, samples on each
# Okabe and Ito's colours, told apart with every kind of colour vision; the markers tell them apart without colour.
LOOKS = {"eager": ("#E69F00", "s"), "ours": ("#0072B2", "o")}
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
Key = tuple[str, str]  # provider, mode


def point_of(row: dict[str, Any]) -> Point:
    return Point(**{name: row[name] for name in ("axis", "value", "batch", "tokens", "width", "depth")})


def blocks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of points, not of all-reduces, that have a time."""
    return [row for row in data["rows"] if row["axis"] != "world" and row.get("median_s") is not None]


class Model:
    """The machine of this run, and for each provider and mode the time of a launch and the share that is reached."""

    def __init__(self, data: dict[str, Any]) -> None:
        ceilings = data["ceilings"]
        flops, bandwidth = (1e9 * ceilings[name] for name in ("fma_gflops", "copy_gbps"))
        self.machine = Machine("this CPU", "ceilings of this run", flops, bandwidth, 0.0, 0.0)
        self.launch: dict[Key, float] = {}
        self.share: dict[Key, float] = {}
        for row in blocks(data):
            if row["axis"] == "launch":
                cost = point_of(row).cost(row["provider"], row["mode"])
                # of a quiet moment: a neighbour's burst here would be in every prediction
                self.launch[row["provider"], row["mode"]] = row["p20_s"] / cost.launches
        for row in blocks(data):
            key = row["provider"], row["mode"]
            if point_of(row) == REFERENCE and key in self.launch:
                cost = REFERENCE.cost(*key)
                rest = row["median_s"] - cost.launches * self.launch[key]
                if rest > 0:  # else the launches alone explain more than was measured: there is no prediction
                    self.share[key] = cost_model.seconds(cost, self.machine) / rest

    def seconds(self, point: Point, key: Key) -> float | None:
        if key not in self.share:
            return None
        launches = point.cost(*key).launches * self.launch[key]
        return cost_model.seconds(point.cost(*key), self.machine, self.share[key]) + launches


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def axis_table(data: dict[str, Any], model: Model, axis: str, mode: str) -> Iterator[str]:
    rows = [row for row in blocks(data) if row["axis"] == axis and row["mode"] == mode]
    if not rows:
        return
    names = "eager (p20 .. p80) | model | error | ours (p20 .. p80) | model | error | ratio | GFLOP/s, eager | ours"
    yield f"| {axis} | {names} |"
    yield "|---" * 10 + "|"
    for value in dict.fromkeys(row["value"] for row in rows):
        cells, rates, speedup = [str(value)], [], "-"
        for provider in LOOKS:
            row = next((r for r in rows if r["value"] == value and r["provider"] == provider), None)
            if row is None:
                cells += ["FAILED", "-", "-"]
                rates.append("-")
                continue
            point, key = point_of(row), (provider, mode)
            predicted = model.seconds(point, key)
            cells.append(f"{duration(row['median_s'])} ({duration(row['p20_s'])} .. {duration(row['p80_s'])})")
            if predicted is None:
                cells += ["-", "-"]
            else:
                error = f"{predicted / row['median_s'] - 1:+.0%}"
                cells += [duration(predicted), "fitted" if point == REFERENCE else error]
            rates.append(f"{point.cost(*key).flops / row['median_s'] * 1e-9:.0f}")
            if provider == "ours" and row["speedup"] is not None:
                speedup = f"{row['speedup']:.2f}"
        yield "| " + " | ".join([*cells, speedup, *rates]) + " |"


def errors(data: dict[str, Any], model: Model) -> Iterator[str]:
    """How far off the model is, where it was not fitted: median and worst of the points of each axis."""
    yield "| axis | mode | provider | points | median error | worst |"
    yield "|---" * 6 + "|"
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in blocks(data):
        point, key = point_of(row), (row["provider"], row["mode"])
        predicted = model.seconds(point, key)
        if predicted is not None and point != REFERENCE and row["axis"] != "launch":
            found.setdefault((row["axis"], row["mode"], row["provider"]), []).append(predicted / row["median_s"] - 1)
    for (axis, mode, provider), offs in found.items():
        middle = sorted(map(abs, offs))[len(offs) // 2]
        yield f"| {axis} | {mode} | {provider} | {len(offs)} | {middle:.0%} | {max(offs, key=abs):+.0%} |"


def world_table(data: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in data["rows"] if row["axis"] == "world"]
    if not rows:
        return
    yield "| world | fp32 gradients | sent by each | time (p20 .. p80) | GB/s sent | model | error |"
    yield "|---" * 7 + "|"
    for world in dict.fromkeys(row["value"] for row in rows):
        of = [row for row in rows if row["value"] == world]
        # a line through the least and the largest payload; those between are predicted
        first, last = of[0], of[-1]
        slope = (last["median_s"] - first["median_s"]) / max(last["sent"] - first["sent"], 1)
        for row in of:
            line = first["median_s"] + slope * (row["sent"] - first["sent"])
            fitted = "fitted" if row in (first, last) else f"{line / row['median_s'] - 1:+.0%}"
            model = ["-", "-"] if world == 1 else [duration(line), fitted]
            rate = "-" if world == 1 else f"{row['sent'] / row['median_s'] * 1e-9:.2f}"
            spread = f"{duration(row['p20_s'])} .. {duration(row['p80_s'])}"
            cells = [f"{row['payload'] / 2**20:.0f} MiB", f"{row['sent'] / 2**20:.0f} MiB"]
            cells += [f"{duration(row['median_s'])} ({spread})", rate, *model]
            yield (
                f"| {world} | "
                + " | ".join(cells if row["status"] == "ok" else [*cells[:2], "FAILED", *"----"][:6])
                + " |"
            )


def epoch_table() -> Iterator[str]:
    """An output of the model for machines that were not measured."""
    yield (
        "| preset | parameters | GPUs | samples per GPU | steps | MFU (at most: ours, eager) | hours | GPU-hours "
        "| all-reduce, not hidden | data, MB/s |"
    )
    yield "|---" * 10 + "|"
    for preset in ("blip3o-4b", "blip3o-8b"):
        config = BLIP3oConfig.preset(preset)
        for gpus, each in FLEETS:
            ours, eager = (cost_model.most_mfu(config, each, name) for name in ("ours", "eager"))
            for mfu in dict.fromkeys(min(mfu, ours) for mfu in MFUS):
                epoch = cost_model.training_epoch(config, IMAGES, each, gpus, mfu)
                yield (
                    f"| {preset} | {cost_model.parameters(config) / 1e9:.3f} B | {gpus} | {each} | {epoch.steps} "
                    f"| {mfu:.0%} ({ours:.0%}, {eager:.0%}) | {epoch.hours:.2f} | {epoch.gpu_hours:.0f} "
                    f"| {epoch.communication:.1%} | {epoch.data * 1e-6:.0f} |"
                )


def counts_table() -> Iterator[str]:
    """Of a training step's forward and backward in bfloat16 with 32 samples, as the model has them."""
    yield "| preset, batch 32 | TFLOP | bytes, ours | bytes, eager | launches, ours | eager | gradients all-reduced |"
    yield "|---" * 7 + "|"
    for preset in ("blip3o-4b", "blip3o-8b"):
        config = BLIP3oConfig.preset(preset)
        ours, eager = (cost_model.model_cost(config, 32, 64, name, "both", 2) for name in ("ours", "eager"))
        yield (
            f"| {preset} | {ours.flops * 1e-12:.1f} | {ours.bytes * 1e-9:.0f} GB | {eager.bytes * 1e-9:.0f} GB "
            f"| {ours.launches} | {eager.launches} | {4e-9 * cost_model.parameters(config):.2f} GB |"
        )


def tables(data: dict[str, Any]) -> str:
    stamp, ceilings, model = data["stamp"], data["ceilings"], Model(data)
    load = stamp["load_average_at_start"]
    lines = [
        f"- {stamp['cpu']['model']}, {stamp['threads']} threads, {stamp['isa']}, PyTorch {stamp['versions']['torch']}",
        f"- commit {stamp['commit']}{', uncommitted' if stamp['dirty'] else ''}, load average {load:.1f} at the start",
        f"- ceilings: {ceilings['fma_gflops']:.0f} GFLOP/s fp32, {ceilings['copy_gbps']:.0f} GB/s copied",
    ]
    for (provider, mode), share in model.share.items():
        launch = 1e6 * model.launch[provider, mode]
        lines.append(f"- {provider}, {mode}: {launch:.1f} us a launch, {share:.0%} of the ceilings at the fitted point")
    failed = [row for row in data["rows"] if row["status"] != "ok"]
    lines += [f"- {row['axis']} {row['value']}: {row['status']}: {row.get('reason')}" for row in failed]
    for axis in ("batch", "tokens", "width", "depth"):
        for mode in ("forward", "both"):
            made = list(axis_table(data, model, axis, mode))
            title = f"### By {axis}, {'forward and backward' if mode == 'both' else mode}"
            lines += ["", title, "", *made] if made else []
    lines += ["", "### Errors of the model", "", *errors(data, model)]
    lines += ["", "### By world size", "", *world_table(data)]
    lines += ["", "### Counts of the model", "", *counts_table()]
    lines += ["", f"### {IMAGES:,} images on H100s: the model's output, not a measurement", "", *epoch_table()]
    return "\n".join(lines)


PICTURES = {
    "batch": "Time of a block against the batch: points measured, lines the model's",
    "tokens": "Time of a block against the number of tokens: points measured, lines the model's",
}


def write_page(data: dict[str, Any], path: Path, pictures: Sequence[Path] = ()) -> None:
    """Put the tables, and links to the plots, into a page, between its two marks. ValueError where it has none."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must have one line {BEGIN} and one line {END}")
    before, rest = text.split(BEGIN)
    links = "".join(
        f"\n![{PICTURES[picture.stem.removeprefix('scaling_')]}]({os.path.relpath(picture, path.parent)})\n"
        for picture in pictures
    )
    with replacing(path) as beside:
        beside.write_text(f"{before}{BEGIN}\n\n{tables(data)}\n{links}\n{END}{rest.split(END)[1]}")


def draw(data: dict[str, Any], folder: Path) -> Iterator[Path]:
    """A file each for batch and tokens: points are measured, lines are the model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = Model(data)
    folder.mkdir(parents=True, exist_ok=True)
    for axis, others in (("batch", "64 tokens, width 512"), ("tokens", "batch 1, width 512")):
        rows = [row for row in blocks(data) if row["axis"] == axis]
        if not rows:
            continue
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
        for axes, (mode, title) in zip(panels, (("forward", "forward"), ("both", "forward and backward")), strict=True):
            for provider, (colour, marker) in LOOKS.items():
                of = [row for row in rows if row["mode"] == mode and row["provider"] == provider]
                values = [row["value"] for row in of]
                seconds = [1e3 * row["median_s"] for row in of]
                spread = [[s - 1e3 * r["p20_s"] for s, r in zip(seconds, of, strict=True)]]
                spread += [[1e3 * r["p80_s"] - s for s, r in zip(seconds, of, strict=True)]]
                axes.errorbar(
                    values, seconds, spread, fmt=marker, color=colour, capsize=3, label=f"{provider}, measured"
                )
                lines = [model.seconds(point_of(row), (provider, mode)) for row in of]
                if None not in lines:
                    drawn = [1e3 * s for s in lines if s is not None]
                    axes.plot(values, drawn, color=colour, linewidth=1.6, label=f"{provider}, model")
            axes.set(xscale="log", yscale="log", title=title, xlabel=f"{axis} ({others})")
            every = sorted({row["value"] for row in rows if row["mode"] == mode})
            axes.set_xticks(every, [str(value) for value in every])
            axes.minorticks_off()
            axes.grid(color="0.85", linewidth=0.6)
        panels[0].set_ylabel("time of one block, ms")
        panels[0].legend(fontsize=9)
        path = folder / f"scaling_{axis}.png"
        figure.savefig(path, dpi=120, facecolor="white")
        pyplot.close(figure)
        yield path
