"""scripts/bench_compare.py against a tiny repository, whose "benchmark" writes rows with the times its commit says."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.rows import SCHEMA
from scripts import bench_compare

ROOT = Path(__file__).resolve().parent.parent.parent

# As `python -m benchmarks`: one row per provider, its time from times.json: a list has an element per turn.
BENCHMARKS = f"""
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--results") + 1])
turn = int(folder.name.split("-")[1])
folder.mkdir(parents=True)
with open(folder / "rows.jsonl", "w") as file:
    print(json.dumps({{"schema": {SCHEMA}, "kind": "machine", "run": "r"}}), file=file)
    for provider, value in json.loads(pathlib.Path("times.json").read_text()).items():
        value = value[turn] if isinstance(value, list) else value
        status = {{"status": "ok", "reason": None}} if value else {{"status": "FAILED", "reason": "y is wrong"}}
        row = {{"suite": "swiglu", "case": {{"batch": 2}}, "mode": "forward", "provider": provider, "median_s": value}}
        print(json.dumps({{"schema": {SCHEMA}, "kind": "time", "run": "r", **row, **status}}), file=file)
"""
FILES = {
    ".gitignore": "__pycache__/\n*.so\n",
    "blip3o_fast/__init__.py": "",
    "blip3o_fast/_ext.py": "C, ERROR = object(), ''\n",
    "setup.py": "open('blip3o_fast/_C.so', 'w').close()\n",
}


def git(repository: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *words], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout


def commit(repository: Path, **files: str) -> None:
    """One more commit, of these files: `times` is times.json, `main` the benchmarks' __main__.py."""
    for name, text in files.items():
        path = repository / {"times": "times.json", "main": "benchmarks/__main__.py"}.get(name, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: one without benchmarks, one with; the throwaway folders are below tmp_path too."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    commit(folder, **FILES)
    commit(folder, main=BENCHMARKS, times='{"eager": 1.0, "ours": 0.5}', **{"benchmarks/ops/swiglu.py": ""})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return folder


def outcome(repository: Path, base: str = "HEAD~1", *flags: str) -> int:
    """The exit status; whatever happened, nothing may be left behind."""
    status = bench_compare.main(["--base", base, "--op", "swiglu", "--turns", "3", *flags], repository)
    assert git(repository, "worktree", "list").count("\n") == 1
    assert not list((repository.parent / "scratch").iterdir())
    return status


def test_a_slower_commit_fails_and_the_sides_take_turns(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commit(repository, times='{"eager": 1.0, "ours": [0.6, 0.7, 0.65]}')
    assert outcome(repository) == 1
    out = capfd.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines() if line.startswith("turn")] == [
        *("base", "now"),
        *("now", "base"),
        *("base", "now"),
    ]
    # ratios 1.2, 1.4, 1.3: numpy's percentiles of three values lie at 0.4 and 1.6 of the way
    assert "500 ms    650 ms     1.300  1.240 .. 1.360  SLOWER" in out
    assert "1.00 s    1.00 s     1.000  1.000 .. 1.000  control" in out
    assert "FAILED, threshold 1.10:\n  swiglu batch=2 forward ours: 1.30 times the base's time" in out


@pytest.mark.parametrize(
    ("times", "flags", "status"),
    [
        ("[0.54, 0.54, 0.54]", (), 0),  # 8 % slower in every turn: below the threshold
        ("[0.54, 0.54, 0.54]", ("--threshold", "1.05"), 1),
        ("[0.3, 0.7, 0.7]", (), 0),  # 40 % slower by the median, but the turns do not agree
        ("0.4", (), 0),
        ("null", (), 1),  # no longer right: it has no time, which is no excuse
    ],
)
def test_what_fails(times: str, flags: tuple[str, ...], status: int, repository: Path) -> None:
    commit(repository, times=f'{{"eager": 1.0, "ours": {times}}}')
    assert outcome(repository, "HEAD~1", *flags) == status


def test_the_same_native_sources_are_not_compiled_twice(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (repository / "blip3o_fast" / "_C.so").touch()
    commit(repository, **{"setup.py": "raise SystemExit('compiled')"})
    assert outcome(repository, "HEAD") == 0
    commit(repository, **{"setup.py": "raise SystemExit('with other flags')"})
    assert outcome(repository) == 2
    assert "the base does not build:\ncompiled" in capfd.readouterr().err


def test_a_control_that_moves_is_the_machine(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commit(repository, times='{"eager": [2.0, 3.0, 4.0], "ours": 0.5, "new": 1.0}')
    assert outcome(repository) == 0
    out = capfd.readouterr().out
    assert "control moved: the machine, not the code" in out
    assert "warning: 1 controls spread by more than 1.10: too busy a machine to judge" in out
    assert "swiglu batch=2 forward new: only here, no time from the base" in out


ODD = {
    "does not build": ({"setup.py": "raise SystemExit('no such compiler')"}, "the base does not build:\nno such comp"),
    "dirty": ({"setup.py": "open('left.txt', 'w').close()"}, "the base is dirty, it is no longer its commit:\n?? left"),
    "no extension": ({"blip3o_fast/_ext.py": "C, ERROR = None, 'is stale'\n"}, "the base: is stale"),
    "no rows": ({"benchmarks/__main__.py": "print('oh'); raise SystemExit(2)"}, "base:\noh"),
    "other rows": ({"benchmarks/__main__.py": BENCHMARKS.replace(f'"schema": {SCHEMA}', '"schema": 99')}, "schema 99"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_base_that_cannot_be_compared_says_why(
    kind: str, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files, message = ODD[kind]
    good = {name: (repository / name).read_text() for name in files}
    commit(repository, **files)
    commit(repository, **good)
    assert outcome(repository) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("HEAD~1", "has no benchmarks (benchmarks/__main__.py): take a later one"),
        ("nowhere", "--base: there is no commit 'nowhere' here"),
        ("--help", "--base: there is no commit '--help' here"),
    ],
)
def test_a_reference_that_will_not_do(
    base: str, message: str, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench_compare.main([f"--base={base}", "--op", "swiglu"], repository) == 2
    assert message in capfd.readouterr().err


def test_a_benchmark_that_the_base_lacks(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench_compare.main(["--base", "HEAD", "--op", "ode_step"], repository) == 2
    assert "has no benchmark 'ode_step'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base="], "a commit, tag or branch is needed: make bench-compare BASE="),
        (["--base=HEAD", "--op=nothing"], "there is no benchmark 'nothing'; there are: "),
        (["--base=HEAD", "--threshold=0.9"], "--threshold: must be at least 1, got 0.9"),
        (["--base=HEAD", "--turns=2"], "--turns: must be at least 3"),
        (["--base=HEAD", "--seconds=nan"], "--seconds: must be above 0, got nan"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_compare.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_removes_the_worktree(number: int, status: int, repository: Path) -> None:
    commit(repository, **{"setup.py": "import os, time; os.mkdir(f'{os.getpid()}.so'); time.sleep(60)"})
    scratch = repository.parent / "scratch"
    code = "import sys; from pathlib import Path; from scripts import bench_compare as b; "
    code += f"sys.exit(b.main(['--base', 'HEAD', '--op', 'swiglu'], Path({str(repository)!r})))"
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 30
        while not (building := list(scratch.glob("*/base/*.so"))):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(number)
        assert child.wait(timeout=20) == status
    with pytest.raises(ProcessLookupError):  # the build is stopped, too
        os.kill(int(building[0].stem), 0)
    assert git(repository, "worktree", "list").count("\n") == 1
    assert not list(scratch.iterdir())
