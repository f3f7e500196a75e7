"""report.html in a run's folder: what was trained, whether the loss is normal, how good the samples are.

One self-contained page made from metrics.jsonl and run.json. Each number and figure says what it is and whether it is
good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from blip3o_fast import env, page
from blip3o_fast.files import replacing
from blip3o_fast.training import report_plots
from blip3o_fast.training.linear_line import not_below
from blip3o_fast.training.plots import YARDSTICKS
from blip3o_fast.training.quality import SYSTEMS
from blip3o_fast.training.validation import levels

REPORT_FILE = "report.html"
METRICS = {
    "recall_at_1": ("recall@1", "share of generated pictures whose own true features are the nearest", True),
    "recall_at_5": ("recall@5", "the same among the five nearest", True),
    "recall_at_10": ("recall@10", "the same among the ten nearest", True),
    "token_cosine": ("token cosine", "cosine of each generated token with the true one", True),
    "l2_distance": ("L2 distance", "Euclidean distance between generated and true tokens", False),
    "frechet_distance": ("Fréchet distance", "between the two sets of tokens as Gaussians", False),
}


@dataclass(frozen=True)
class Neighbours:
    """A generated picture: its name, and (name, cosine, whether it is the very picture) of the nearest true ones."""

    name: str
    nearest: Sequence[tuple[str, float, bool]]


def write_report(
    output: Path, entries: list[dict[str, Any]], run: dict[str, Any], neighbours: Sequence[Neighbours] = ()
) -> Path:
    """Write report.html (beside, then renamed) and return its path.

    entries: of metrics.jsonl. run: of run.json. ModuleNotFoundError without matplotlib (extra ``report``).
    """
    path = output / REPORT_FILE
    with replacing(path) as beside:
        beside.write_text(render(output, entries, run, neighbours))
    return path


def render(output: Path, entries: list[dict[str, Any]], run: dict[str, Any], neighbours: Sequence[Neighbours]) -> str:
    """The page as HTML text, with every figure inside it. output: the run's folder, for its loss.png."""
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    trained = [entry for entry in entries if "loss" in entry]
    last = evaluations[-1] if evaluations else {}
    parts = [page.tiles(_headline(trained, last))]
    if (curve := output / "loss.png").is_file():
        parts.append(page.picture("Is the loss normal?", _loss_sentence(trained, last), curve.read_bytes()))
    if last:
        lines = {name: run["yardstick"][name]["per_bucket"][::2] for name in YARDSTICKS if name in run["yardstick"]}
        ours = [last[f"eval_loss_sigma_{level:.2f}"] for level in levels()]
        parts.append(page.picture("Where is the loss?", _LEVELS, report_plots.levels(levels(), ours, lines)))
    if "eval_token_cosine" in last:
        metrics = {name.removeprefix("eval_"): value for name, value in last.items()}
        table = page.metric_table(metrics, METRICS, {title: suffix for suffix, title in SYSTEMS.items()})
        parts.append(page.section("How good are the samples?", _quality_sentence(run), table))
        parts.append(page.picture("Do they get better?", _CURVES, report_plots.quality(evaluations)))
    if neighbours:
        parts.append(page.section("What was generated?", _NEIGHBOURS, _neighbour_table(neighbours)))
    if trained:
        parts.append(page.picture("Does it train well?", _HEALTH, report_plots.health(trained)))
    settings = {name: str(value) for name, value in run["settings"].items() if value is not None}
    parts += [
        page.facts("Data", {name: str(value) for name, value in run["data"].items()}),
        page.facts("Machine", _machine() | {"processes": str(run["world_size"])}),
        page.facts("Versions", run["versions"]),
        page.facts("Settings", settings),
    ]
    heading = f"Training run {output.name}"
    told = f"{run['steps']} steps of {run['effective_batch']} samples. The numbers are those of metrics.jsonl."
    return page.page(heading, heading, told, *parts)


