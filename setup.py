"""Builds the optional extension blip3o_fast._C; everything declarative is in pyproject.toml.

BLIP3O_FAST_BUILD chooses (see docs/environment.md):
    auto (default)  the C++ extension where a compiler can build it, else pure Python; one line says
    cpu             the C++ extension; anything that is missing is an error
    none            pure Python
A compiler that passes the probe and then fails on our sources is an error in every mode: a silent
pure-Python install would look like a slow but successful one. torch is never imported here, and
nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "none")
# The commands that compile; the others (sdist, metadata) have nothing to probe or to announce.
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

PROBE = """
#include <Python.h>
#if __cplusplus < 201703L
#error "C++17 is needed"
#endif
#include <optional>
int main() { return std::optional<int>(0).value(); }
"""

# No -march=native and no -ffast-math: one wheel for every CPU, with the same numbers. -fopenmp-simd honours
# `#pragma omp simd` and links no OpenMP: the threads are those of PyTorch's pool (csrc/parallel.cpp).
COMMON = ["-O3", "-fopenmp-simd", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# Each file of csrc/cpu is compiled once per instruction set, to be chosen at run time: (flags, bytes of a vector).
ISAS = {
    "generic": ([], 16),
    "avx2": (_AVX2, 32),
    "avx512": (_AVX512, 64),
    "avx512_bf16": ([*_AVX512, "-mavx512bf16", "-mavx512vnni"], 64),
}


def say(line: str) -> None:
    print(f"blip3o_fast: {line}", file=sys.stderr, flush=True)


def check_symlink() -> None:
    """blip3o_fast/kernels must lead to kernels/. Where links are off, git leaves a text file and archivers nothing."""
    link = ROOT / "blip3o_fast" / "kernels"
    kernels = any((ROOT / "kernels").glob("*.py"))  # an sdist of a version without kernels has no such folder
    if link.is_file() or (kernels and not link.is_dir()):
        raise SystemExit(
            f"error: {link} is not a folder: this checkout has no symbolic links.\n"
            "hint: git config core.symlinks true && git checkout -- blip3o_fast/kernels "
            "(on Windows: turn on developer mode first)"
        )


def build_mode() -> str:
    mode = os.environ.get("BLIP3O_FAST_BUILD", "").strip().lower() or "auto"
    if mode == "cuda":
        raise SystemExit(
            "error: BLIP3O_FAST_BUILD=cuda: this version has no CUDA sources yet.\n"
            "hint: use BLIP3O_FAST_BUILD=auto or cpu; the PyTorch reference runs on the GPU"
        )
    if mode not in MODES:
        raise SystemExit(f"error: BLIP3O_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def why_no_extension() -> str | None:
    """The reason why this machine cannot build C++17 against Python.h, or None where it can."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    compiler = unix_compiler()
    if isinstance(compiler, str):
        return compiler
    log = why_not_compiled(compiler, PROBE, ["-std=c++17"])
    if log is None:
        return None
    if "Python.h" in log:
        return "Python.h is missing (Debian: apt-get install python3-dev)"
    return f"no working C++17 compiler (Debian: apt-get install g++): {log.strip().splitlines()[-1]}"


def unix_compiler() -> Any:
    """The compiler that the build will use, or why there is none."""
    # setuptools, imported above, provides distutils also where Python no longer does.
    from distutils import ccompiler, sysconfig

    compiler = ccompiler.new_compiler()
    if compiler.compiler_type != "unix":
        return f"the compiler kind {compiler.compiler_type!r} is not supported"
    sysconfig.customize_compiler(compiler)
    return compiler


def why_not_compiled(compiler: Any, text: str, flags: list[str]) -> str | None:
    """None where the compiler takes this C++ source with these flags, else what it said."""
    from distutils import sysconfig
    from distutils.errors import CCompilerError, DistutilsError

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(text)
        output = sys.stderr.fileno()
        kept = os.dup(output)
        with open(Path(folder, "log"), "w+") as log:
            os.dup2(log.fileno(), output)
            try:
                compiler.compile(
                    [str(source)],
                    output_dir=folder,
                    include_dirs=[sysconfig.get_python_inc()],
                    extra_postargs=flags,
                )
            except (CCompilerError, DistutilsError, OSError) as error:
                log.seek(0)
                return f"{log.read()}\n{error}"
            finally:
                os.dup2(kept, output)
                os.close(kept)
    return None


