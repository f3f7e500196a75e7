"""Where a block's time goes: the products and ops of one block, each measured alone, stacked beside the whole block.

The parts are rows of their own suites in the same run. What no suite measures (the projections of the context, the
modulation) is estimated: the FLOPs that are left of the block, at the rate of the block's largest product.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.cpu_goals import IN_A_BLOCK, ROWS, Rows
from benchmarks.plots import PRODUCTS, Missing, Row, columns_of
from benchmarks.style import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, figure, png

NAMES_OF_PRODUCTS = {"qkqv": "q, k, v and the second q", "gate_up": "gate and up", "down": "down", "out": "out"}
OTHER = "other products (estimated)"
LOOKS = dict(
    zip(
        [*NAMES_OF_PRODUCTS.values(), OTHER, *IN_A_BLOCK, "swiglu"],
        [(BLUE, ""), (SKY, "//"), ("#7FB8D9", "\\\\"), ("#BBDDF0", ".."), ("#FFFFFF", "xx"),
         (ORANGE, ""), (YELLOW, "//"), (RED, ".."), (GREEN, "\\\\"), (PINK, "oo")],
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """The parts of one provider's block in ms, and the block itself as it was measured."""

    name: str
    parts: dict[str, float]
    whole: float


def _bar(found: Rows, provider: str, dtype: str, batch: int) -> Bar | None:
    """None where a row is missing. provider: eager, or the storage of our packed weights."""
    block = found.find("cpu_block", provider, dtype=dtype, batch=batch)
    where = {"rows": ROWS * batch, "dtype": dtype}
    products = {n: found.find(PRODUCTS, provider, product=p, **where) for p, n in NAMES_OF_PRODUCTS.items()}
    stock = provider == "eager"
    calls = {**IN_A_BLOCK, **({"swiglu": 1} if stock else {})}  # ours has it in the epilogue of gate and up
    ops = {op: found.find(op, "eager" if stock else "ours", dtype=dtype, batch=batch) for op in calls}
    if block is None or None in products.values() or None in ops.values():
        return None
    parts = {name: row["median_s"] * 1e3 for name, row in products.items() if row is not None}
    spent = sum(row["flops"] for row in products.values() if row is not None)
    largest = max((row for row in products.values() if row is not None), key=lambda row: row["flops"])
    small = {op: calls[op] * row["median_s"] * 1e3 for op, row in ops.items() if row is not None}
    spent += sum(calls[op] * row["flops"] for op, row in ops.items() if row is not None)
    parts[OTHER] = max(0, block["flops"] - spent) / largest["flops"] * largest["median_s"] * 1e3
    name = "eager" if stock else f"ours,\npacked {provider}"
    return Bar(name, parts | small, block["median_s"] * 1e3)


def bars(rows: list[Row]) -> dict[tuple[int, str], list[Bar]]:
    """(batch, dtype) -> eager and ours, where the run has all parts of both."""
    found = Rows(rows)
    result = {}
    for dtype, storage in (("float32", "fp32"), ("bfloat16", "bf16")):
        for batch in sorted({r["case"]["batch"] for r in found.rows if r["suite"] == "cpu_block"}):
            pair = [_bar(found, provider, dtype, batch) for provider in ("eager", storage)]
            if None not in pair:
                result[batch, dtype] = [bar for bar in pair if bar is not None]
    return result


def breakdown(rows: list[Row]) -> bytes:
    """Two stacked bars a panel, eager above ours; a line where the whole block was measured."""
    panels = bars(rows)
    if not panels:
        raise Missing("needs the suites cpu_block, packed_linear and every op of a block in one run (--set cpu)")
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    made, axes = figure(6.2 * columns, 1.75 * height + 1.6, height, columns)
    for cell, ((batch, dtype), pair) in zip(axes.flat, panels.items(), strict=False):
        for y, bar in enumerate(pair):
            _stack(cell, y, bar)
        most = max(max(bar.whole, sum(bar.parts.values())) for bar in pair)
        cell.set_yticks(range(len(pair)), [bar.name for bar in pair])
        cell.set(ylim=(1.55, -0.55), xlim=(0, 1.22 * most), xlabel="ms per block", title=f"batch {batch}, {dtype}")
    for cell in list(axes.flat)[len(panels) :]:
        cell.set_visible(False)
    _legend(made, [name for name in LOOKS if any(name in bar.parts for pair in panels.values() for bar in pair)])
    made.suptitle("Where does the time of a block's forward go?", fontsize=12)
    return png(made)


def _stack(cell: Any, y: int, bar: Bar) -> None:
    left = 0.0
    for name, (color, hatch) in LOOKS.items():
        width = bar.parts.get(name, 0.0)
        cell.barh(y, width, left=left, height=0.62, color=color, hatch=hatch, edgecolor=BLACK, linewidth=0.5)
        left += width
    cell.plot([bar.whole] * 2, [y - 0.42, y + 0.42], color=BLACK, lw=2.4)
    cell.text(max(left, bar.whole), y, f"  {bar.whole:.1f} ms", va="center", fontsize=9, fontweight="bold")


def _legend(made: Any, names: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=LOOKS[n][0], hatch=LOOKS[n][1], edgecolor=BLACK, linewidth=0.5, label=n) for n in names
    ]
    handles.append(Line2D([], [], color=BLACK, lw=2.4, marker="", label="the whole block, measured"))
    made.legend(
        handles=handles, loc="outside lower center", ncols=columns_of(made, handles), frameon=False, fontsize=8.5
    )
