"""The demo's figures. Every function returns PNG bytes of one figure that answers one question."""

from collections.abc import Sequence
from typing import Any

from blip3o_fast.training.plots import BLUE, GREEN, GREY, ORANGE, canvas, png


def sigma_levels(levels: Sequence[float], ours: Sequence[float], linear: Sequence[float]) -> bytes:
    """Held-out loss at each noise level, beside what the best linear velocity reaches there."""
    figure, axes = canvas(9, 3.6)
    series = {"this model": (ours, BLUE), "best linear velocity": (linear, GREY)}
    for index, (name, (values, color)) in enumerate(series.items()):
        at = [i + (index - 0.5) * 0.4 for i in range(len(levels))]
        bars = axes.bar(at, values, 0.37, color=color, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.set_xticks(range(len(levels)), [f"{level:.2f}" for level in levels])
    axes.set(xlabel="noise level sigma (0 = data, 1 = noise)", ylabel="loss")
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    axes.set_ylim(top=1.18 * max(*ours, *linear))
    return png(figure)


def metric_bars(rows: dict[str, float], *, chance: float | None, unit: str, highlight: str) -> bytes:
    """One metric for every system, best on top, chance as a line."""
    figure, axes = canvas(9, 0.42 * len(rows) + 1.1)
    ordered = sorted(rows.items(), key=lambda item: item[1])
    names, values = zip(*ordered, strict=True)
    bars = axes.barh(names, values, color=[BLUE if name == highlight else GREY for name in names], height=0.7)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    if chance is not None:
        axes.axvline(chance, color=ORANGE, lw=1.5, ls="--", label=f"chance {chance:.4f}")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set(xlabel=unit, xlim=(min(0.0, *values) * 1.1, max(values) * 1.15))
    return png(figure)


def retrieval_sheet(rows: Sequence[dict[str, Any]]) -> bytes:
    """One row per held-out picture: the condition, the truth's nearest neighbour, the generated embedding's four.

    rows: {"condition": PIL image, "caption": text, "neighbour": PIL image, "generated": [(PIL image, whether it is the
    very picture), ...]}
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
        cells[0].set_xlabel(row["caption"][:26], fontsize=8, parse_math=False)  # a dollar sign is a dollar sign
        _cell(cells[1], row["neighbour"], None)
        for cell, (picture, itself) in zip(cells[2:], row["generated"], strict=True):
            _cell(cell, picture, GREEN if itself else None)
    for cell, title in zip(grid[0], titles, strict=True):
        cell.set_title(title, fontsize=9)
    return png(figure)


def _cell(axes: Any, picture: Any, frame: str | None) -> None:
    small = picture.copy()
    small.thumbnail((220, 220))
    axes.imshow(small)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame or "#DDDDDD")
        spine.set_linewidth(3.5 if frame else 0.8)
