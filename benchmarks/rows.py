"""Results as data: one JSON object per line, appended whole.

Every row has `schema`, `kind` and `run`; a run is one `machine` row, a `time` row per case, mode and provider as soon
as it is measured, and one `ceilings` row at the end. A run that was interrupted keeps what it measured.
"""

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1


class Writer:
    """Appends rows to `path` (its folder is made). Each row is one write, so rows of two processes never mix."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, kind: str, values: dict[str, Any]) -> dict[str, Any]:
        row = {"schema": SCHEMA, "kind": kind, "run": self.run, **values}
        line = json.dumps(row, allow_nan=False) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        return row


def load(path: Path) -> list[dict[str, Any]]:
    """All rows of a file. ValueError names the line that is no row of this schema version."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        schema = row.get("schema") if isinstance(row, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path}, line {number}: row of schema {schema!r}, this version reads schema {SCHEMA}")
        rows.append(row)
    return rows
