"""The figures of a report. Each answers the question in its title, from the rows of one run, as PNG bytes.

What a run did not measure leaves its figure out: the function raises `Missing` with the reason.
"""

import math
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, SOFT, figure, looks, name_of, png
from benchmarks.table import first_rows, worst_error

Row = dict[str, Any]
PRODUCTS = "packed_linear"
SMALL_STEP = 0.17  # inches per bar
MODES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
FAMILIES = {"op": "ops", "product": "products", "model": "block and the model", "other": "other suites"}
PANELS = 9  # of one figure, at most


class Missing(Exception):
    """Why there is no such figure in this report."""


def timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok" and row["median_s"] is not None]


def family(suite: str) -> str:
    """Which figure a suite belongs to: a key of FAMILIES."""
    if suite.startswith(("model_", "cpu_block", "train_step", "sample")):
        return "model"
    is_op = (Path(__file__).parent / "ops" / f"{suite}.py").is_file()
    return "product" if suite == PRODUCTS else "op" if is_op else "other"


def labels(rows: list[Row]) -> dict[str, tuple[str, ...]]:
    """suite -> the keys that tell its cases apart, those that vary; the dtype has a figure of its own."""
    found: dict[str, tuple[str, ...]] = {}
    for suite in dict.fromkeys(row["suite"] for row in rows):
        cases = [row["case"] for row in rows if row["suite"] == suite]
        keys = dict.fromkeys(key for case in cases for key in case if key != "dtype")
        varying = tuple(k for k in keys if len({str(case.get(k)) for case in cases}) > 1)
        # the shape of a product follows from its name
        found[suite] = tuple(k for k in varying if "product" not in keys or k not in ("in", "out"))
    return found


def label(row: Row, varying: dict[str, tuple[str, ...]]) -> str:
    parts = [f"{key} {row['case'].get(key)}" for key in varying[row["suite"]]]
    return f"{row['suite']}\n{', '.join(parts)}" if parts else row["suite"]


def speedups(rows: list[Row], dtype: str, what: str) -> bytes:
    """Horizontal bars from 1 (the first provider's speed), a panel per mode, with spread and correctness."""
    chosen = [r for r in rows if str(r["case"].get("dtype")) == dtype and family(r["suite"]) == what]
    first = first_rows(chosen)
    bars = [r for r in chosen if id(r) not in first and r["status"] != "absent"]
    if not any(r["speedup"] for r in bars):
        raise Missing(f"none of the {FAMILIES[what]} in {dtype} was timed beside a first provider")
    varying, style = labels(chosen), looks(r["provider"] for r in bars)
    modes = [
        mode for mode in dict.fromkeys([*MODES, *(r["mode"] for r in bars)]) if any(r["mode"] == mode for r in bars)
    ]
    baseline = "eager" if all(r["provider"] == "eager" for r in chosen if id(r) in first) else "the first provider"
    cases = list(dict.fromkeys(label(r, varying) for r in bars))
    slots = {case: list(dict.fromkeys(r["provider"] for r in bars if label(r, varying) == case)) for case in cases}
    place, at = {}, 0.0
    for case in cases:
        for provider in slots[case]:
            place[case, provider] = at
            at += 1
        at += 0.7
    made, axes = figure(4.6 * len(modes) + 1.9, SMALL_STEP * at + 1.7, 1, len(modes), sharey=True, sharex=True)
    known = [r for r in bars if r["speedup"]]
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xlim(
        min(0.7, *(r["speedup_p20"] / 1.1 for r in known)), max(2, *(r["speedup_p80"] * 1.1 for r in known))
    )
    for cell, mode in zip(axes[0], modes, strict=True):
        _speedup_panel(cell, [r for r in bars if r["mode"] == mode], varying, place, style)
        cell.set_title(MODES.get(mode, mode), fontsize=9.5)
        cell.set_xlabel(f"times faster than {baseline} (logarithmic)")
    middles = [sum(place[case, p] for p in slots[case]) / len(slots[case]) for case in cases]
    axes[0, 0].set_yticks(middles, cases, fontsize=8)
    axes[0, 0].set_ylim(at - 0.9, -1.5)
    _legend(made, style)
    made.suptitle(f"How much faster than {baseline} are the {FAMILIES[what]} in {dtype}?", fontsize=12)
    return png(made)


