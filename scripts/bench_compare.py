"""Is this checkout slower than an earlier commit? The same benchmarks of both, in turns, and the ratios of their times.

    make bench-compare BASE=HEAD~3
    make bench-compare BASE=v0.1.0 THRESHOLD=1.05 FLAGS="--op swiglu --op ode_step"
    python -m scripts.bench_compare --base HEAD~3 --set quick --turns 7

The base is checked out into a throwaway git worktree; its CPU extension is compiled there, or taken from here where the
native sources are the same; it runs in the same Python environment. The worktree is removed in the end, also after
Ctrl-C. In each turn both sides run `python -m benchmarks` once, each with its own package and its own benchmark files;
which one goes first alternates. A turn gives one ratio per case, mode and provider: this checkout's median time over
the base's. The median of the turns' ratios is shown with their 20th and 80th percentile. A row is SLOWER past the
threshold only where that interval leaves out 1: what the turns do not agree on is no finding. What runs without our
code (`eager`) is a control: it should be 1. torch.compile is left out unless `--compile` asks for it: it is the same
PyTorch on both sides, and slow to start.

Exit status: 0 nothing is slower, 1 something is slower or no longer right, 2 the comparison could not be made.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import __main__ as suite
from benchmarks.rows import load
from benchmarks.table import seconds
from blip3o_fast.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("swiglu", "ode_step")  # small sizes: a turn is about starting Python
CONTROLS = ("eager", "compile")
# What both sides must be before anything is timed: the package of their own folder, with a fresh extension.
PROBE = "import blip3o_fast, blip3o_fast._ext as e; print(blip3o_fast.__file__); print(e.ERROR if e.C is None else '')"

Key = tuple[str, str, str, str]  # suite, case, mode, provider


class Unable(Exception):
    """Why the comparison cannot be made."""


@dataclass(frozen=True)
class Compared:
    """One case, mode and provider: the two medians over the turns, and the turns' ratios (above 1: slower now)."""

    key: Key
    base: Timing
    now: Timing

    @property
    def ratio(self) -> Timing:
        return self.base.speedups(self.now)

    @property
    def control(self) -> bool:
        return self.key[3] in CONTROLS

    def slower(self, threshold: float) -> bool:
        return self.ratio.median > threshold and self.ratio.p20 > 1


