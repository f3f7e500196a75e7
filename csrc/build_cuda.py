"""How setup.py, which loads this file by its path, compiles csrc/cuda: with an nvcc that is found and tried.

What decides is the toolkit, never a GPU: an extension may be built where there is none. CUDA's runtime is linked
statically, so that the extension needs nothing but the driver.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

MINIMUM = (12, 4)  # the first whose launches we use
FLAGS = ["-std=c++17", "-O3", "--threads", "2", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Binary code for Ampere, Ada and Hopper, and what newer GPUs compile for themselves.
ARCHITECTURES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_89,code=sm_89"]
ARCHITECTURES += ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]
PROBE = """
#include <cuda_runtime.h>
__global__ void probe(float* x) { *x = 1.0f; }
int main() { probe<<<1, 1>>>(nullptr); return cudaDeviceSynchronize(); }
"""


class Toolkit(NamedTuple):
    nvcc: str
    version: str


def find() -> Toolkit | str:
    """The toolkit, or why there is none: CUDA_HOME or CUDA_PATH where one is set, else PATH and /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
        if found is None:
            return f"there is no nvcc in {home} (CUDA_HOME)"
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if found is None:
            return "no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda)"
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", told)
    if match is None:
        return f"{found} does not tell its version"
    version = tuple(map(int, match.groups()))
    if version < MINIMUM:
        return f"{found} is of CUDA {version[0]}.{version[1]}, and {MINIMUM[0]}.{MINIMUM[1]} is needed"
    reason = why_not_working(found)
    return f"{found} does not work here: {reason}" if reason else Toolkit(found, f"{version[0]}.{version[1]}")


def why_not_working(nvcc: str) -> str | None:
    """Compiles and links a program: headers, the static runtime and a host compiler that nvcc accepts are needed."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        command = [nvcc, "-std=c++17", "-cudart", "static", ARCHITECTURES[0], "-o", str(Path(folder, "probe"))]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    lines = (done.stderr + done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
    return None if done.returncode == 0 else next((line for line in lines if "error" in line), lines[-1])


def run(command: list[str]) -> str:
    """What the command said; SystemExit with it where it failed."""
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_kernels(toolkit: Toolkit, source: str, target: Path, includes: list[str]) -> None:
    """One object; what ptxas tells of registers and spills is kept beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folders = [f"-I{folder}" for folder in includes]
    said = run([toolkit.nvcc, *FLAGS, *ARCHITECTURES, *folders, "-c", source, "-o", str(target)])
    target.with_suffix(".ptxas").write_text(said)


def link(toolkit: Toolkit, objects: list[str], target: Path) -> None:
    """The extension. The runtime's functions stay inside: PyTorch brings its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    options = ["-shared", "-cudart", "static", *ARCHITECTURES, "-Xlinker", "--exclude-libs=ALL"]
    run([toolkit.nvcc, *options, *objects, "-o", str(target)])