def _speedup_panel(cell: Any, bars: list[Row], varying: Any, place: Any, style: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def beside(y: float, text: str, **options: Any) -> None:
        """In the column right of the axes."""
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        cell.annotate(text, (1.01, y), **where, fontsize=6.5, family="monospace", **options)

    beside(-0.9, f"{'median':>6} {'error':>7}  correct", color=SOFT)
    for row in bars:
        y = place[label(row, varying), row["provider"]]
        color, hatch, _ = style[row["provider"]]
        ratio = row["speedup"]
        if ratio:
            cell.barh(y, ratio - 1, left=1, height=0.86, color=color, hatch=hatch, edgecolor=BLACK, linewidth=0.5)
            cell.plot([row["speedup_p20"], row["speedup_p80"]], [y, y], color=BLACK, lw=1.4, marker="|", ms=4)
        error = worst_error(row)
        verdict = "ok" if row["inexact"] is None else "inexact"
        verdict = verdict if row["status"] == "ok" else f"{row['status']}: {name_of(row['provider'])}"  # it has no bar
        median, off = f"{ratio:.2f}" if ratio else "", "" if error is None else f"{error:.0e}"
        wrong = row["status"] != "ok"
        beside(
            y, f"{median:>6} {off:>7}  {verdict}", color=RED if wrong else BLACK, weight="bold" if wrong else "normal"
        )
    cell.axvline(1, color=BLACK, lw=1)
    cell.grid(axis="x", color="#E2E2E2", lw=0.6)
    cell.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    cell.xaxis.set_minor_formatter(NullFormatter())


def columns_of(made: Any, handles: list[Any]) -> int:
    """As many as fit beside one another, of the longest name."""
    longest = max(len(handle.get_label()) for handle in handles)
    return max(1, min(len(handles), int(made.get_figwidth() / (0.75 + 0.075 * longest))))


def _legend(made: Any, style: Any) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=c, hatch=h, edgecolor=BLACK, linewidth=0.5, label=name_of(n)) for n, (c, h, _) in style.items()
    ]
    made.legend(
        handles=handles, loc="outside lower center", ncols=columns_of(made, handles), frameon=False, fontsize=8.5
    )


def _per_item(rows: list[Row]) -> Iterator[tuple[str, dict[str, list[Row]]]]:
    """Title -> provider -> rows by batch, of cases that differ in the batch alone, where there are two or more."""
    groups: dict[tuple[str, ...], dict[str, dict[int, Row]]] = {}
    varying = labels(rows)
    for row in timed(rows):
        rest = tuple(f"{k} {row['case'].get(k)}" for k in varying[row["suite"]] if k != "batch")
        if isinstance(row["case"].get("batch"), int):
            mode = MODES.get(row["mode"], row["mode"])
            key = (row["suite"], mode, str(row["case"].get("dtype")), *rest)
            groups.setdefault(key, {}).setdefault(row["provider"], {})[row["case"]["batch"]] = row
    for key, providers in groups.items():
        lines = {name: [at[b] for b in sorted(at)] for name, at in providers.items() if len(at) > 1}
        if lines:
            yield ", ".join(key), lines


def scaling(rows: list[Row]) -> bytes:
    """Time per item of the batch over the batch, a panel per suite, mode and dtype; the models', else the ops'."""
    panels = dict(_per_item([r for r in rows if family(r["suite"]) == "model"])) or dict(_per_item(rows))
    if not panels:
        raise Missing("no suite was timed at two batch sizes")
    shown = dict(list(panels.items())[:PANELS])
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    height = -(-len(shown) // columns)
    made, axes = figure(3.7 * columns + 0.4, 3.0 * height + 1.0, height, columns)
    style = looks(name for lines in shown.values() for name in lines)
    for cell, (title, lines) in zip(axes.flat, shown.items(), strict=False):
        for name, points in lines.items():
            color, _, marker = style[name]
            at = [r["case"]["batch"] for r in points]
            each = [
                [r[field] / b * 1e3 for r, b in zip(points, at, strict=True)]
                for field in ("median_s", "p20_s", "p80_s")
            ]
            cell.plot(at, each[0], color=color, marker=marker, ms=6, markeredgecolor=BLACK, markeredgewidth=0.5)
            cell.fill_between(at, each[1], each[2], color=color, alpha=0.25, lw=0)
        _plain_log(cell, sorted({r["case"]["batch"] for points in lines.values() for r in points}))
        cell.set_title(title, fontsize=9)
        cell.set(xlabel="batch", ylabel="ms per item")
        cell.set_ylim(bottom=0)
        cell.grid(color="#E2E2E2", lw=0.6)
    for cell in list(axes.flat)[len(shown) :]:
        cell.set_visible(False)
    _line_legend(made, style)
    made.suptitle("What does one item cost as the batch grows?", fontsize=12)
    return png(made)


def _plain_log(cell: Any, batches: list[int]) -> None:
    cell.set_xscale("log", base=2)
    cell.set_xticks(batches, [str(b) for b in batches])
    cell.minorticks_off()


def _line_legend(made: Any, style: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, marker=m, markeredgecolor=BLACK, markeredgewidth=0.5, label=name_of(n))
        for n, (c, _, m) in style.items()
    ]
    made.legend(
        handles=handles, loc="outside lower center", ncols=columns_of(made, handles), frameon=False, fontsize=8.5
    )


