"""How every figure of a report looks: who has which colour and hatch, and a figure as PNG bytes.

Okabe and Ito's colours can be told apart with every common colour blindness; a hatch or a marker per provider tells
them apart without colour. The ground is white and opaque, so a figure reads alike on a light and on a dark page.
"""

import io
from collections.abc import Iterable
from typing import Any

BLACK, ORANGE, SKY, GREEN, YELLOW = "#222222", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK, GREY, SOFT = "#0072B2", "#D55E00", "#CC79A7", "#9A9A9A", "#5F5F5F"
# provider -> colour, hatch, marker; ours are blue and green, peers warm, stock grey.
KNOWN = {
    "eager": (GREY, "", "s"),
    "eager_fp32": ("#CFCFCF", "..", "D"),
    "compile": (ORANGE, "//", "^"),
    "frozen": (RED, "xx", "v"),
    "onednn": (PINK, "\\\\", "<"),
    "ours": (BLUE, "", "o"),
    "fp32": (SKY, "--", "P"),
    "bf16": (GREEN, "oo", "X"),
    "int8": (YELLOW, "**", "*"),
}
# The same thing under another suite's name.
SAME = {"compile, frozen": "frozen", **{f"Sampler, {storage}": storage for storage in ("fp32", "bf16", "int8")}}
SPARE = [(c, h, m) for h, m in (("++", "p"), ("||", "h"), ("OO", "d")) for c in (PINK, SKY, ORANGE, GREEN)]
# What a reader calls them.
NAMES = {
    "eager": "eager (stock)",
    "eager_fp32": "eager in fp32",
    "compile": "torch.compile",
    "frozen": "compile, frozen",
    "onednn": "oneDNN, packed",
    "fp32": "ours, packed fp32",
    "bf16": "ours, packed bf16",
    "int8": "ours, packed int8",
}


def name_of(provider: str) -> str:
    return NAMES.get(provider, provider)


def looks(providers: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """(colour, hatch, marker) of each provider; those of KNOWN look the same in every figure."""
    given = list(dict.fromkeys(providers))
    strangers = [name for name in given if SAME.get(name, name) not in KNOWN]
    return {
        name: SPARE[strangers.index(name) % len(SPARE)] if name in strangers else KNOWN[SAME.get(name, name)]
        for name in given
    }


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A white figure and its grid of axes (always two-dimensional)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "hatch.linewidth": 0.6, "text.color": BLACK, "axes.labelcolor": BLACK}):
        made, axes = pyplot.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
        )
    made.patch.set_facecolor("white")
    for cell in axes.flat:
        for side in ("top", "right"):
            cell.spines[side].set_visible(False)
        cell.set_axisbelow(True)
    return made, axes


def png(made: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130)
    pyplot.close(made)
    return buffer.getvalue()
