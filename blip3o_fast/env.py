"""What this machine and this installation can do: `python -m blip3o_fast.env`, made to be pasted into a bug report.

The only file of the package that reads environment variables. It imports nothing but the standard library until a
report is asked for, so every layer may use `read`.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Every variable that the package reads, and those of others that change what it does. docs/environment.md has the same
# list with the defaults.
VARIABLES = {
    "BLIP3O_FAST_BUILD": "which extension setup.py builds: auto, cpu or none",
    "BLIP3O_FAST_TRACEBACK": "1: the command line shows the whole traceback of an error",
    "CUDA_VISIBLE_DEVICES": "which GPUs torch sees",
    "HF_HOME": "where the hub client keeps its files",
    "HF_HUB_OFFLINE": "1: the hub client never touches the network",
    "LOCAL_RANK": "number of this process on its machine, set by torchrun: which GPU is its",
    "LOCAL_WORLD_SIZE": "number of processes on this machine, set by torchrun: they share its memory",
    "MKL_NUM_THREADS": "threads of the CPU matrix products",
    "OMP_NUM_THREADS": "threads of torch on the CPU",
    "RANK": "number of this process, set by torchrun",
    "SLURM_ARRAY_TASK_ID": "number of this task of a job array, set by Slurm: its share of an extraction",
    "SLURM_ARRAY_TASK_MAX": "largest number in the array",
    "SLURM_ARRAY_TASK_MIN": "smallest number in the array",
    "SLURM_ARRAY_TASK_STEP": "step between the numbers of the array",
    "SLURM_LOCALID": "number of this process on its machine, set by srun",
    "SLURM_PROCID": "number of this process, set by srun",
    "SLURM_STEP_NUM_TASKS": "number of processes, set by srun",
    "TORCHELASTIC_RESTART_COUNT": "how often torchrun has started this process again: then training continues",
    "TORCHELASTIC_RUN_ID": "what torchrun calls the job: a process started again continues only a run of its own",
    "TORCH_LOGS": "what torch.compile prints",
    "TORCHINDUCTOR_CACHE_DIR": "where torch.compile keeps what it built",
    "TRITON_CACHE_DIR": "where Triton keeps what it built",
    "TRITON_INTERPRET": "1: Triton kernels run in Python, on CPU tensors",
    "WANDB_API_KEY": "a login of wandb",
    "WANDB_BASE_URL": "the server of wandb",
    "WANDB_DIR": "where wandb writes; the run's folder if unset",
    "WANDB_MODE": "offline or disabled",
    "WANDB_PROJECT": "project of the runs; wins over --wandb_project",
    "WORLD_SIZE": "number of processes, set by torchrun",
}

# What the report says only that it is set.
_SECRET = {"WANDB_API_KEY"}
# distribution -> the extra that brings it ("" is the core)
_LIBRARIES = {
    "torch": "",
    "triton": "dev",
    "numpy": "",
    "safetensors": "",
    "huggingface_hub": "",
    "typer": "",
    "transformers": "train",
    "accelerate": "train",
    "diffusers": "bench",
    "pillow": "data",
    "matplotlib": "report",
    "wandb": "wandb",
    "xformers": "attention",
    "flash_attn": "",
    "pybind11": "dev",
}
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


def read(name: str) -> str | None:
    """The value of an environment variable, None where it is unset or empty. It must be listed in VARIABLES."""
    assert name in VARIABLES, f"{name} is not documented in env.VARIABLES"
    return os.environ.get(name) or None


def inherited(**changes: str) -> dict[str, str]:
    """The whole environment with some variables changed, to start another program with."""
    return {**os.environ, **changes}


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str, word: str = "") -> str | None:
    """The first line with `word` that a program prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line for line in done.stdout.strip().splitlines() if word in line), None)


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _first_line("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _first_line("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + (" with local changes" if changed else "")


def _cpu() -> str:
    """Model, cores that this process may use, and the vector instructions that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [model[1] if model else platform.processor() or platform.machine(), f"{cores} cores"]
    return ", ".join(parts + [" ".join(f for f in _CPU_FLAGS if f in have)]).rstrip(", ")


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def devices() -> list[str]:
    """One line per GPU that torch can use, or one line that says why there is none."""
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
            )
        return found
    if torch.version.cuda is None and torch.version.hip is None:
        return ["none: this torch is a CPU build"]
    return [f"none: torch is built for CUDA {torch.version.cuda}, but finds no usable device"]


def backends() -> dict[str, str]:
    """Each backend -> "works ..." or the reason why it does not."""
    import torch

    from blip3o_fast import _ext, ops
    from blip3o_fast.ops import _cuda, _triton
    from blip3o_fast.ops._backend import Backends

    native: dict[str, list[str]] = {}
    for name in sorted(n for n in dir(ops) if hasattr(ops, f"{n}_ref")):
        module = sys.modules.get(f"blip3o_fast.ops.{name}")
        for value in vars(module).values() if module else ():
            if isinstance(value, Backends):
                for backend in value.refusals:
                    native.setdefault(backend, []).append(value.op)

    def status(backend: str, broken: str) -> str:
        if backend not in native:
            return "no: no op has such a kernel in this version"
        return f"no: {broken}" if broken else f"works: {', '.join(native[backend])}"

    # without a GPU there is none, and what else is missing is worth telling too
    no_triton = _triton.why_not(*("cuda", 0) if torch.cuda.is_available() else ("cpu", None)) or ""
    if no_triton and not _triton.why_no_triton():
        no_triton += "".join(f"; {reason}" for reason in (_triton.why_no_launcher(),) if reason and reason != no_triton)
    return {
        "reference": "works: every op",
        "cpu": status("cpu", _ext.ERROR),
        "triton": status("triton", no_triton),
        "cuda": status("cuda", _cuda.why_not("cuda", 0 if torch.cuda.is_available() else None) or ""),
    }


def native() -> dict[str, str]:
    """What the C++ kernels are built for, what of it this machine runs, and whose threads they use."""
    import torch

    from blip3o_fast import _ext
    from blip3o_fast.ops import _cpu

    if _ext.C is None:
        return {"none": _ext.ERROR}
    return {
        "built": " ".join(_ext.C.isas),
        "usable": " ".join(_cpu.ISAS),
        "active": _cpu.active_isa(),
        "threads": f"{torch.get_num_threads()}, of {_ext.C.pool_name()}",
    }


def attention() -> dict[str, str]:
    """Each attention implementation that can be asked for by name -> "works" or the reason why it does not."""
    from blip3o_fast.ops import attention_implementations

    return {name: f"no: {reason}" if reason else "works" for name, reason in attention_implementations().items()}


def sections() -> Iterator[tuple[str, dict[str, str]]]:
    """The report: (title, {label: text}) per section."""
    from blip3o_fast import __version__
    from blip3o_fast.ops import attention_rule

    commit = _commit()
    yield (
        "blip3o_fast",
        {
            "version": f"{__version__} ({commit})" if commit else __version__,
            "folder": str(Path(__file__).resolve().parent),
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
    )
    libraries = {}
    for name, extra in _LIBRARIES.items():
        missing = f'not installed (pip install "blip3o_fast[{extra}]")' if extra else "not installed"
        libraries[name] = version_of(name) or missing
    yield "libraries", libraries
    yield (
        "machine",
        {
            "cpu": _cpu(),
            "memory": _memory(),
            "gpu": "; ".join(devices()),
            "c++ compiler": _first_line("c++", "--version") or "none found",
            "nvcc": _first_line("nvcc", "--version", word="release") or "none found",
        },
    )
    yield "backends", backends()
    yield "C++ kernels: instruction sets and threads", native()
    rule = {f"auto on {device}": choice for device, choice in attention_rule().items()}
    yield "attention", rule | attention()
    given = {name: "(set)" if name in _SECRET else value for name in VARIABLES if (value := read(name))}
    yield "environment variables that are set", given or {"none": ""}


def report() -> str:
    """The whole report as text. Contains no secrets: only the variables listed in VARIABLES are shown."""
    lines = []
    for title, entries in sections():
        width = max(map(len, entries))
        lines += [title, *(f"  {label:<{width}}  {text}".rstrip() for label, text in entries.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(), end="")