def megabytes(row: Row) -> tuple[str, float] | None:
    """("saved" or "peak", MB) of a row: its own field, or the word in its details."""
    for kind in ("peak", "saved"):
        if isinstance(row.get(f"{kind}_bytes"), int | float):
            return kind, row[f"{kind}_bytes"] / 1e6
    found = re.search(r"(saves|peak) ([\d.]+) (MB|GB)", row.get("detail") or "")
    if found is None:
        return None
    return {"saves": "saved", "peak": "peak"}[found[1]], float(found[2]) * (1e3 if found[3] == "GB" else 1)


MEMORY = {
    "saved": "saved for the backward, MB (weights and inputs left out)",
    "peak": "peak memory, MB",
}


def memory(rows: list[Row]) -> bytes:
    """Saved for the backward, or peak, of each provider that says; of single ops the rows have it."""
    rows = [row for row in rows if family(row["suite"]) in ("model", "other")]
    found: dict[tuple[str, str], dict[str, float]] = {}
    varying = labels(rows)
    for row in rows:
        told = megabytes(row)
        if told is not None and row["status"] == "ok":
            head = f"{label(row, varying)}\n{row['case'].get('dtype', '')}"
            found.setdefault((told[0], head), {})[row["provider"]] = told[1]
    if not found:
        raise Missing("no row of a block or more says how much memory was saved or used")
    kinds = [kind for kind in MEMORY if any(k == kind for k, _ in found)]
    style = looks(name for bars in found.values() for name in bars)
    count = max(sum(len(b) + 0.7 for (k, _), b in found.items() if k == kind) for kind in kinds)
    made, axes = figure(5.5 * len(kinds) + 1.5, 0.34 * count + 1.5, 1, len(kinds))
    for cell, kind in zip(axes[0], kinds, strict=True):
        at, ticks, most = 0.0, [], max(max(b.values()) for (k, _), b in found.items() if k == kind)
        for (_, head), bars in ((key, b) for key, b in found.items() if key[0] == kind):
            first = next(iter(bars.values()))
            ticks.append((at + (len(bars) - 1) / 2, head))
            for name, value in bars.items():
                color, hatch, _ = style[name]
                cell.barh(at, value, height=0.86, color=color, hatch=hatch, edgecolor=BLACK, linewidth=0.5)
                share = "" if value == first else f" ({value / first:.0%})"
                cell.text(value + 0.01 * most, at, f"{value:.1f}{share}", va="center", fontsize=8.5)
                at += 1
            at += 0.7
        cell.set_yticks([y for y, _ in ticks], [head for _, head in ticks], fontsize=8.5)
        cell.set(ylim=(at - 0.9, -0.8), xlim=(0, 1.22 * most), xlabel=MEMORY[kind])
        cell.grid(axis="x", color="#E2E2E2", lw=0.6)
    _legend(made, style)
    made.suptitle("How much memory does it take?", fontsize=12)
    return png(made)


