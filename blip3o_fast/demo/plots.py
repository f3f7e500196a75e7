"""The demo's figures. Every function returns PNG bytes of one figure that answers one question."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, distinguishable with every common colour blindness, on white and on dark pages alike.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A7A7A"
_DPI = 130


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    figure.patch.set_facecolor("white")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    pyplot.close(figure)
    return buffer.getvalue()


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean: a point never knows its future, so the curve's end is as honest as its middle."""
    out = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        out.append(sum(part) / len(part))
    return out


def loss_curve(
    train: Sequence[tuple[int, float]],
    evaluation: Sequence[tuple[int, float]],
    reference: Sequence[tuple[int, float]],
    yardstick: dict[str, float],
) -> bytes:
    """Loss over steps, the committed reference run behind it, the yardstick's lines across it."""
    figure, axes = _figure(9, 4.6)
    if reference:
        steps, losses = zip(*reference, strict=True)
        axes.plot(steps, _smooth(losses, 5), color=GREY, lw=5, alpha=0.35, label="the project's own run")
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color=BLUE, lw=0.8, alpha=0.35)
    axes.plot(steps, _smooth(losses, 5), color=BLUE, lw=1.8, label="training loss (mean of 5 logs)")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color=ORANGE, lw=1.8, marker="o", ms=5, label="held-out loss, fixed noise")
    styles = {"predicting zero": ":", "predicting the mean": "-.", "best linear, no condition": "--"}
    for name, value in yardstick.items():
        axes.axhline(value, color=GREEN, lw=1.2, ls=styles.get(name, "-"))
        axes.annotate(
            f"{name}: {value:.3f}", (0.995, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            fontsize=8, color=GREEN,
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss (mean squared error of the velocity)")
    axes.set_ylim(bottom=0, top=max(yardstick.values(), default=max(losses)) * 1.12)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return _png(figure)


def sigma_buckets(edges: Sequence[float], ours: Sequence[float], lines: dict[str, Sequence[float]]) -> bytes:
    """Held-out loss per noise level, beside what the best linear velocity reaches there."""
    figure, axes = _figure(9, 3.8)
    labels = [f"{low:g} to {high:g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    series = {"this model": ours, **lines}
    colors = (BLUE, GREEN, GREY, PURPLE)
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        at = [i + (index - (len(series) - 1) / 2) * width for i in range(len(labels))]
        bars = axes.bar(at, values, width * 0.92, color=colors[index], label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="noise level sigma (0 = data, 1 = noise)", ylabel="loss")
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def metric_bars(rows: dict[str, float], *, chance: float | None, unit: str, highlight: str) -> bytes:
    """One metric for every system, best on top, chance as a line."""
    figure, axes = _figure(9, 0.42 * len(rows) + 1.1)
    ordered = sorted(rows.items(), key=lambda item: item[1])
    names, values = zip(*ordered, strict=True)
    bars = axes.barh(names, values, color=[BLUE if name == highlight else GREY for name in names], height=0.7)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    if chance is not None:
        axes.axvline(chance, color=ORANGE, lw=1.5, ls="--", label=f"chance {chance:.4f}")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set(xlabel=unit, xlim=(min(0.0, *values) * 1.1, max(values) * 1.15))
    return _png(figure)


def retrieval_sheet(rows: Sequence[dict[str, Any]]) -> bytes:
    """One row per held-out picture: the condition, the truth's nearest neighbour, the generated embedding's four.

    rows: {"condition": path, "caption": text, "neighbour": path, "generated": [(path, is_the_picture_itself), ...]}
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = len(rows[0]["generated"])
    figure, grid = pyplot.subplots(
        len(rows), 2 + found, figsize=(1.55 * (2 + found), 1.62 * len(rows)), layout="constrained", squeeze=False
    )
    figure.patch.set_facecolor("white")
    titles = ["condition", "nearest true\nneighbour", *(f"generated:\nnearest #{i + 1}" for i in range(found))]
    for cells, row in zip(grid, rows, strict=True):
        _cell(cells[0], row["condition"], BLUE)
        cells[0].set_xlabel(row["caption"][:26], fontsize=8)
        _cell(cells[1], row["neighbour"], None)
        for cell, (path, itself) in zip(cells[2:], row["generated"], strict=True):
            _cell(cell, path, GREEN if itself else None)
    for cell, title in zip(grid[0], titles, strict=True):
        cell.set_title(title, fontsize=9)
    return _png(figure)


def _cell(axes: Any, path: Path, frame: str | None) -> None:
    from blip3o_fast.data.images import open_image

    picture = open_image(path)
    picture.thumbnail((220, 220))
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame or "#DDDDDD")
        spine.set_linewidth(3.5 if frame else 0.8)
