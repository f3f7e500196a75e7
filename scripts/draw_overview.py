"""Draws docs/figures/overview.svg, the README's picture: `.venv/bin/python scripts/draw_overview.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).resolve().parent.parent / "docs" / "figures" / "overview.svg"
INK, FROZEN, OURS, JUDGE = "#24292f", "#eaeef2", "#cfe4ff", "#d7f2dd"


def box(axes, x, y, width, height, text, colour, bold=False):  # type: ignore[no-untyped-def]
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=colour, edgecolor=INK, lw=1
        )
    )
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        color=INK,
        fontsize=10,
        fontweight="bold" if bold else "normal",
    )


def arrow(axes, start, end, text="", dy=0.16, ha="center"):  # type: ignore[no-untyped-def]
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.1))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + dy, text, ha=ha, va="center", fontsize=8.5)


def main() -> None:
    # Fixed hash salt and no date: drawing it again gives the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "blip3o_fast", "svg.fonttype": "path", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(11, 3.5))
    axes.set_xlim(0, 15.4)
    axes.set_ylim(0, 4.9)
    axes.axis("off")

    box(axes, 0.1, 2.0, 1.6, 0.9, "pictures", FROZEN)
    box(axes, 2.7, 3.3, 2.4, 0.9, "condition encoder\n(frozen)", FROZEN)
    box(axes, 2.7, 0.7, 2.4, 0.9, "target encoder\n(frozen)", FROZEN)
    box(axes, 7.4, 2.65, 3.2, 1.55, "BLIP3oDiT\n24 blocks, 64 tokens\npredicts the velocity", OURS, bold=True)
    box(axes, 7.4, 0.7, 3.2, 0.9, "flow-matching loss", OURS)
    box(axes, 12.6, 2.98, 2.6, 0.9, "samples\n[N, 64, 768]", OURS)
    box(axes, 12.6, 0.7, 2.6, 0.9, "judged against\nhonest baselines", JUDGE)

    arrow(axes, (1.7, 2.75), (2.68, 3.6))
    arrow(axes, (1.7, 2.15), (2.68, 1.3))
    arrow(axes, (5.1, 3.75), (7.38, 3.75), "condition\n[N, 64, 1280]", dy=0.38)
    arrow(axes, (5.1, 1.05), (7.38, 1.05), "target [N, 64, 768]", dy=-0.2)
    arrow(axes, (6.1, 1.05), (7.38, 2.9), "noised: $x_t$, $\\sigma$", dy=0.25, ha="right")
    arrow(axes, (9.0, 2.63), (9.0, 1.62), "")
    axes.text(9.12, 2.12, "training", ha="left", va="center", fontsize=8.5)
    arrow(axes, (10.6, 3.43), (12.58, 3.43), "ODE, guidance")
    arrow(axes, (13.9, 2.96), (13.9, 1.62))
    figure.savefig(TARGET, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
