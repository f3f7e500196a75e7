"""What the release scripts decide before anything heavy runs: which versions of torch, which interpreters."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def call(script: str, name: str, *arguments: str, setting: str = "", path: str) -> "subprocess.CompletedProcess[str]":
    """One function of a script, alone."""
    found = re.search(rf"^{name}\(\) {{.*?^}}$", (SCRIPTS / script).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    code = f'set -euo pipefail\n{setting}\n{found[0]}\n{name} "$@"'
    environment = {"PATH": path, "HOME": "/nonexistent"}
    return subprocess.run(["bash", "-c", code, "bash", *arguments], env=environment, capture_output=True, text=True)


def command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_the_matrix_is_the_newest_of_each_minor_version_from_the_floor_on(tmp_path: Path) -> None:
    text = (
        "torch (2.15.0)\nAvailable versions: 3.0.0, 2.15.0, 2.14.1, 2.14.0, 2.13.0+cpu, 2.13.0, 2.12.0, 2.9.1, 1.13.1"
    )
    command(tmp_path, "pip-index", f"cat <<END\n{text}\nEND")
    setting = f"python={tmp_path}/pip-index floor=12"
    done = call("test_matrix.sh", "newest_of_each_minor", setting=setting, path="/usr/bin:/bin")
    assert done.stdout.split() == ["2.12.0", "2.13.0", "2.14.1", "2.15.0", "3.0.0"]


def test_the_floor_of_the_matrix_is_the_requirement() -> None:
    line = next(x for x in (SCRIPTS / "test_matrix.sh").read_text().splitlines() if x.startswith("floor="))
    done = subprocess.run(["bash", "-c", f"{line}; echo $floor"], cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert f'"torch>=2.{done.stdout.strip()}"' in (SCRIPTS.parent / "pyproject.toml").read_text()


@pytest.mark.parametrize("body", ["exit 127", f'exec {sys.executable} "$@"'], ids=["a shim", "another version"])
def test_an_interpreter_that_is_no_good_is_refused(body: str, tmp_path: Path) -> None:
    command(tmp_path, "python3.99", body)
    done = call("build_wheels.sh", "interpreter", "3.99", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 1 and done.stdout == ""
