"""The figure of `blip3o-fast try`: a block per picture, its true neighbours above those of what was generated.

Everything is placed in inches, so that a sheet of one picture and of many look alike.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

from blip3o_fast.training.plots import BLUE, GREEN, GREY

MARGIN, HEADER, GAP = 0.22, 0.62, 0.14
QUERY, BOX, TITLE, LABEL = 2.35, 1.3, 0.27, 0.56
ROW = TITLE + BOX + LABEL
BLOCK_GAP = 0.3
INK, PALE = "#1b1f24", "#DDDDDD"
_DPI = 130


@dataclass
class Cell:
    """One neighbour. picture: None where it was not found: its key is shown instead. hit: gets the green frame."""

    picture: Image | None
    key: str
    caption: str
    similarity: float
    hit: bool = False


@dataclass
class Block:
    """One picture of the user: lines under it, each with what stands in grey below, and titled rows of cells."""

    picture: Image
    lines: Sequence[tuple[str, str]]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def draw(blocks: Sequence[Block], headline: str) -> bytes:
    """PNG bytes."""
    from matplotlib.figure import Figure

    columns = max(3, *(len(cells) for block in blocks for _, cells in block.rows))  # the headline needs three
    width = 2 * MARGIN + QUERY + columns * (GAP + BOX) + GAP
    heights = [len(block.rows) * ROW for block in blocks]
    height = MARGIN + HEADER + sum(heights) + BLOCK_GAP * (len(blocks) - 1) + MARGIN / 2
    page = _Page(Figure(figsize=(width, height), facecolor="white"), width, height)
    page.text(MARGIN, MARGIN, headline, size=11, weight="bold")
    page.text(
        MARGIN,
        MARGIN + 0.22,
        "Under each neighbour: its similarity, then its caption.  Green: also among the picture's true neighbours.",
        size=8.5,
        color=GREY,
    )
    top = MARGIN + HEADER
    for block, tall in zip(blocks, heights, strict=True):
        _draw_block(page, block, top)
        top += tall + BLOCK_GAP
        if block is not blocks[-1]:
            page.rule(top - BLOCK_GAP / 2 - 0.05)
    return page.png()


def _draw_block(page: _Page, block: Block, top: float) -> None:
    page.text(MARGIN, top, "the picture", size=9, color=GREY)
    bottom = page.picture(block.picture, MARGIN, top + TITLE, QUERY, BLUE, 2.5)
    y = bottom + 0.09
    for number, (line, beside) in enumerate(block.lines):
        page.text(MARGIN, y, _wrapped(line, 36, 1), size=8.5, weight="bold" if number == 0 else "normal")
        page.text(MARGIN, y + 0.155, _wrapped(beside, 42, 1), size=7.5, color=GREY)
        y += 0.355
    for row, (title, cells) in enumerate(block.rows):
        y, x = top + row * ROW, MARGIN + QUERY + 2 * GAP
        page.text(x, y, title, size=9, color=GREY)
        for cell in cells:
            _draw_cell(page, cell, x, y + TITLE)
            x += BOX + GAP


def _draw_cell(page: _Page, cell: Cell, x: float, y: float) -> None:
    frame, line = (GREEN, 3.0) if cell.hit else (PALE, 0.8)
    if cell.picture is None:
        page.placard(f"no picture:\n{_wrapped(cell.key, 18, 4)}", x, y, BOX, frame, line)
    else:
        page.picture(cell.picture, x, y, BOX, frame, line, centred=True)
    page.text(x, y + BOX + 0.06, f"{cell.similarity:.2f}", size=8.5, weight="bold", color=GREEN if cell.hit else INK)
    page.text(x, y + BOX + 0.2, _wrapped(cell.caption, 23, 2), size=7.5)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


class _Page:
    """A figure addressed in inches from its top left corner."""

    def __init__(self, figure: Any, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def text(self, x: float, y: float, text: str, *, size: float, **style: Any) -> None:
        """Lines hanging below y. Nothing in it is mathematics: captions are anybody's words, dollar signs included.

        Placed by their baselines: the ink of "ace" and of "Äfg" begins at different heights.
        """
        style = {"color": INK, "va": "baseline", "parse_math": False} | style
        for number, line in enumerate(text.split("\n")):
            baseline = y + (0.93 + 1.22 * number) * size / 72
            self.figure.text(x / self.width, 1 - baseline / self.height, line, size=size, **style)

    def box(self, x: float, y: float, wide: float, tall: float, frame: str, line: float) -> Any:
        place = (x / self.width, 1 - (y + tall) / self.height, wide / self.width, tall / self.height)
        axes = self.figure.add_axes(place, xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=line)
        return axes

    def picture(
        self, picture: Image, x: float, y: float, side: float, frame: str, line: float, *, centred: bool = False
    ) -> float:
        """A picture inside a square, at its top or in its middle; returns where the picture ends."""
        small = picture.copy()
        small.thumbnail((int(2 * side * _DPI), int(2 * side * _DPI)))
        scale = side / max(small.size)
        wide, tall = (max(0.08, length * scale) for length in small.size)  # a line of pixels stays visible
        x, y = (x + (side - wide) / 2, y + (side - tall) / 2) if centred else (x, y)
        self.box(x, y, wide, tall, frame, line).imshow(small, aspect="auto", interpolation="antialiased")
        return y + tall

    def placard(self, text: str, x: float, y: float, side: float, frame: str, line: float) -> None:
        axes = self.box(x, y, side, side, frame, line)
        axes.set_facecolor("#F3F4F6")
        centre = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, text, size=7, color=GREY, parse_math=False, **centre)

    def rule(self, y: float) -> None:
        self.box(MARGIN, y, self.width - 2 * MARGIN, 0.004, PALE, 0.5)

    def png(self) -> bytes:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
            self.figure.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()