def _headline(trained: list[dict[str, Any]], last: dict[str, Any]) -> list[tuple[str, str, str]]:
    tiles = []
    if "eval_loss_over_linear" in last:
        meaning = (
            f"held-out loss {last['eval_loss']:.4f} as a multiple of the best linear prediction's: below 1 is good"
        )
        tiles.append(("loss / linear", f"{last['eval_loss_over_linear']:.2f}", meaning))
    if "eval_token_cosine" in last:
        tiles.append(("recall@1", f"{last['eval_recall_at_1']:.1%}", _beside(last, "recall_at_1", ".1%")))
        tiles.append(("token cosine", f"{last['eval_token_cosine']:.3f}", _beside(last, "token_cosine", ".3f")))
    if trained:
        # The first log has the start-up in it.
        rates = sorted(entry["samples_per_second"] for entry in trained[1:] or trained)
        speed = f"median; {trained[-1]['memory_gb']:.2f} GB of memory at most"
        if "mfu" in trained[-1]:
            speed += f"; MFU {sorted(e['mfu'] for e in trained[1:] or trained)[len(rates) // 2]:.0%}"
        tiles.append(("samples per second", f"{rates[len(rates) // 2]:.3g}", speed))
        minutes = trained[-1]["seconds"] / 60
        tiles.append(("time", f"{minutes:.1f} min", "of the last process that trained this run"))
    return tiles


def _beside(last: dict[str, Any], name: str, form: str) -> str:
    words = {"_ridge": "ridge", "_mean_embedding": "mean embedding", "_chance": "chance"}
    found = [f"{word} {last[key]:{form}}" for suffix, word in words.items() if (key := f"eval_{name}{suffix}") in last]
    return ", ".join(found)


def _loss_sentence(trained: list[dict[str, Any]], last: dict[str, Any]) -> str:
    told = (
        "Training loss, and the held-out loss at fixed noise. The lines tell whether a loss is normal: what predicting "
        "zero, the mean, and the best linear velocity would reach. A flow-matching loss never goes to 0: the noise "
        "cannot be known."
    )
    entry, key = (last, "eval_loss_over_linear") if last else (trained[-1] if trained else {}, "loss_over_linear")
    if key not in entry:
        return told
    if entry[key] < 1:
        return f"{told} At the end it is {entry[key]:.2f} times the best linear velocity's: good, no linear map can."
    return f"{told} But {not_below(entry[key], entry['step'], held_out=bool(last)).removeprefix('note: ')}."


_LEVELS = (
    "The held-out loss at each noise level. The condition helps most at high sigma, where x_t says little of the "
    "picture; below the green line is good; values near 1 at low sigma only say that fine detail is hard to predict."
)
_CURVES = (
    "The same over the training. Ridge regression makes one best guess and is strong; a generative model draws "
    "samples, so its tokens may stay farther from the truth while the set of them, by the Fréchet distance, looks more "
    "real."
)
_NEIGHBOURS = (
    "Held-out pictures that were generated from their condition, and whose true features are nearest to that, among "
    "all held-out ones that are measured. In bold the very picture: in front is best, kindred pictures beside it are "
    "good."
)
_HEALTH = (
    "A cosine that rises and lengths that meet say that the velocity is learnt; a gradient norm that climbs while the "
    "loss does not fall says that the learning rate is too high. Waiting for data should be near 0."
)


def _quality_sentence(run: dict[str, Any]) -> str:
    settings = run["settings"]
    return (
        f"Features of at most {settings['eval_generation_samples']} held-out pictures, generated with "
        f"{settings['num_inference_steps']} Euler steps and guidance {settings['guidance_scale']:g} from fixed noise, "
        "beside two predictions that need no training. Bold: best of its row. Of few pictures all this is rough: "
        "blip3o-fast evaluate judges every held-out one."
    )


def _neighbour_table(neighbours: Sequence[Neighbours]) -> str:
    count = max(len(one.nearest) for one in neighbours)
    head = "".join(f"<th>nearest #{k + 1}</th>" for k in range(count))
    rows = "".join(
        f"<tr><th class='row'>{escape(one.name)}</th>"
        + "".join(
            f"<td class='{'best' if itself else ''}'>{escape(name)}<small>{cosine:.3f}</small></td>"
            for name, cosine, itself in one.nearest
        )
        + "</tr>"
        for one in neighbours
    )
    return f"<table class='words'><tr><th>generated</th>{head}</tr>{rows}</table>"


def _machine() -> dict[str, str]:
    return next(rows for title, rows in env.sections() if title == "machine")
