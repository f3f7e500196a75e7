"""Stages that survive interruption: what is done is not done again, what was half done is."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer


class Stages:
    """Runs named stages in order under one folder, each once per settings.

    A stage is done when `folder/stages/<name>.json` says that it finished with the same settings after the same earlier
    stages, and all its outputs exist. Its record is written last, so Ctrl-C anywhere leaves the stage undone.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.records = folder / "stages"
        self.names = list(names)
        self.history: list[Any] = []
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []

    def run(
        self, name: str, title: str, settings: dict[str, Any], outputs: Sequence[Path], work: Callable[[], None]
    ) -> None:
        """Do `work` unless the record says that it is done. `settings` is everything that the result depends on.

        Outputs of an interrupted try with the same settings stay, so that `work` can continue; those of other
        settings are removed first.
        """
        number = f"[{self.names.index(name) + 1}/{len(self.names)}]"
        record, begun = self.records / f"{name}.json", self.records / f"{name}.begun.json"
        key = {"settings": settings, "after": list(self.history)}
        done = _read(record)
        if done is not None and done["key"] == key and all(path.exists() for path in outputs):
            typer.echo(f"{number} {title}: done before")
        else:
            typer.echo(f"{number} {title}")
            self.records.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
            if _read(begun) != key:
                for path in outputs:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                write_text(begun, json.dumps(key, indent=1))
            start = time.perf_counter()
            work()
            missing = [str(path) for path in outputs if not path.exists()]
            assert not missing, f"stage {name} ended without writing {missing}"
            done = {"key": key, "seconds": round(time.perf_counter() - start, 2), "finished": time.time()}
            write_text(record, json.dumps(done, indent=1))
            begun.unlink()
        self.history.append([name, done["finished"]])
        self.seconds[title] = done["seconds"]

    def command(self, *arguments: object) -> None:
        """Run one verb of our own command line, shown as the user would type it. ValueError where it fails."""
        words = [str(argument) for argument in arguments]
        typer.echo("      $ blip3o-fast " + " ".join(words))
        code = subprocess.run([sys.executable, "-m", "blip3o_fast", *words]).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        if code != 0:
            raise ValueError(f"`blip3o-fast {words[0]}` ended with exit code {code}; its own message stands above")

    def note(self, *arguments: object) -> list[str]:
        """Remember a verb's command line for the report and return its words."""
        words = [str(argument) for argument in arguments]
        self.commands.append("blip3o-fast " + " ".join(words))
        return words


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def _read(record: Path) -> dict[str, Any] | None:
    try:
        return json.loads(record.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
