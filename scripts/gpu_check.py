"""Everything that only a GPU can say, in one command and under ten minutes: tests, then times, then a table.

    python scripts/gpu_check.py                      what `make gpu-check` runs; any Python that has torch and triton
    python scripts/gpu_check.py --only qk_norm_rope  one op (may be repeated)
    python scripts/gpu_check.py --dry-run            the same logic on a CPU, through Triton's interpreter

Tests are those of tests/gpu: of the Triton kernels and, where the CUDA extension is built, of the CUDA C++ kernels.
Times are those of CUDA graphs with a cold L2, in turns, beside a check of the very values that the timed replays wrote
(benchmarks/gpu_timing.py). Every row is in the JSON file as soon as it is measured. What does not fit into the time is
left out and named. Exits with 1 where a test or a check failed.
"""

import argparse
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Shares of the whole time: the tests', and what is kept for the network at the end. What the tests leave over, the
# ops' times have.
TESTS, MODEL = 0.6, 0.15
# Parity first: where the time is too short for all, it is the last that are missing.
TEST_FILES = [f"tests/gpu/test_gpu_{name}.py" for name in ("parity", "repeat", "model", "attention_peers")]
# Times that matter most come first: what is cut off at the end is the least of them.
ORDER = [("bfloat16", 32), ("bfloat16", 256), ("bfloat16", 1), ("float32", 32), ("bfloat16", 8), ("bfloat16", 128)]
# Where torch.compile is timed too; everywhere where no tests take the time (--skip-tests).
COMPILED = [("bfloat16", 1), ("bfloat16", 32), ("bfloat16", 256)]
# Beside the plain case of each op.
SECOND = {
    "flow_interpolate": {"seeded": True},
    "flow_matching_loss": {"seeded": True},
    "dual_attention": {"masked": True},
}


class Report:
    """The JSON file: written beside and renamed, so that a reader or a kill never sees half of it."""

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": 1, "kind": "gpu-check", **stamp}
        self.data |= {"tests": None, "cuda_kernels": None, "copy_gbps": None}
        self.data |= {"rows": [], "left_out": [], "goals": [], "finished": False}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(beside, self.path)

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        self.write()

    def leave_out(self, what: str) -> None:
        self.data["left_out"].append(what)
        self.write()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/<device>/gpu-check-...json)")
    parser.add_argument("--only", action="append", metavar="OP", help="only this op, in tests and times")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds of the whole run (540)")
    parser.add_argument("--skip-tests", action="store_true", help="times alone")
    parser.add_argument("--skip-times", action="store_true", help="tests alone")
    parser.add_argument("--commit", help="of the working tree, where it is a copy without .git")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, the host's clock")
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"argument --budget: must be above 0, got {options.budget}")
    return options


def say(text: str = "") -> None:
    print(text, flush=True)


def install() -> None:
    """In place, without touching what is installed; where pip cannot, the checkout is put on the path."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        problem = None if done.returncode == 0 else (done.stderr.strip() or "no message").splitlines()[-1]
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    say("installed in place" if problem is None else f"not installed ({problem}): using the checkout by PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# ---- tests -----------------------------------------------------------------------------------------------------------


def run_tests(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """tests/gpu by pytest: counts by outcome, the failures' reasons, and whether it came to its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tests.jsonl")
        command = [sys.executable, "-m", "pytest", *TEST_FILES, "-q", "--no-header", "--show-capture=no", "--tb=short"]
        command += ["-m", "gpu", "-p", "no:cacheprovider", "-o", "minversion=0", f"--gpu-report={path}"]
        if options.dry_run:
            # All of them take minutes in the interpreter: `pytest tests/gpu --gpu-dry-run` runs them.
            command += ["--gpu-dry-run", "-k", " or ".join(options.only or ["rms_norm_modulate"])]
        elif options.only:
            command += ["-k", " or ".join(options.only)]
        if not options.dry_run and importlib.util.find_spec("xdist") is None:
            say("pytest-xdist is not installed: the tests run one after the other and may not all fit into the time")
        elif not options.dry_run:
            command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]  # most of the time is compilation
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            # each worker's inductor would start a pool of compilers of its own
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started above, with its workers
            output, _ = process.communicate()
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    finished = process.returncode in (0, 1)
    counts = Counter(row["outcome"] for row in rows)
    result: dict[str, Any] = {name: counts[name] for name in ("passed", "failed", "skipped")}
    # On a device nothing may be skipped: a parity that was not looked at is not there.
    result["ok"] = finished and counts["passed"] > 0 and not counts["failed"]
    result["ok"] = result["ok"] and (options.dry_run or not counts["skipped"])
    result |= {"finished": finished, "exit_status": process.returncode}
    result["problems"] = [row for row in rows if row["outcome"] != "passed"]
    result["tail"] = [] if result["ok"] else output.splitlines()[-25:]
    return result


