"""Compiles CUDA sources for the host: csrc/cuda under the emulation of this folder, once per state of the sources.

The kernels are compiled with -fsanitize=thread for the calls before each access to memory, which race_check.cpp
answers; the emulation itself is not, and no sanitizer is linked.
"""

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulation"
# No optimisation that reads or writes what the source does not: each access is checked as it is written.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
KERNEL_FLAGS = ["-w", "-fsanitize=thread", "-fno-store-merging", "-fno-tree-vectorize"]

# `__shared__ T a[2], b[3];`: the emulation gives out the memory, which the compiler must know nothing about.
SHARED = re.compile(r"(?<!extern )__shared__\s+([\w:]+)\s+([^;]+);")


def compiler() -> str | None:
    """The C++ compiler, which must be GCC's: the checks live on what its sanitizer calls."""
    for name in (os.environ.get("CXX", ""), "g++"):
        path = shutil.which(name) if name else None
        if path is not None:
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            if "Free Software Foundation" in version:
                return path
    return None


def why_not() -> str | None:
    """The reason why the emulation cannot be built here, or None."""
    if compiler() is None:
        return "the CUDA emulation needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA emulation needs pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the CUDA emulation needs Python.h"
    return None


def library(name: str, sources: Sequence[Path], defines: Sequence[str] = ()) -> Path:
    """The shared library of these sources, .cu as kernels and .cpp as host code, and of the emulation; kept."""
    import pybind11

    cxx = compiler()
    assert cxx is not None
    headers = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".h", ".cuh")]
    outside = [*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc").glob("*.h"), Path(__file__)]
    outside += [p for p in sources if ROOT / "csrc" in p.parents and p.parent.name == "csrc"]
    digest = hashlib.sha256(f"{cxx} {list(defines)} {pybind11.__version__} {sysconfig.get_python_version()}".encode())
    for path in sorted({*sources, *headers, *outside}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    made = folder / f"{name}.so"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the tests may be compiling the same
        if not made.is_file():
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            folder.mkdir()
            for path in (*headers, *sources):
                (folder / path.name).write_text(f'#line 1 "{path}"\n{with_shared_places(path.read_text())}')
            includes = [folder, HERE, ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
            common = [cxx, *FLAGS, *defines, *(f"-I{folder}" for folder in includes)]
            compile_all(common, [*(folder / p.name for p in sources), *sorted(HERE.glob("*.cpp"))], made)
    return made


def with_shared_places(text: str) -> str:
    """The source with the declarations of shared memory as the emulation's."""

    def replaced(match: re.Match[str]) -> str:
        kind, variables = match.groups()
        text = ""
        for variable in variables.split(","):
            declared = re.fullmatch(r"\s*(\w+)\s*((?:\[[^\]]+\])*)\s*", variable)
            assert declared is not None, match[0]
            name, sizes = declared.groups()
            text += f"static emulation::SharedPlace {name}_place; "
            text += f"auto& {name} = emulation::shared<{kind}{sizes}>({name}_place); "
        return text

    return SHARED.sub(replaced, text)


def compile_all(common: list[str], sources: Sequence[Path], target: Path) -> None:
    def compile_one(source: Path) -> str:
        made = str(target.with_name(f"{source.name}.o"))
        kernel = [*KERNEL_FLAGS, "-DBLIP3O_EMULATE", "-include", "cuda_emulation.h"] if source.suffix == ".cu" else []
        run([*common, *kernel, "-x", "c++", "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # the largest first: the last one to finish should have begun early
        objects = list(pool.map(compile_one, sorted(sources, key=lambda p: -p.stat().st_size)))
    part = target.with_suffix(".part")
    run([*common, "-shared", *objects, "-o", str(part)])
    os.replace(part, target)
    for made in objects:
        Path(made).unlink()


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


@functools.cache
def cuda_module() -> ModuleType:
    """blip3o_fast._cuda as it is in csrc/cuda, with its kernels emulated."""
    folder = ROOT / "csrc"
    sources = [*sorted((folder / "cuda").glob("*.cu")), folder / "cuda" / "bindings.cpp"]
    sources += [folder / f"{name}.cpp" for name in ("refuse", "source_hash", "view")]
    path = library("_cuda", sources, ['-DBLIP3O_FAST_SOURCE_HASH="emulated"'])
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_file_location("_cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
