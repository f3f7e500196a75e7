"""The native sources build with other compilers and for other processors than those of this machine's extension."""

import ast
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cpu").glob("*.cpp"))
PLAIN = sorted(set(CSRC.glob("*.cpp")) - {CSRC / "bindings.cpp", CSRC / "source_hash.cpp"})
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
CROSS = "aarch64-linux-gnu-g++"


def build_settings() -> dict[str, Any]:
    """COMMON and ISAS of setup.py, which cannot be imported without building."""
    settings: dict[str, Any] = {}
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(t, ast.Name) and t.id in ("COMMON", "ISAS", "_AVX2", "_AVX512") for t in targets):
            exec(compile(ast.Module([statement], []), "setup.py", "exec"), settings)
    return settings


def command(compiler: str, isa: str, *more: object) -> list[str]:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    settings = build_settings()
    flags, vector_bytes = settings["ISAS"][isa]
    macros = [f"-DBLIP3O_ISA={isa}", f"-DBLIP3O_VECTOR_BYTES={vector_bytes}"]
    macros += [] if isa == "generic" else ["-DBLIP3O_X86=1"]
    parts = [compiler, "-std=c++17", *settings["COMMON"], *flags, *macros, "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    return [str(part) for part in (*parts, f"-I{CSRC}/cpu", *more)]


def run(parts: list[str]) -> str:
    done = subprocess.run(parts, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runs_x86(compiler: str) -> bool:
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    return machine.startswith("x86_64")


@pytest.mark.parametrize(
    ("compiler", "isa"), [("g++", "generic"), (CROSS, "generic"), *(("clang++", isa) for isa in ISAS)]
)
def test_every_kernel_compiles_without_a_warning(compiler: str, isa: str) -> None:
    parts = command(compiler, isa, "-fsyntax-only", *KERNELS, *(PLAIN if isa == "generic" else ()))
    if isa != "generic" and not runs_x86(compiler):
        pytest.skip(f"{compiler} is not for x86-64")
    run(parts)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_generic_kernels_need_no_header_of_x86(compiler: str, tmp_path: Path) -> None:
    for name in ("immintrin.h", "x86intrin.h", "emmintrin.h", "xmmintrin.h"):
        (tmp_path / name).write_text("#error a header of x86\n")
    run(command(compiler, "generic", f"-I{tmp_path}", "-U__SSE__", "-U__SSE2__", "-fsyntax-only", *KERNELS))


def self_test(compiler: str, folder: Path) -> Path:
    program = folder / compiler
    sources = (Path(__file__).with_name("self_test.cpp"), CSRC / "cpu" / "rms_norm_modulate.cpp", *PLAIN)
    run(command(compiler, "generic", "-static", "-pthread", "-o", program, *sources))
    return program


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return run([str(self_test("g++", tmp_path_factory.mktemp("expected")))]).splitlines()


@pytest.mark.parametrize("compiler", [CROSS, "clang++"])
def test_other_compilers_give_the_same_numbers(compiler: str, expected: list[str], tmp_path: Path) -> None:
    """The conversions to the bit, a kernel to what fp32 leaves of it; for another processor in its emulator."""
    foreign = compiler == CROSS
    if foreign and shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    emulator = ["qemu-aarch64"] if foreign else []
    found = run([*emulator, str(self_test(compiler, tmp_path))]).splitlines()
    assert found[:3] == expected[:3]
    numbers = [[float(word) for word in lines[3].split()[1:]] for lines in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