def tell_tests(result: dict[str, Any]) -> None:
    end = "" if result["finished"] else " (cut off: --skip-times gives the tests the whole time)"
    say(f"tests: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped{end}")
    for row in [row for row in result["problems"] if row["outcome"] == "failed"][:20]:
        say(f"  FAILED {row['test']}: {(row['reason'].strip() or '?').splitlines()[-1]}")
    if not result["ok"] and not result["failed"]:
        say("\n".join(result["tail"]))


# ---- times -----------------------------------------------------------------------------------------------------------


def time_ops(options: argparse.Namespace, report: Report, clock: Any, deadline: float) -> None:
    import torch

    from benchmarks.cases import OPS, has_kernels, module_of, work

    cuda = report.data["cuda_kernels"] == "work"
    plain = [(dtype, batch, op, {}) for dtype, batch in ORDER for op in OPS]
    second = [("bfloat16", batch, op, sizes) for batch in (32, 256) for op, sizes in SECOND.items()]
    jobs = [*plain[: 2 * len(OPS)], *second, *plain[2 * len(OPS) :]]
    if options.dry_run:  # numpy knows no bfloat16: the interpreter's is not the hardware's
        jobs = [(dtype, 2, op, {}) for dtype in ("float32", "float16") for op in OPS]
    for dtype, batch, op, more in jobs:
        if options.only and op not in options.only:
            continue
        name = f"{op} batch {batch} {dtype}" + "".join(f" {key}" for key in more)
        if time.monotonic() > deadline:
            report.leave_out(f"times of {name}")
            continue
        sizes = {**(module_of(op).SMALL if options.dry_run else {}), **more}
        compile = options.skip_tests or ((dtype, batch) in COMPILED and not more)
        make = functools.partial(
            work, module_of(op).case, batch, getattr(torch, dtype), clock.device,
            triton=True, cuda=cuda and has_kernels(op, "cuda"), compile=compile and not options.dry_run, **sizes,
        )  # fmt: skip
        in_graph = (dtype, batch) == ("bfloat16", 1)
        measure_into(report, op, make, ("forward", "backward"), clock, options, in_graph=in_graph)


def time_model(options: argparse.Namespace, report: Report, clock: Any, deadline: float) -> None:
    """One block in training; one and 24 blocks in sampling, as it is and with the condition prepared."""
    import torch

    from benchmarks import model_block, model_step
    from blip3o_fast.models import BLIP3oConfig

    if options.only:
        return
    half, device = torch.bfloat16, clock.device
    if options.dry_run:
        tiny = BLIP3oConfig.preset("tiny", num_layers=1, sample_size=2)
        jobs = [("block", model_block.work, 2, tiny, ("both",)), ("model", model_step.work, 2, tiny, ("inference",))]
        half = torch.float16
    else:
        one, whole = BLIP3oConfig(num_layers=1), BLIP3oConfig()
        jobs = [("block", model_block.work, batch, one, ("both",)) for batch in (32, 256)]
        jobs += [("one layer", model_step.work, batch, one, ("inference",)) for batch in (2, 64)]
        jobs += [("model", model_step.work, batch, whole, ("inference",)) for batch in (2, 64)]
    for name, make, batch, config, modes in jobs:
        if time.monotonic() > deadline:
            report.leave_out(f"times of {name} batch {batch}")
            continue
        # Stock's 24 blocks take inductor minutes.
        compile = not options.dry_run and config.num_layers == 1
        made = functools.partial(make, batch, half, device, config, triton=True, compile=compile)
        measure_into(report, name, made, modes, clock, options)


def measure_into(
    report: Report,
    name: str,
    make: "functools.partial[Any]",
    modes: tuple[str, ...],
    clock: Any,
    options: argparse.Namespace,
    in_graph: bool = False,
) -> None:
    """The rows of the `Work` that `make` makes, each in the report at once. What breaks is a row; the run goes on."""
    from benchmarks import gpu_rows

    rounds, case = (5 if options.dry_run else 30), {"batch": "?", "dtype": "?"}
    try:
        job = make()
        case = job.case
        for row in gpu_rows.measure(job, modes, clock, report.data["copy_gbps"], rounds=rounds, in_graph=in_graph):
            report.add(row)
            say(gpu_rows.line(row))
        del job
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        row = {"suite": name, "case": case, "mode": modes[0], "provider": "ours", "status": "error", "reason": reason}
        report.add(row)
        say(gpu_rows.line(row))
    gpu_rows.release(clock.device)


