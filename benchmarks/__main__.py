"""`python -m benchmarks --set quick`: run benchmark files under pytest and print one table. From a checkout's root."""

import argparse
import ast
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MACHINERY = {
    *("__main__", "cases", "goals", "gpu_rows", "gpu_timing", "harness"),
    *("breakdown", "live", "plots", "readme_table", "report", "style"),
    *("cost_model", "scaling", "scaling_report"),
    *("cpu_goals", "machine", "model_memory", "peers", "plugin", "rows"),
    *("sampling_run", "storage_quality", "table", "work"),
}
# Op, block, model, training step and sampling: under 5 minutes on two cores, without the cases marked `full`.
QUICK = ("rms_norm_modulate", "model_block", "model_forward", "train_step", "sample")
SETS = {"quick": QUICK, "cpu": ("packed_linear", "cpu_block", "cpu_ops", "model_block")}
# How the libraries are told to leave AVX-512 alone, so that one machine can stand for those that have none.
AVX2_ONLY = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}

EPILOG = """\
examples:
  python -m benchmarks --set quick                          what `make bench` runs
  python -m benchmarks --set cpu                            what `make bench-cpu` runs
  python -m benchmarks --op rms_norm_modulate --set full    all cases of one file
  python -m benchmarks --list                               what there is
  python -m benchmarks --op model_block -- --benchmark-json=block.json
everything after -- goes to pytest: its options and pytest-benchmark's work.
"""


def suites() -> dict[str, Path]:
    """The benchmark files by name: benchmarks/ops/*.py, then benchmarks/*.py."""
    found = [*sorted((HERE / "ops").glob("*.py")), *sorted(HERE.glob("*.py"))]
    return {path.stem: path for path in found if path.stem not in MACHINERY}


def describe(path: Path) -> str:
    """First line of the file's docstring, without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time providers of the same work in turns, with their correctness in the same run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set", choices=(*SETS, "full"), help="quick (the default), cpu or full")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this file (may be repeated)")
    parser.add_argument("--file", action="append", metavar="PATH", type=Path, help="a benchmark file of your own")
    parser.add_argument("--list", action="store_true", help="show the files and what they measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are (cpu)")
    parser.add_argument("--isa", choices=("auto", "avx2"), default="auto", help="avx2: everybody does without AVX-512")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (its own default)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds at least (7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed seconds per provider and mode (1)")
    parser.add_argument("--check-only", action="store_true", help="correctness without times")
    parser.add_argument("--results", type=Path, help="folder of the JSONL rows (benchmarks/results)")
    parser.add_argument("--no-save", action="store_true", help="write no rows, and so no report")
    parser.add_argument("--no-report", action="store_true", help="write no page and no figures at the end")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser()
    own, rest = arguments, []
    if "--" in arguments:
        own, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    options = parser.parse_args(own)
    options.pytest = rest
    known = suites()
    for name in options.op or []:
        if name not in known:
            parser.error(f"argument --op: there is no benchmark {name!r}; there are: {', '.join(known)}")
    for path in options.file or []:
        if not path.is_file():
            parser.error(f"argument --file: {path} is not a file")
    for name, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"argument {name}: must be at least 1, got {value}")
    if not options.seconds > 0:
        parser.error(f"argument --seconds: must be above 0, got {options.seconds}")
    return options


def selected(options: argparse.Namespace) -> list[Path]:
    known = suites()
    if options.op or options.file:
        return [known[name] for name in options.op or []] + list(options.file or [])
    if options.set == "full":
        return list(known.values())
    return [known[name] for name in SETS[options.set or "quick"] if name in known]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.list:
        for name, path in suites().items():
            print(f"{name:24} {'quick' if name in QUICK else 'full ':6} {describe(path)}")
        return 0
    try:
        import pytest
        import pytest_benchmark  # noqa: F401  (only to say which package is missing)
    except ImportError as error:
        print(f'benchmarks need pytest-benchmark: pip install -e ".[bench]" ({error})', file=sys.stderr)
        return 2
    if options.isa == "avx2":
        assert "torch" not in sys.modules, "the libraries have read these variables already"
        os.environ.update(AVX2_ONLY)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("--device cuda: this PyTorch sees no CUDA device", file=sys.stderr)
            return 2
    command = [str(path) for path in selected(options)]
    command += [
        "-p",
        "benchmarks.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:logging",
        "-o",
        "python_functions=bench_*",
    ]
    # our own lines instead of pytest's: only failures are left to it
    command += ["-s", "-qq", "-rN", "--no-header", "--disable-warnings", "-o", "console_output_style=classic"]
    command += ["--benchmark-quiet", f"--benchmark-min-rounds={options.rounds}", "--benchmark-min-time=0.001"]
    command += [f"--benchmark-max-time={options.seconds}", f"--bench-device={options.device}"]
    command += [f"--bench-isa={options.isa}"]
    command += ["--benchmark-disable"] if options.check_only else []
    command += [] if options.threads is None else [f"--bench-threads={options.threads}"]
    command += [] if options.results is None else [f"--bench-results={options.results}"]
    command += ["--bench-no-save"] if options.no_save or options.check_only else []
    command += ["--bench-no-report"] if options.no_report else []
    command += [] if options.set == "full" else ["-m", "not full"]
    return int(pytest.main([*command, *options.pytest]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
