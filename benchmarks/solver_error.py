"""Error of a sampling run by its number of evaluations, every solver on several grids: a trained model, its conditions.

Error is the relative L2 distance of the features to those of a long Euler run from the same noise, in fp32. Prints a
table in Markdown and draws it. An Euler run of 1000 steps has an error of its own, of order 1/1000: what it is, the
distance to a run of half the steps says, and no error much below it means anything.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.evaluation.samples import load_model
from blip3o_fast.flow.solvers import SOLVERS
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling import Sampler
from blip3o_fast.sampling.tune import Search, Trial, first_level

GRIDS = (("linear", 1.0), ("shifted", 0.5), ("shifted", 2.0), ("cosine", 1.0))
# Okabe and Ito's colours, told apart with every kind of colour vision; the markers tell them apart without colour.
LOOKS = {"euler": ("#000000", "o"), "midpoint": ("#E69F00", "s"), "heun": ("#0072B2", "^"), "ab2": ("#D55E00", "D")}


def title(grid: tuple[str, float]) -> str:
    kind, shift = grid
    return kind if shift == 1 else f"{kind} by {shift:g}"


def table(rows: dict[tuple[str, tuple[str, float]], list[Trial]], counts: Sequence[int]) -> str:
    """Markdown: a row for each solver and grid, a column for each number of evaluations, the best of a column bold."""
    best = [min(trials[i].error for trials in rows.values()) for i in range(len(counts))]
    lines = ["| solver | grid | " + " | ".join(map(str, counts)) + " |", "|---|---|" + "---|" * len(counts)]
    for (solver, grid), trials in rows.items():
        errors = [
            f"{t.error:.4f}" if t.error > least else f"**{t.error:.4f}**" for t, least in zip(trials, best, strict=True)
        ]
        lines.append(f"| {solver} | {title(grid)} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def draw(
    rows: dict[tuple[str, tuple[str, float]], list[Trial]], counts: Sequence[int], floor: float, path: Path
) -> None:
    """A panel for each grid, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
    for axes, grid in zip(panels.flat, GRIDS, strict=True):
        for solver, (colour, marker) in LOOKS.items():
            errors = [trial.error for trial in rows[solver, grid]]
            axes.loglog(counts, errors, color=colour, marker=marker, markersize=5, linewidth=1.6, label=solver)
        axes.axhline(floor, color="0.45", linestyle=":", linewidth=1.2, label="the reference's own error")
        axes.set_title(f"{title(grid)} grid", fontsize=11)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(color="0.85", linewidth=0.6)
    panels[0, 0].legend(fontsize=9)
    figure.supxlabel("evaluations of the guided velocity per run")
    figure.supylabel("relative L2 error of the features")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver_error", description=__doc__)
    parser.add_argument("--model", required=True, help="a run's folder, as `make demo` leaves one in runs/demo/model")
    parser.add_argument("--embeddings_path", required=True, type=Path, help="the embeddings that it was trained on")
    parser.add_argument("--eval_split", type=float, default=0.1, help="as in training (0.1)")
    parser.add_argument("--num_samples", type=int, default=16, help="the first so many held-out conditions (16)")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="everywhere (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, as in `blip3o-fast sample` (0)")
    parser.add_argument("--reference_steps", type=int, default=1000, help="of the Euler run (1000)")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="even (4 8 16 32 64)")
    parser.add_argument("--plot", type=Path, default=Path("solver_error.png"), help="the picture to write")
    options = parser.parse_args(arguments)
    counts = sorted(set(options.evaluations))
    if counts[0] < 2 or any(count % 2 for count in counts):
        parser.error(f"argument --evaluations: must be even and at least 2, got {counts}")
    for name in ("num_samples", "reference_steps"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    dataset = EmbeddingDataset(options.embeddings_path, split="eval", eval_split=options.eval_split)
    model = load_model(options.model, torch.device("cpu")).float()
    rows = slice(0, options.num_samples)
    noise = normal_noise_at(options.seed, dataset.indices[rows], (model.config.num_tokens, model.config.in_channels))
    search = Search(
        Sampler(model),
        dataset.conditions[rows],
        noise,
        guidance_scale=options.guidance_scale,
        reference_steps=options.reference_steps,
        start=first_level(model.config.prediction_type),
        progress=True,
        on_trial=lambda trial: print(f"{trial.settings}: {trial.error:.4f}", file=sys.stderr, flush=True),
    )
    measured = {
        (solver, grid): [search.measure(search.settings(solver, count, *grid)) for count in counts]
        for solver in SOLVERS
        for grid in GRIDS
    }
    floor = search.floor()
    stamp = machine.stamp()
    print(f"{stamp['cpu']['model']}, {stamp['isa']}, commit {stamp['commit']}")
    print(
        f"{len(noise)} held-out conditions, guidance {options.guidance_scale:g}, against {options.reference_steps} "
        f"Euler steps, whose own error is about {floor:.1e}\n"
    )
    print(table(measured, counts))
    draw(measured, counts, floor, options.plot)
    print(f"\n{options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