def bad_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Wrong values of anyone; a provider that broke, unless it is a peer's."""
    own = ("eager", "ours", "ours, cuda", "ours, condition prepared")
    return [r for r in rows if r["status"] == "FAILED" or (r["status"] == "error" and r["provider"] in own)]


# ---- the run ---------------------------------------------------------------------------------------------------------


def stamp_of(options: argparse.Namespace, device: str) -> tuple[dict[str, Any], str]:
    from benchmarks import machine

    stamp = machine.stamp(device)
    if options.commit:
        stamp |= {"commit": options.commit}
    name = stamp["gpu"]["name"] if "gpu" in stamp else "CPU, dry run"
    kept = {key: stamp[key] for key in ("commit", "dirty", "versions", "system")}
    gpu = stamp.get("gpu")
    capability = gpu["capability"] if gpu else None
    now = datetime.now(UTC)
    result = {"date": now.isoformat(timespec="seconds"), "device": name, "capability": capability, "gpu": gpu, **kept}
    return result, machine.slug(stamp)


def main(arguments: list[str]) -> int:
    options, start = parse(arguments), time.monotonic()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    else:
        install()
    missing = [name for name in ("torch", "triton", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        say(f"{sys.executable} has no {' and no '.join(missing)}: a Python with them is needed (GPU_PYTHON of make)")
        return 2
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        say("this PyTorch sees no CUDA device (--dry-run checks the logic on a CPU)")
        return 2
    # The backward is captured from a forward that is kept; a compiled one would otherwise free what it has saved.
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False

    from benchmarks import goals, gpu_rows
    from benchmarks.gpu_timing import Clock
    from blip3o_fast.ops import _cuda, attention_implementations

    device = "cpu" if options.dry_run else "cuda"
    stamp, slug = stamp_of(options, device)
    dirty = "-dirty" if stamp["dirty"] else ""
    name = f"gpu-check-{datetime.now(UTC):%Y-%m-%d}-{stamp['commit']}{dirty}.json"
    report = Report(options.output or ROOT / "benchmarks" / "results" / slug / name, stamp)
    say(f"{stamp['device']}, capability {stamp['capability']}, commit {stamp['commit']}{dirty}")
    say(", ".join(f"{k} {v}" for k, v in stamp["versions"].items() if v))
    reason = _cuda.why_not(device, None if options.dry_run else 0)
    report.data["cuda_kernels"] = "work" if reason is None else f"absent: {reason}"
    say(f"CUDA C++ kernels: {report.data['cuda_kernels']}")
    report.data["attention"] = {name: why or "works" for name, why in attention_implementations().items()}
    say("attention by name: " + "; ".join(f"{name}: {state}" for name, state in report.data["attention"].items()))

    if not options.skip_tests:
        report.data["tests"] = run_tests(options, options.budget * (1.0 if options.skip_times else TESTS))
        report.write()
        tell_tests(report.data["tests"])
    if not options.skip_times:
        clock = Clock(device)
        report.data |= {"copy_gbps": clock.copy_gbps(), "replay_overhead_us": clock.overhead() * 1e6}
        report.write()
        say(f"copy {report.data['copy_gbps']:.0f} GB/s; an empty replay {report.data['replay_overhead_us']:.1f} us")
        time_ops(options, report, clock, start + options.budget * (1 - MODEL))
        time_model(options, report, clock, start + options.budget * 0.95)
    rows = report.data["rows"]
    report.data["goals"] = goals.reached(rows)
    report.data |= {"seconds": time.monotonic() - start, "finished": True}
    report.write()

    say()
    for text in gpu_rows.table(rows, report.data["goals"], report.data["left_out"]):
        say(text)
    if report.data["tests"] is not None:
        tell_tests(report.data["tests"])
    bad, tests = bad_rows(rows), report.data["tests"]
    for row in bad:
        say(f"{row['status']} {row['suite']} {row['case']} {row['mode']} {row['provider']}: {row['reason']}")
    say(f"{report.path} ({report.data['seconds']:.0f} s)")
    return 1 if bad or (tests is not None and not tests["ok"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
