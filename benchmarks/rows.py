"""Results as data: one JSON object per line, appended whole.

Every row has `schema`, `kind` and `run`; a run is one `machine` row, a `time` row per case, mode and provider as soon
as it is measured, and one `ceilings` row at the end. A run that was interrupted keeps what it measured.
"""

import json
import os
from dataclasses import dataclass, field
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


@dataclass
class Recorded:
    """One run of a file: its machine, its timed rows in order, its ceilings ({} where it was cut short)."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.machine["run"])


def recorded(path: Path) -> list[Recorded]:
    """The runs of a file, oldest first. ValueError as of `load`, and where a row belongs to no run."""
    runs: dict[str, Recorded] = {}
    for row in load(path):
        if row["kind"] == "machine":
            runs[row["run"]] = Recorded(row)
        elif row["run"] not in runs:
            raise ValueError(f"{path}: a row of run {row['run']} stands before that run's machine")
        elif row["kind"] == "ceilings":
            runs[row["run"]].limits = row
        elif row["kind"] == "time":
            runs[row["run"]].rows.append(row)
    if not runs:
        raise ValueError(f"{path}: holds no run")
    return list(runs.values())


def choose(path: Path, *, run: str | None = None, isa: str | None = None) -> Recorded:
    """The last run of a file, or the last of that name or instruction set; ValueError lists those that there are."""
    runs = recorded(path)
    fitting = [r for r in runs if run in (None, r.name) and isa in (None, r.machine.get("isa"))]
    if not fitting:
        wanted = " and ".join(f"{name} {value!r}" for name, value in (("run", run), ("isa", isa)) if value is not None)
        there = ", ".join(f"{r.name} (isa {r.machine.get('isa')})" for r in runs)
        raise ValueError(f"{path}: no run with {wanted}; there are: {there}")
    return fitting[-1]
