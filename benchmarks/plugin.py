"""The pytest side: pytest collects the benchmark files, pytest-benchmark holds the options and the statistics.

`compare` is a benchmark fixture that measures several providers in turns where `benchmark` measures one function. Each
provider and mode becomes an ordinary entry of pytest-benchmark (grouped by case and mode), so its options
(`--benchmark-min-rounds`, `--benchmark-max-time`, `--benchmark-disable`, ...), its JSON, its histograms and its
comparison with saved runs all work on interleaved samples.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_goals, live, machine, table
from benchmarks.harness import Settings, failed_row, measure
from benchmarks.rows import Recorded, Writer
from benchmarks.work import Work
from blip3o_fast.ops import use_isa
from blip3o_fast.timing import Timing

KEY: "pytest.StashKey[Run]" = pytest.StashKey()
RESULTS = Path(__file__).resolve().parent / "results"


class Run:
    """One run of the suite: its machine, its rows, and the line that says what is happening."""

    def __init__(self, config: pytest.Config) -> None:
        threads = config.getoption("bench_threads")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device: str = config.getoption("bench_device")
        use_isa(config.getoption("bench_isa"))
        if self.device == "cuda":  # a captured backward keeps its forward, whose buffers a compiled one would free
            from torch._functorch import config as functorch

            functorch.donated_buffer = False
        self.stamp = machine.stamp(self.device)
        self.ceilings = machine.Ceilings(self.device)
        self.rows: list[dict[str, Any]] = []
        self.limits: dict[str, Any] | None = None
        self.writer: Writer | None = None
        self.live: live.Live | None = None
        self.cases, self.done = 0, 0
        if not config.getoption("bench_no_save"):
            now, dirty = datetime.now(UTC), "-dirty" if self.stamp["dirty"] else ""
            folder = Path(config.getoption("bench_results")) / machine.slug(self.stamp)
            path = folder / f"{now:%Y-%m-%d}-{self.stamp['commit']}{dirty}.jsonl"
            self.writer = Writer(path, run=f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}")
            self.writer.append("machine", self.stamp)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self.writer is not None:
            for row in rows:
                self.writer.append("time", row)
        if self.live is not None:
            self.live.add(rows)

    def finish(self) -> None:
        """Also after Ctrl-C: the ceilings, as good as the probes so far make them, close the run."""
        if self.limits is None and any(row["median_s"] is not None for row in self.rows):
            self.limits = self.ceilings.finish()
            if self.writer is not None:
                self.writer.append("ceilings", self.limits)

    def watch(self) -> None:
        """From the first case on: a growing table where somebody watches."""
        self.live = live.watch()

    def unwatch(self) -> None:
        if self.live is not None:
            self.live.close()
            self.live = None

    def progress(self, text: str) -> None:
        """What is happening now; nothing where nobody watches."""
        if self.live is not None:
            self.live.progress(f"[{self.done + 1}/{self.cases}] {text}")

    def report(self) -> str:
        """Write the figures and the page beside the rows; the path, or why there is none."""
        from benchmarks import report

        assert self.writer is not None
        recorded = Recorded({"run": self.writer.run, **self.stamp}, self.rows, self.limits or {})
        try:
            made = report.make(recorded, self.writer.path)
            path = report.write(made, report.folder_of(self.writer.path, recorded))
        except ModuleNotFoundError as error:
            return f"no report: {report.NEEDS_MATPLOTLIB} ({error})"
        left_out = [f"\n        left out: {name}: {why}" for name, why in made.left_out.items()]
        return f"report: {os.path.relpath(path)}" + "".join(left_out)

    def say(self, line: str) -> None:
        print(line, flush=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("blip3o_fast benchmarks")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are")
    group.addoption("--bench-isa", default="auto", help="instruction set of our CPU kernels")
    group.addoption("--bench-threads", type=int, help="threads of PyTorch; its default otherwise")
    group.addoption("--bench-results", default=str(RESULTS), help="folder of the JSONL rows")
    group.addoption("--bench-no-save", action="store_true", help="write no rows")
    group.addoption("--bench-no-report", action="store_true", help="write no page and no figures at the end")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Run(config)


def pytest_collection_finish(session: pytest.Session) -> None:
    run = session.config.stash[KEY]
    run.cases = len(session.items)
    for line in table.header(run.stamp):
        run.say(line)
    run.watch()


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return (report.outcome, "", "")  # no letters: our own lines tell more


def pytest_exception_interact(node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any]) -> None:
    """A case that could not even be made is a row too. What `compare` fails for has its rows already."""
    assert call.excinfo is not None
    error = call.excinfo.value
    if isinstance(error, pytest.fail.Exception) or not isinstance(error, Exception):
        return
    case = {name: str(value) for name, value in getattr(getattr(node, "callspec", None), "params", {}).items()}
    node.config.stash[KEY].add([failed_row(node.path.stem, case or {"case": node.name}, error)])


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[KEY]
    run.unwatch()
    run.finish()
    if run.limits is not None and table.impossible(run.rows, run.limits) and session.exitstatus == 0:
        session.exitstatus = 1


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    run = terminalreporter.config.stash[KEY]
    run.finish()
    interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
    if not run.rows:
        if interrupted:
            run.say("interrupted before anything was measured")
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            run.say("nothing was measured: every case of these files is of the full set (--set full)")
        return
    for line in table.lines(run.rows, run.limits or {}, colour=sys.stdout.isatty()):
        run.say(line)
    for line in cpu_goals.lines(run.rows, run.limits or {}, run.stamp["isa"]):
        run.say(line)
    if run.writer is None:
        return
    path = os.path.relpath(run.writer.path)
    run.say(f"\nrows: {path}")
    if interrupted:
        run.say(f"interrupted: the {len(run.rows)} rows measured so far are there; python -m benchmarks.report {path}")
    elif not terminalreporter.config.getoption("bench_no_report"):
        run.say(run.report())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["blip3o_fast"] = config.stash[KEY].stamp


def _settings(benchmark: Any) -> Settings:
    """pytest-benchmark's options, of the command line and of the case's marker."""
    return Settings(
        min_rounds=benchmark._min_rounds,
        max_rounds=max(benchmark._min_rounds, Settings.max_rounds),
        max_time=benchmark._max_time,
        min_time=benchmark._min_time,
        timed=benchmark.enabled,
        timer=benchmark._timer,
    )


def _record(benchmark: Any, work: Work, mode: str, timings: dict[str, Timing]) -> None:
    """An entry of pytest-benchmark per provider: a copy of the fixture under the provider's name, fed our samples."""
    for provider, timing in timings.items():
        lane = copy.copy(benchmark)
        lane.name, lane.group = provider, f"{work.label} {mode}"
        lane.fullname = f"{benchmark.fullname}::{mode}::{provider}"
        lane.extra_info = {"mode": mode, "provider": provider, **work.case}
        stats = lane._make_stats(timing.calls)
        for seconds in timing.samples:
            stats.update(seconds * timing.calls)  # it divides by the calls itself


@pytest.fixture
def bench_device(request: pytest.FixtureRequest) -> str:
    return request.config.stash[KEY].device


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[[Work], None]]:
    """Measure a `Work`: rows, entries of pytest-benchmark, and a failure where a provider is wrong or breaks."""
    run = request.config.stash[KEY]
    benchmark._mode = "compare"  # or pytest-benchmark warns that its fixture was not used

    def compare(work: Work) -> None:
        bad = []
        for rows, timings in measure(work, _settings(benchmark), run.ceilings, run.progress):
            run.add(rows)
            _record(benchmark, work, rows[0]["mode"], timings)
            if run.live is None:
                run.say(table.progress_line(rows))
            bad += [row for row in rows if row["status"] in ("FAILED", "error")]
        if bad:
            sentences = [f"{r['mode']} {r['provider']} {r['status']}: {r['reason']}" for r in bad]
            pytest.fail(f"{work.label}\n  " + "\n  ".join(sentences), pytrace=False)

    yield compare
    run.done += 1
