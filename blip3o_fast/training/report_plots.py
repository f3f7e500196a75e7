"""The figures of a run's report. Every function returns PNG bytes of one figure that answers one question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blip3o_fast.training.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, YARDSTICKS, canvas, png
from blip3o_fast.training.quality import SYSTEMS

_LOOKS = {"zero": (GREY, ":"), "mean": (GREY, "--"), "linear_unconditional": (ORANGE, "--"),
          "linear_conditional": (GREEN, "-")}  # fmt: skip
_SYSTEM_LOOKS = {"": (BLUE, "-"), "_ridge": (GREEN, "--"), "_mean_embedding": (GREY, ":")}


def levels(at: Sequence[float], ours: Sequence[float], lines: dict[str, Sequence[float]]) -> bytes:
    """Held-out loss over the noise level, among what four predictions reach that need no training.

    lines: name of YARDSTICKS -> loss at each level.
    """
    figure, axes = canvas(9, 4)
    for name, values in lines.items():
        colour, style = _LOOKS[name]
        axes.plot(at, values, color=colour, linestyle=style, linewidth=1.6, label=YARDSTICKS[name])
    axes.plot(at, ours, color=BLUE, marker="o", linewidth=2.2, label="this model")
    axes.set(xlabel="noise level sigma (0 = data, 1 = noise)", ylabel="held-out loss", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    # Beside the axes: the lines leave no corner free for sure.
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def quality(entries: list[dict[str, Any]]) -> bytes:
    """Four metrics of generated features over the steps, each beside the baselines (and chance)."""
    shown = {
        "token_cosine": "token cosine (higher is better)",
        "recall_at_1": "recall@1 (higher is better)",
        "l2_distance": "L2 distance (lower is better)",
        "frechet_distance": "Fréchet distance (lower is better)",
    }
    figure, grid = canvas(9, 5.6, nrows=2, ncols=2)
    for axes, (name, title) in zip(grid.flat, shown.items(), strict=True):
        for suffix, system in SYSTEMS.items():
            colour, style = _SYSTEM_LOOKS[suffix]
            _curve(axes, entries, f"eval_{name}{suffix}", label=system, color=colour, linestyle=style)
        _curve(axes, entries, f"eval_{name}_chance", label="chance", color=PURPLE, linestyle="-.")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return _finished(figure, grid, legend=1)


def health(entries: list[dict[str, Any]]) -> bytes:
    """How the training goes, and whether it uses the machine: six small curves over the steps."""
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("cosine of predicted and true velocity", [("cosine_similarity", "", BLUE)]),
        ("length of a velocity token", [("pred_norm", "predicted", BLUE), ("target_norm", "true", GREEN)]),
        ("gradient norm, before clipping", [("grad_norm", "", BLUE)]),
        ("learning rate", [("learning_rate", "", BLUE)]),
        ("samples per second", [("samples_per_second", "", BLUE)]),
        ("share of the peak, and of the time", [("mfu", "MFU", BLUE), ("data_wait", "waiting for data", ORANGE)]),
    ]
    figure, grid = canvas(9, 5.6, nrows=2, ncols=3)
    for axes, (title, curves) in zip(grid.flat, panels, strict=True):
        for name, label, colour in curves:
            _curve(axes, entries, name, label=label, color=colour)
        axes.set_title(title, fontsize=9)
        if len(curves) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return _finished(figure, grid, legend=None)


def _curve(axes: Any, entries: list[dict[str, Any]], name: str, **look: Any) -> None:
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    if points:
        # A single point would be no line.
        axes.plot(*zip(*points, strict=True), linewidth=1.6, marker="o" if len(points) < 3 else None, ms=4, **look)


def _finished(figure: Any, grid: Any, legend: int | None) -> bytes:
    for axes in grid.flat:
        axes.grid(alpha=0.2)
        axes.tick_params(labelsize=8)
        axes.set_xlim(left=0)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=9)
    if legend is not None:
        handles, labels = grid.flat[legend].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return png(figure)
