"""Builds the optional extensions blip3o_fast._C and blip3o_fast._cuda; everything declarative is in pyproject.toml.

BLIP3O_FAST_BUILD chooses (see docs/environment.md):
    auto (default)  what the compilers found can build: the C++ extension, and with nvcc the CUDA one; one line says
    cuda            both; anything that is missing is an error
    cpu             the C++ extension alone; anything that is missing is an error
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
MODES = ("auto", "cuda", "cpu", "none")
BINDINGS = "csrc/bindings.cpp"
SOURCE_HASH = "csrc/source_hash.cpp"  # compiled whenever any source changed
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
_AVX512 += ["-Wno-uninitialized"]  # GCC before 13 warns about its own immintrin.h
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
    lines = log.strip().splitlines()
    said = next((line for line in lines if "error" in line), lines[-1])  # what ends the log is only the command
    return f"no working C++17 compiler (Debian: apt-get install g++): {said}"


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
    if why_not_compiled(compiler, "#ifndef __x86_64__\n#error\n#endif\n", []) is not None:
        return ["generic"]
    newest, _ = ISAS["avx512_bf16"]
    if why_not_compiled(compiler, "#include <immintrin.h>\n", newest) is None:
        return list(ISAS)
    say("the compiler does not know AVX-512: kernels for the generic instruction set alone, which are slower")
    return ["generic"]


def load_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_blip3o_fast_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build_cuda = load_module("csrc/build_cuda.py")


def relative(*patterns: str) -> list[str]:
    """Relative on purpose: absolute paths would end up in the sdist's file list."""
    return sorted(p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern))


def extension(name: str, part: str, sources: list[str]) -> Extension:
    """blip3o_fast.<name> of these sources, and of the kernels in csrc/<part>."""
    from pybind11.setup_helpers import Pybind11Extension

    # the build and the import must hash csrc the same way
    source_hash = load_module("blip3o_fast/_ext.py").source_hash(ROOT / "csrc", part)
    return Pybind11Extension(
        f"blip3o_fast.{name}",
        sources,
        depends=["setup.py", *relative("csrc/*.h", "csrc/*.cpp", "csrc/*.py", f"csrc/{part}/*")],
        include_dirs=["csrc", f"csrc/{part}"],
        cxx_std=17,
        extra_compile_args=COMMON,
        define_macros=[("BLIP3O_FAST_SOURCE_HASH", f'"{source_hash}"')],
    )


def cpu_extension() -> Extension:
    return extension("_C", "cpu", sorted(relative("csrc/*.cpp"), key=lambda name: name != BINDINGS))


def cuda_extension(toolkit: Any) -> Extension:
    shared = ["csrc/refuse.cpp", SOURCE_HASH, "csrc/view.cpp"]
    cuda = extension("_cuda", "cuda", [*relative("csrc/cuda/*.cpp"), *shared])
    cuda.toolkit = toolkit
    return cuda


class BuildExtension(build_ext):
    """Compiles an extension's own sources once, those of csrc/cpu for each instruction set and those of csrc/cuda with
    nvcc, several at a time.
    """

    def build_extension(self, ext: Any) -> None:
        if hasattr(ext, "toolkit"):
            self.build_cuda_extension(ext)
        else:
            self.build_cpu_extension(ext)

    def build_cuda_extension(self, ext: Any) -> None:
        # one file at a time is enough for two cores: nvcc compiles for two architectures at once
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
            made = list(pool.map(lambda source: self.compile_kernels(ext, source), relative("csrc/cuda/*.cu")))
            made += pool.map(lambda source: self.compile_source(ext, source, "", "cuda"), ext.sources)
        build_cuda.link(ext.toolkit, made, Path(self.get_ext_fullpath(ext.name)))

    def compile_kernels(self, ext: Any, source: str) -> str:
        target = Path(self.build_temp, "cuda", source).with_suffix(".o")
        if self.is_older(target, [source, *self.headers(ext)]):
            build_cuda.compile_kernels(ext.toolkit, source, target, ext.include_dirs)
        return str(target)

    def build_cpu_extension(self, ext: Any) -> None:
        isas = instruction_sets(self.compiler)
        if len(isas) > 1:
            ext.define_macros.append(("BLIP3O_X86", "1"))
        # bindings.cpp takes longest, so it comes first. Of an inline function in several objects the linker keeps the
        # first, which must be one that every machine runs: the generic objects stand before the others.
        jobs = [(source, "") for source in ext.sources]
        jobs += [(source, isa) for isa in isas for source in relative("csrc/cpu/*.cpp")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_source(ext, *job), jobs))
        ext.sources, ext.extra_objects = [], objects  # what is left is linking
        super().build_extension(ext)

    def headers(self, ext: Any) -> list[str]:
        """What every source may include, and what compiles it."""
        return [name for name in ext.depends if name.endswith((".h", ".cuh", ".py"))]

    def is_older(self, target: Path, read: list[str]) -> bool:
        newest = max((ROOT / name).stat().st_mtime for name in read)
        return bool(self.force) or not target.exists() or target.stat().st_mtime < newest

    def compile_source(self, ext: Any, source: str, isa: str, folder: str = "") -> str:
        """The object file, compiled where it is missing or older than the source and what it includes."""
        flags, macros = list(ext.extra_compile_args), list(ext.define_macros)
        if isa:
            isa_flags, vector_bytes = ISAS[isa]
            flags += isa_flags
            if ("BLIP3O_X86", "1") in macros:
                # GCC 12 moves words through MMX registers and leaves the x87 unit unusable: the next call that uses it
                # (LAPACK's in scipy, say) gets NaN.
                flags.append("-mno-mmx")
            macros += [("BLIP3O_ISA", isa), ("BLIP3O_VECTOR_BYTES", str(vector_bytes))]
        output = Path(self.build_temp, folder or isa)
        target = output / Path(source).with_suffix(".o")
        if self.is_older(target, [source, *(ext.depends if source == SOURCE_HASH else self.headers(ext))]):
            self.compiler.compile(
                [source],
                output_dir=str(output),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
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
    if reason is None and mode == "cpu":
        say("BLIP3O_FAST_BUILD=cpu: building the C++ extension for the CPU")
        return [cpu_extension()]
    if reason is None:
        toolkit = build_cuda.find()
        if not isinstance(toolkit, str):
            say(f"BLIP3O_FAST_BUILD={mode}: building the C++ extension for the CPU and, with CUDA {toolkit.version}, "
                "the one for GPUs")  # fmt: skip
            return [cpu_extension(), cuda_extension(toolkit)]
        if mode == "auto":
            say(f"BLIP3O_FAST_BUILD=auto: building the C++ extension for the CPU; none for CUDA, because {toolkit}")
            return [cpu_extension()]
        reason = toolkit
    if mode != "auto":
        raise SystemExit(f"error: BLIP3O_FAST_BUILD={mode}, but {reason}")
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