def instruction_sets(compiler: Any) -> list[str]:
    """All of ISAS for an x86-64 compiler that knows their flags, elsewhere the generic one alone."""
    text = "#include <immintrin.h>\n#ifndef __x86_64__\n#error\n#endif\n"
    newest, _ = ISAS["avx512_bf16"]
    return list(ISAS) if why_not_compiled(compiler, text, newest) is None else ["generic"]


def load_ext_module() -> ModuleType:
    """blip3o_fast/_ext.py by path: the build and the import must hash csrc the same way."""
    spec = importlib.util.spec_from_file_location("_blip3o_fast_ext", ROOT / "blip3o_fast" / "_ext.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(*patterns: str) -> list[str]:
    """Relative on purpose: absolute paths would end up in the sdist's file list."""
    return sorted(p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern))


def extension() -> Extension:
    from pybind11.setup_helpers import Pybind11Extension

    source_hash = load_ext_module().source_hash(ROOT / "csrc", "cpu")
    return Pybind11Extension(
        "blip3o_fast._C",
        relative("csrc/*.cpp"),
        depends=["setup.py", *relative("csrc/*.h", "csrc/cpu/*")],
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=COMMON,
        define_macros=[("BLIP3O_FAST_SOURCE_HASH", f'"{source_hash}"')],
    )


class BuildExtension(build_ext):
    """Compiles the files of csrc/cpu for each instruction set beside the extension's own sources, several at a time."""

    def build_extension(self, ext: Any) -> None:
        isas = instruction_sets(self.compiler)
        if len(isas) > 1:
            ext.define_macros.append(("BLIP3O_X86", "1"))
        jobs = [(isa, source) for isa in isas for source in relative("csrc/cpu/*.cpp")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = [pool.submit(self.compile_kernel, ext, *job) for job in jobs]
            ext.extra_objects = [kernel.result() for kernel in kernels]
        super().build_extension(ext)

    def compile_kernel(self, ext: Any, isa: str, source: str) -> str:
        flags, vector_bytes = ISAS[isa]
        macros = [*ext.define_macros, ("BLIP3O_ISA", isa), ("BLIP3O_VECTOR_BYTES", str(vector_bytes))]
        folder = Path(self.build_temp, isa)
        target = folder / Path(source).with_suffix(".o")
        read = [Path(source), *(ROOT / name for name in ext.depends if name.endswith((".h", ".py")))]
        if self.force or not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in read):
            self.compiler.compile(
                [source],
                output_dir=str(folder),
                macros=macros,
                include_dirs=["csrc", "csrc/cpu"],
                extra_postargs=["-std=c++17", *COMMON, *flags],
            )
        return str(target)


def extensions() -> list[Extension]:
    mode = build_mode()
    if not COMPILING.intersection(sys.argv):
        return []
    if mode == "none":
        say("BLIP3O_FAST_BUILD=none: pure Python, no C++ extension")
        return []
    reason = why_no_extension()
    if reason is None:
        say(f"BLIP3O_FAST_BUILD={mode}: building the C++ extension for the CPU")
        return [extension()]
    if mode == "cpu":
        raise SystemExit(f"error: BLIP3O_FAST_BUILD=cpu, but {reason}")
    say(f"BLIP3O_FAST_BUILD=auto: pure Python, no C++ extension, because {reason}")
    return []


check_symlink()
setup(
    # blip3o_fast/kernels has no __init__.py (it would shadow HuggingFace's `kernels`), so plain
    # find_packages would miss it.
    packages=find_namespace_packages(include=["blip3o_fast*"], exclude=["*.__pycache__*"]),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
