"""How each kernel is launched: a pure function of shape and architecture, and a table of what was measured.

Nothing is searched at run time. `make tune` times the choices on a GPU and writes `_tuned.json`, whose entries replace
the defaults below; without an entry the defaults hold.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("_tuned.json")
# Programs that keep the largest GPU here (132 multiprocessors) busy: two on each. A constant and not the live count, so
# that the same inputs are summed in the same order on every GPU.
_BUSY = 256


@dataclass(frozen=True)
class LaunchConfig:
    """num_warps: of a program; block: columns or elements that it holds at once, a power of two; rows: tokens of one
    sample (or rows of a matrix) that one program walks through."""

    num_warps: int
    block: int
    rows: int = 1


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rows_per_program(batch: int, tokens: int) -> int:
    """Tokens of one sample that one program of a backward kernel owns: 64, or where that leaves a GPU idle 16, 8 or 4.

    More programs mean more partial sums to add up, so it is the largest that still keeps the GPU busy.
    """
    for rows in (64, 16, 8):
        if batch * -(-tokens // rows) >= _BUSY:
            return rows
    return 4


def launch_config(
    kernel: str, *, width: int, batch: int = 1, tokens: int = 1, elements_per_thread: int = 16, capability: int = 90
) -> LaunchConfig:
    """The launch of a kernel that holds a whole row of `width` elements (a power of two above it, the tail masked).

    kernel: "<op>.<direction>"; elements_per_thread: of a row, fewer where a kernel keeps many values of each.
    num_warps and block do not depend on the batch: one compiled kernel serves every batch size.
    """
    block = next_power_of_2(width)
    warps = min(16, max(1, block // (32 * elements_per_thread)))
    config = LaunchConfig(num_warps=warps, block=block, rows=rows_per_program(batch, tokens))
    return replace(config, **tuned(kernel, width, capability))


def tuned(kernel: str, width: int, capability: int) -> dict[str, Any]:
    """What `make tune` found for this kernel, width and architecture; empty where it found nothing better."""
    entry: dict[str, Any] = _table().get(str(capability), {}).get(kernel, {}).get(str(width), {})
    return entry


@functools.cache
def _table() -> dict[str, Any]:
    if not TABLE.is_file():
        return {}
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table
