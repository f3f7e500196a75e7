"""The rows of a run as a table that grows while it runs, where somebody watches a terminal; rich draws it.

It is drawn only between the measurements: a thread that refreshes it would run beside what is timed.
"""

import sys
import time
from itertools import islice
from typing import Any

from benchmarks import table

COLUMNS = ("case", "mode", "provider", "median", "p20 .. p80", "x first", "error", "correct")
AROUND = 8  # lines of the terminal that the table's frame, its head and the line below it take


class Live:
    """Shows the newest rows that fit into the terminal; `close` takes the table away for what is printed after it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.console = Console()
        self.rows: list[tuple[dict[str, Any], bool]] = []
        self.status, self.started = "", time.monotonic()
        self.live = RichLive(console=self.console, auto_refresh=False, transient=True)
        self.live.start()

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += [(row, index == 0) for index, row in enumerate(rows)]
        self.draw()

    def progress(self, text: str) -> None:
        self.status = text
        self.draw()

    def draw(self) -> None:
        self.live.update(self.renderable(), refresh=True)

    def renderable(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        room = max(1, self.console.size.height - AROUND)
        hidden = max(0, len(self.rows) - room)
        made = Table(caption=f"{hidden} rows above" if hidden else None, caption_justify="left")
        for name in COLUMNS:
            left = name in ("case", "mode", "provider", "correct")
            made.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
        for row, first in islice(self.rows, hidden, None):
            made.add_row(*(Text(text) for text in cells(row, first)), style=style(row))
        elapsed = time.monotonic() - self.started
        status = Text(f"{elapsed:.0f} s  {self.status}", style="dim", no_wrap=True, overflow="ellipsis")
        return Group(made, status) if self.rows else status

    def close(self) -> None:
        self.live.stop()


def cells(row: dict[str, Any], first: bool) -> list[str]:
    """A row as texts, one per column of COLUMNS; the final table has the rest."""
    mode, provider, median, spread, ratio, *_, error, correct = table.cells(row, {}, first)
    case = f"{row['suite']} " + " ".join(f"{k}={v}" for k, v in row["case"].items())
    return [case, mode, provider, median, spread, ratio, error, correct]


def style(row: dict[str, Any]) -> str:
    return {"FAILED": "bold red", "error": "bold red", "absent": "dim"}.get(row["status"], "")


def watch() -> Live | None:
    """A live table, or None where stdout is no terminal or rich is missing: then a line per case is printed."""
    if not sys.stdout.isatty():
        return None
    try:
        return Live()
    except ModuleNotFoundError:
        return None