def roofline(rows: list[Row], limits: Row) -> bytes:
    """GFLOP/s over FLOP per byte of each op's forward, beneath the ceilings that the same run measured."""
    if not limits.get("copy_gbps") or not limits.get("fma_gflops"):
        raise Missing("the run measured no ceilings (it was cut short, or there was no probe)")
    points = [r for r in timed(rows) if r["mode"] == "forward" and r["gflops"] and r["bytes"] and r["flops"]]
    # what computes in fewer bits than its case has another ceiling
    points = [r for r in points if r["inexact"] is None and r["provider"] not in ("int8", "eager_fp32")]
    points = [r for r in points if r["case"].get("dtype") in ("float32", "bfloat16")]
    if not points:
        raise Missing("no forward was timed whose bytes and FLOPs are known")
    dtypes = [d for d in ("float32", "bfloat16") if any(r["case"]["dtype"] == d for r in points)]
    suites = list(dict.fromkeys(r["suite"] for r in points))
    markers = dict(zip(suites, _shapes(len(suites)), strict=True))
    made, axes = figure(5.6 * len(dtypes) + 0.4, 6.4, 1, len(dtypes), sharey=True, sharex=True)
    for cell, dtype in zip(axes[0], dtypes, strict=True):
        _roof(cell, [r for r in points if r["case"]["dtype"] == dtype], dtype, limits, markers)
    axes[0, 0].set_ylabel("GFLOP/s (logarithmic)")
    _shape_legend(made, markers)
    made.suptitle("How close to this machine's ceilings does each op come? (forward)", fontsize=12)
    return png(made)


def _shapes(count: int) -> list[tuple[Any, str]]:
    """(marker, colour) pairs, no two of one shape as long as there are shapes."""
    shapes, colors = [*"os^vD<>pPXhd*", (4, 1, 45), (3, 1, 0), (8, 1, 0)], (BLUE, ORANGE, GREEN, PINK, SKY, RED)
    return [(shapes[i % len(shapes)], colors[i % len(colors)]) for i in range(count)]


def _roof(cell: Any, points: list[Row], dtype: str, limits: Row, markers: Any) -> None:
    peak = limits.get("bf16_gflops") if dtype == "bfloat16" and limits.get("bf16_gflops") else limits["fma_gflops"]
    copy = limits["copy_gbps"]
    intensities = [r["flops"] / r["bytes"] for r in points]
    left, right = min(intensities) / 2, max(max(intensities), peak / copy) * 2
    ridge = peak / copy
    cell.plot([left, ridge, right], [left * copy, peak, peak], color=BLACK, lw=1.8)
    # at a log-log slope of one; along the diagonal, clear of the points below it
    at = math.sqrt(left * ridge)
    cell.text(at, at * copy * 1.5, f"copy {copy:.0f} GB/s", ha="right", fontsize=8.5)
    cell.text(right, peak * 1.07, f"multiply-adds {peak:.0f} GFLOP/s", ha="right", va="bottom", fontsize=8.5)
    for _, group in groupby(points, key=lambda r: (r["suite"], r["case"])):
        rows = list(group)
        best = max((r for r in rows if r["provider"] not in ("eager", "compile", "frozen", "onednn")),
                   key=lambda r: r["gflops"], default=None)  # fmt: skip
        x = rows[0]["flops"] / rows[0]["bytes"]
        marker, color = markers[rows[0]["suite"]]
        if rows[0]["provider"] == "eager":
            cell.scatter(x, rows[0]["gflops"], marker=marker, s=34, facecolor="white", edgecolor=GREY, lw=1.1, zorder=3)
        if best is None:
            continue
        if rows[0]["provider"] == "eager":
            cell.plot([x, x], [rows[0]["gflops"], best["gflops"]], color=GREY, lw=0.8, zorder=2)
        cell.scatter(x, best["gflops"], marker=marker, s=46, facecolor=color, edgecolor=BLACK, lw=0.6, zorder=4)
    cell.set(xscale="log", yscale="log")
    for axis in (cell.xaxis, cell.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    cell.set(xlabel="FLOP per byte that must move (logarithmic)", title=dtype)
    cell.grid(color="#E2E2E2", lw=0.6)


def _shape_legend(made: Any, markers: Any) -> None:
    from matplotlib.lines import Line2D

    options: dict[str, Any] = {"ls": "", "markeredgewidth": 0.6, "ms": 7}
    handles = [Line2D([], [], marker=m, mfc=c, mec=BLACK, label=s, **options) for s, (m, c) in markers.items()]
    handles.append(Line2D([], [], marker="o", mfc="white", mec=GREY, label="hollow: eager, same op", **options))
    made.legend(
        handles=handles, loc="outside lower center", ncols=columns_of(made, handles), frameon=False, fontsize=8.5
    )