def run(command: Sequence[object], folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The command to its end. Whatever stops us (Ctrl-C too) first stops it and all that it started."""
    words, environment = [str(word) for word in command], {**os.environ, **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, **pipes) as child:
        try:
            output, _ = child.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    return subprocess.CompletedProcess(words, child.returncode, output, "")


def git(*words: object, root: Path) -> str:
    done = run(["git", *words], root)
    if done.returncode != 0:
        raise Unable(f"git {' '.join(map(str, words))}: {done.stdout.strip()}")
    return done.stdout.strip()


def commit_of(reference: str, root: Path) -> str:
    done = run(["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}"], root)
    if done.returncode != 0:
        raise Unable(f"--base: there is no commit {reference!r} here (see git log --oneline, git tag, git branch)")
    return done.stdout.strip()


def check_benchmarks(commit: str, ops: Sequence[str], root: Path) -> None:
    """Before anything is built: does the base have benchmarks, and those that are asked for?"""
    names = git("ls-tree", "-r", "--name-only", commit, "--", "benchmarks", root=root).splitlines()
    if "benchmarks/__main__.py" not in names:
        raise Unable(f"the base {commit[:10]} has no benchmarks (benchmarks/__main__.py): take a later one")
    for op in ops:
        if not {f"benchmarks/ops/{op}.py", f"benchmarks/{op}.py"} & set(names):
            raise Unable(f"the base {commit[:10]} has no benchmark {op!r}: take a later one, or other --op")


def check_side(name: str, folder: Path) -> None:
    done = run([sys.executable, "-c", PROBE], folder)
    said = done.stdout.strip().splitlines()
    if done.returncode != 0:
        raise Unable(f"{name}: blip3o_fast cannot be imported in {folder}: {said[-1] if said else 'no message'}")
    if not Path(said[0]).is_relative_to(folder):
        raise Unable(f"{name}: {folder} imports {said[0]}, which is not its own package")
    if len(said) > 1:
        raise Unable(f"{name}: {said[1]}")


@contextlib.contextmanager
def worktree(commit: str, root: Path) -> Iterator[Path]:
    """A folder with the commit's files; gone afterwards, and git's record of it too."""
    holder = Path(tempfile.mkdtemp(prefix="blip3o_fast-base-")).resolve()
    folder = holder / "base"
    try:
        git("worktree", "add", "--detach", folder, commit, root=root)
        yield folder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        git("worktree", "prune", root=root)


def build(folder: Path, commit: str, root: Path) -> None:
    """The CPU extension, in place. What git does not ignore afterwards would make the base another than its commit."""
    ours = sorted((root / "blip3o_fast").glob("_C.*so"))
    if ours and run(["git", "diff", "--quiet", commit, "--", "csrc", "setup.py"], root).returncode == 0:
        print("the native sources are the same: the base takes this checkout's extension", flush=True)
        shutil.copy2(ours[0], folder / "blip3o_fast")  # check_side compares its hash with the base's sources
    else:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = run(command, folder, BLIP3O_FAST_BUILD="cpu")
        if done.returncode != 0:
            raise Unable("the base does not build:\n" + "\n".join(done.stdout.strip().splitlines()[-15:]))
    changed = git("status", "--porcelain", root=folder)
    if changed:
        raise Unable(f"the base is dirty, it is no longer its commit:\n{changed}")


def measured(folder: Path, results: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The time rows of one run of the harness in this folder."""
    command: list[object] = [sys.executable, "-m", "benchmarks", "--seconds", options.seconds, "--results", results]
    command += [word for op in options.op for word in ("--op", op)]
    command += ["--set", options.set] if options.set else []
    # the harness takes no compiler for a reason to leave torch.compile out
    variables = {} if options.compile else {"CXX": "/nonexistent/left-out-by-bench-compare"}
    done = run(command, folder, **variables)
    files = sorted(results.rglob("*.jsonl"))
    if not files:
        raise Unable(f"no rows from {folder}:\n" + "\n".join(done.stdout.strip().splitlines()[-15:]))
    try:
        return [row for file in files for row in load(file) if row["kind"] == "time"]
    except ValueError as error:
        raise Unable(str(error)) from None


def key_of(row: dict[str, Any]) -> Key:
    case = " ".join(f"{name}={value}" for name, value in row["case"].items())
    return row["suite"], case, row["mode"], row["provider"]


def in_turns(sides: dict[str, Path], options: argparse.Namespace) -> dict[str, list[dict[Key, dict[str, Any]]]]:
    """Per side, per turn: its rows by key. A B, B A, A B, ..."""
    rows: dict[str, list[dict[Key, dict[str, Any]]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.turns):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                print(f"turn {turn + 1} of {options.turns}: {name}", flush=True)
                found = measured(sides[name], Path(scratch, f"{name}-{turn}"), options)
                rows[name].append({key_of(row): row for row in found})
    return rows


def compare(rows: dict[str, list[dict[Key, dict[str, Any]]]]) -> tuple[list[Compared], list[str], list[str]]:
    """What both sides timed in every turn; what the base timed and we no longer do; and what is only noted."""
    base, now = rows["base"], rows["now"]
    compared, broken, notes = [], [], []
    for key in {**base[0], **now[0]}:
        medians = {
            name: [turn[key]["median_s"] if key in turn else None for turn in turns] for name, turns in rows.items()
        }
        label = " ".join(key)
        if all(None not in values for values in medians.values()):
            compared.append(Compared(key, *(Timing(tuple(medians[name])) for name in ("base", "now"))))
        elif None not in medians["base"]:
            found = next((turn[key] for turn in now if key in turn and turn[key]["median_s"] is None), None)
            if found is None:
                notes.append(f"{label}: only in the base")
            else:
                broken.append(f"{label}: {found['status']}: {found['reason']}")
        elif None not in medians["now"]:
            notes.append(f"{label}: only here, no time from the base")
    return compared, broken, notes


def report(compared: list[Compared], broken: list[str], notes: list[str], threshold: float) -> bool:
    """Prints the ratios; True where nothing is slower past the threshold and nothing broke."""
    width = max((len(" ".join(c.key[1:])) for c in compared), default=0)
    bad = list(broken)
    for index, c in enumerate(compared):
        if index == 0 or compared[index - 1].key[0] != c.key[0]:
            print(f"\n{c.key[0]:{width + 2}} {'base':>9} {'now':>9}  now/base  p20 .. p80")
        verdict = "control" if c.control else ""
        if c.slower(threshold):
            verdict = "control moved: the machine, not the code" if c.control else "SLOWER"
            bad += [] if c.control else [f"{' '.join(c.key)}: {c.ratio.median:.2f} times the base's time"]
        times = f"{seconds(c.base.median):>9} {seconds(c.now.median):>9}"
        ratio = f"{c.ratio.median:8.3f}  {c.ratio.p20:.3f} .. {c.ratio.p80:.3f}"
        print(f"  {' '.join(c.key[1:]):{width}} {times}  {ratio}  {verdict}".rstrip())
    print("", *notes, sep="\n" if notes else "")
    judged = sum(not c.control for c in compared)
    unsteady = [c for c in compared if c.control and c.ratio.p80 > threshold * c.ratio.p20]
    if unsteady:
        print(f"warning: {len(unsteady)} controls spread by more than {threshold:.2f}: too busy a machine to judge")
    if bad:
        print(f"FAILED, threshold {threshold:.2f}:", *bad, sep="\n  ")
    elif judged:
        print(f"nothing of {judged} is slower than {threshold:.2f} times the base")
    return not bad


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = suite.suites()
    parser.add_argument("--base", required=True, metavar="REF", help="commit, tag or branch to compare with")
    parser.add_argument(
        "--op", action="append", metavar="NAME", help=f"benchmark file (again for more; {', '.join(QUICK)})"
    )
    parser.add_argument("--set", choices=("quick", "cpu", "full"), help="a set; with --op: full also takes every case")
    parser.add_argument("--threshold", type=float, default=1.10, help="slower than this many times is a failure (1.10)")
    parser.add_argument("--turns", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--seconds", type=float, default=0.3, help="timed seconds per provider, mode and run (0.3)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    options = parser.parse_args(arguments)
    if not options.base:
        parser.error("argument --base: a commit, tag or branch is needed: make bench-compare BASE=HEAD~1")
    options.op = options.op or ([] if options.set else list(QUICK))
    for name in options.op:
        if name not in known:
            parser.error(f"argument --op: there is no benchmark {name!r}; there are: {', '.join(known)}")
    if not options.threshold >= 1:
        parser.error(f"argument --threshold: must be at least 1, got {options.threshold}")
    if options.turns < 3:
        parser.error(f"argument --turns: must be at least 3, or there is no spread, got {options.turns}")
    if not options.seconds > 0:
        parser.error(f"argument --seconds: must be above 0, got {options.seconds}")
    return options


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    options = parse(arguments)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` runs
    try:
        commit = commit_of(options.base, root)
        check_benchmarks(commit, options.op, root)
        check_side("this checkout", root)
        with worktree(commit, root) as folder:
            changes = " with uncommitted changes" if git("status", "--porcelain", root=root) else ""
            print(f"base: {git('log', '-1', '--format=%h %s', commit, root=root)}")
            print(f"now:  {git('log', '-1', '--format=%h %s', root=root)}{changes}", flush=True)
            build(folder, commit, root)
            check_side("the base", folder)
            rows = in_turns({"base": folder, "now": root}, options)
        compared, broken, notes = compare(rows)
        if not compared and not broken:
            raise Unable("no case was timed on both sides:\n" + json.dumps(notes, indent=2))
        return 0 if report(compared, broken, notes, options.threshold) else 1
    except Unable as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the worktree is removed", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
