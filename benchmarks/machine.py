"""What the numbers were measured on: the machine stamp, and its ceilings (multiply-adds and copies) by measurement.

A time without its machine says nothing, and a data sheet's peak is not the peak of a shared virtual core. So the
ceilings are probed in short bursts between the pieces of the very work they are compared with, and the best counts.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import blip3o_fast
from blip3o_fast.ops._cpu import ISAS, active_isa, use_isa

ROOT = Path(__file__).resolve().parent.parent
# Instruction sets that decide how fast this package's kernels and the BLAS can be.
FLAGS = (
    "avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 "  # x86
    "asimd asimdhp asimddp bf16 i8mm sve sve2"  # arm
).split()
VERSIONS = ("triton", "diffusers", "transformers", "numpy", "pytest-benchmark")
DEFAULT_CACHE = 32 << 20  # bytes; where the system does not tell


def cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Model, flags and physical cores; what cannot be found out (no Linux) is None or empty."""
    try:
        text = path.read_text()
    except OSError:
        text = ""
    entries = [dict(re.findall(r"^([^\t:]+)\s*:[ \t]*(.*)$", block, re.M)) for block in text.split("\n\n") if block]
    first: dict[str, str] = entries[0] if entries else {}
    have = set((first.get("flags") or first.get("Features") or "").split())
    cores = {(e["physical id"], e["core id"]) for e in entries if "physical id" in e and "core id" in e}
    model = first.get("model name") or platform.processor() or platform.machine() or "unknown"
    return {
        "model": model.strip(),
        "family_model_stepping": "/".join(first.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "flags": [flag for flag in FLAGS if flag in have],
        "physical_cores": len(cores) or None,
    }


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that the first core sees."""
    sizes = [DEFAULT_CACHE] if not folder.is_dir() else [0]
    for path in folder.glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes) or DEFAULT_CACHE


def affinity() -> list[int] | None:
    """The CPUs this process may run on; None where the system has no such notion."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> tuple[str, bool | None]:
    """(short hash, dirty) of the checkout; ("unknown", None) outside one. Untracked files count as dirty."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    status = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return (head, None if status is None else bool(status)) if head else ("unknown", None)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """Path of the C++ compiler, as torch.compile looks for one on a CPU."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def stamp(device: str = "cpu") -> dict[str, Any]:
    """Everything about this run that does not change while it runs."""
    head, dirty = commit()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    path = compiler()
    result: dict[str, Any] = {
        "device": device,
        "cpu": cpuinfo(),
        "logical_cores": os.cpu_count(),
        "affinity": affinity(),
        "threads": torch.get_num_threads(),
        "isa": active_isa() if ISAS else None,  # that our own kernels run with
        "cache_bytes": cache_bytes(),
        "load_average_at_start": load,
        "system": platform.platform(),
        "compiler": (_output(path, "--version") or path).splitlines()[0] if path else None,
        "mkl": torch.backends.mkl.is_available(),
        "commit": head,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "blip3o_fast": blip3o_fast.__version__,
            **{name: version(name) for name in VERSIONS},
        },
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return result


def slug(stamp: dict[str, Any]) -> str:
    """A folder name for the device: `amd-epyc-2t`, `nvidia-h200`."""
    name = stamp["gpu"]["name"] if "gpu" in stamp else f"{stamp['cpu']['model']} {stamp['threads']}t"
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*ghz", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def build_fma_probe(isa: str = "auto") -> ctypes.CDLL | None:
    """fma_probe.c built for this CPU, or for less of it, and loaded; None where there is no C compiler."""
    found = next((p for p in map(shutil.which, ("cc", "gcc", "clang")) if p), None)
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma_probe.so")
        source = str(Path(__file__).with_name("fma_probe.c"))
        flags = ("-mavx2", "-mfma") if isa == "avx2" else ("-march=native",)
        if _output(found, "-O3", *flags, "-shared", "-fPIC", "-o", str(library), source) is None:
            return None
        probe = ctypes.CDLL(str(library))  # stays mapped after the file is gone
    for function in (probe.fma_probe, probe.bf16_probe):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
    return probe


class Ceilings:
    """Peak multiply-adds and copy bandwidth of the threads in use, each the best of many short probes.

    `fma()` is meant to run between rounds of the work (2 ms, registers only, so it leaves the caches alone), `copy()`
    between cases (it sweeps the caches). Both are for a CPU; on a GPU only `copy()` is measured.
    """

    MIN_PROBES = 20
    MIN_COPY = 64 << 20  # bytes of each of the two buffers
    BURST = 1e-3  # seconds per core and probe

    def __init__(self, device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.fma_one: list[float] = []
        self.fma_all: list[float] = []
        self.bf16_all: list[float] = []  # empty where the CPU does not multiply bfloat16
        self.copies: list[float] = []
        self.cpus = affinity()
        threads = torch.get_num_threads()
        self.pins: list[Any] = self.cpus[:threads] if self.cpus and len(self.cpus) >= threads else [None] * threads
        self.probe = build_fma_probe(use_isa.state.active) if device == "cpu" else None
        self.kind = "none"
        if self.probe is not None:
            self.kind = f"C loop of fp32 vector multiply-adds, {self.probe.lanes()} lanes, one pinned thread per core"
            # 2 * lanes * 12 flops per iteration; one short run tells how many iterations make a burst
            flops = 24 * self.probe.lanes()
            self.iterations = max(1, int(self.probe.fma_probe(20_000) * 1e9 * self.BURST / flops))
        elif device == "cpu":
            self.kind = (
                "torch.mm of 192x192 fp32 matrices, cache-resident, all threads (no C compiler for a pure probe)"
            )
            self.matrix = torch.randn(192, 192)
        bytes_each = min(max(2 * cache_bytes(), self.MIN_COPY), 256 << 20)
        self.source = torch.ones(bytes_each // 4, device=device)
        self.target = torch.empty_like(self.source)
        self.last_fma = -1.0

    def fma(self) -> None:
        """One burst on one core (in turn), then one on all cores in use at once."""
        if self.device != "cpu":
            return
        if self.probe is None:
            self.fma_all.append(max(self._matmul() for _ in range(5)))
        else:
            self.fma_one.append(self._burst([self.pins[len(self.fma_one) % len(self.pins)]]))
            self.fma_all.append(self._burst(self.pins))
            if self.probe.bf16_probe(1) > 0:
                self.bf16_all.append(self._burst(self.pins, self.probe.bf16_probe))
        self.last_fma = self.clock()

    def copy(self) -> None:
        """One copy of a buffer larger than the caches; GB/s counts what is read and what is written."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = self.clock()
        self.target.copy_(self.source)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.copies.append(2 * 4 * self.source.numel() / (self.clock() - start) * 1e-9)

    def due(self, interval: float = 0.3) -> bool:
        """Whether the last multiply-add probe is long enough ago (seconds) for another one."""
        return self.device == "cpu" and self.clock() - self.last_fma >= interval

    def finish(self) -> dict[str, Any]:
        """Fill up to MIN_PROBES each and give the bests: GFLOP/s and GB/s, None where there is no probe."""
        while self.device == "cpu" and len(self.fma_all) < self.MIN_PROBES:
            self.fma()
        while len(self.copies) < self.MIN_PROBES:
            self.copy()
        return {
            "fma_probe": self.kind,
            "fma_gflops": max(self.fma_all, default=None),
            "fma_gflops_one_core": max(self.fma_one, default=None),
            "fma_probes": len(self.fma_all),
            "bf16_gflops": max(self.bf16_all, default=None),
            "copy_gbps": max(self.copies),
            "copy_probes": len(self.copies),
            "copy_bytes": 2 * 4 * self.source.numel(),
        }

    def _matmul(self) -> float:
        start = self.clock()
        torch.mm(self.matrix, self.matrix)
        return 2 * 192**3 / (self.clock() - start) * 1e-9

    def _burst(self, pins: list[Any], probe: Any = None) -> float:
        rates: list[float] = []
        probe = self.probe.fma_probe if probe is None else probe  # type: ignore[union-attr]

        def run(pin: int | None) -> None:
            # a thread of its own, so that the pinning ends with it
            if pin is not None:
                os.sched_setaffinity(0, {pin})
            rates.append(probe(self.iterations))

        threads = [threading.Thread(target=run, args=(pin,)) for pin in pins]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(rates)
