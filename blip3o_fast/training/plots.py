"""The loss curve with the lines that say whether it is normal, and how every figure of a report looks.

The ground is white and opaque, so a figure reads alike on a light and on a dark page.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, distinguishable with every common colour blindness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A7A7A"
_DPI = 130

# Names as people read them, from the easiest predictor to the best.
YARDSTICKS = {
    "zero": "predict zero",
    "mean": "predict the mean",
    "linear_unconditional": "best linear, no condition",
    "linear_conditional": "best linear",
}


def canvas(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A white figure of so many inches and its axes, as matplotlib's ``subplots(**options)`` gives them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **options)
    figure.patch.set_facecolor("white")
    for cell in figure.axes:
        for side in ("top", "right"):
            cell.spines[side].set_visible(False)
    return figure, axes


def png(figure: Any) -> bytes:
    """PNG bytes of a figure, which is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    pyplot.close(figure)
    return buffer.getvalue()


def plot_loss(
    entries: list[dict[str, Any]],
    path: str | Path,
    *,
    yardstick: dict[str, Any] | None = None,
    reference: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a PNG (or SVG, by the suffix) of training and held-out loss over the steps.

    Args:
        entries: what metrics.jsonl holds (`checkpoints.read_metrics`).
        yardstick: ``Yardstick.as_dict()``; its lines are drawn and named at the right edge.
        reference: entries of another run, drawn in grey behind.

    Raises:
        ValueError: where no entry has a loss. ModuleNotFoundError: without matplotlib (extra ``report``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    held_out = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    if not train:
        raise ValueError("entries has no training loss: nothing was logged yet")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if reference:
        grey = [(e["step"], e["loss"]) for e in reference if "loss" in e]
        axes.plot(*zip(*grey, strict=True), color="0.8", linewidth=3, label="reference run")
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.8, linewidth=1.2, label="training loss")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held-out loss")
    for height, text, style in _lines(yardstick or {}):
        axes.axhline(height, color="0.4", linewidth=0.9, linestyle=style)
        # Outside, at the right: no curve passes there.
        axes.annotate(
            text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
            color="0.3",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean squared velocity error)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right", framealpha=0.9)
    path = Path(path)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _lines(yardstick: dict[str, Any]) -> list[tuple[float, str, str]]:
    """(height, text, line style) of each line; lines too close for two texts share one."""
    heights = {name: yardstick[name]["overall"] for name in YARDSTICKS if name in yardstick}
    lines: list[tuple[float, str, str]] = []
    for name, height in sorted(heights.items(), key=lambda item: -item[1]):
        text = f"{YARDSTICKS[name]}: {height:.3f}"
        if lines and lines[-1][0] - height < 0.05 * max(heights.values()):
            text = f"{lines.pop()[1]}\n{text}"
        lines.append((height, text, "--" if "linear" in name else ":"))
    return lines
