"""The sdist and the wheel: built for real, exactly the right files, installed into an empty environment, used once.

Everything happens in a copy of the checkout, so that a test run leaves nothing in the tree.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from blip3o_fast import __version__, _ext

ROOT = Path(__file__).resolve().parent.parent
NAME = f"blip3o_fast-{__version__}"
MISSING = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
# As a compiler that knows no AVX-512: kernels for the generic set alone, and fast to build.
PLAIN = 'case "$*" in *avx512*) echo "unknown option -mavx512f" >&2; exit 1;; esac; exec $REAL "$@" -O0'

USE_IT = """
import torch
import blip3o_fast
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, _ext
model = BLIP3oDiT(BLIP3oConfig.preset("tiny"))
config = model.config
out = model(
    torch.randn(2, 64, config.in_channels),
    torch.tensor([10.0, 500.0]),
    torch.randn(2, 64, config.cross_attention_dim),
)
assert out.shape == (2, 64, config.in_channels) and out.isfinite().all()
print(blip3o_fast.__file__, "native" if _ext.C else "pure")
"""


def run(*command: object, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    # CUDA's kernels take half a minute to compile: only where a test asks for them
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_HOME": "/nonexistent/cuda", **variables}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)


def checked(*command: object, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def project_files() -> list[Path]:
    """What a clone has (and new files that git does not ignore), relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted({Path(name) for name in listing.split("\0") if name and (ROOT / name).exists()})


def copy_of_the_checkout(target: Path) -> Path:
    for name in project_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def compiler_script(folder: Path, body: str) -> dict[str, str]:
    """Variables that make a shell script the compiler; it may end with `exec $REAL "$@"`."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\nREAL=${{REAL_CXX:-c++}}\n{body}\n")
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script), "REAL_CXX": os.environ.get("CXX", "c++")}


def package_files() -> set[str]:
    """Every file that an installation has below blip3o_fast, the extension aside."""
    kinds = (".py", ".yaml", ".json", ".css")
    found = {p.as_posix() for p in project_files() if p.parts[0] == "blip3o_fast" and p.suffix in kinds}
    kernels = {f"blip3o_fast/{p.as_posix()}" for p in project_files() if p.parts[0] == "kernels" and p.suffix == ".py"}
    return found | kernels | {"blip3o_fast/py.typed"}


def has_compiler() -> bool:
    return _ext.C is not None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheels from the checkout and from the sdist, and two without the extension: wanted and forced."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = copy_of_the_checkout(folder / "tree")
    build = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
    checked(*build, "--sdist", "--outdir", folder / "sdist", tree, cwd=folder)
    sdist = next((folder / "sdist").iterdir())
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    plain = compiler_script(folder, PLAIN) if has_compiler() else {}
    checked(*pip, "--wheel-dir", folder / "from_sdist", sdist, cwd=folder, **plain)
    checked(*build, "--wheel", "--outdir", folder / "from_tree", tree, cwd=folder, **plain)
    checked(*build, "--wheel", "--outdir", folder / "pure", tree, cwd=folder, BLIP3O_FAST_BUILD="none")
    checked(*build, "--wheel", "--outdir", folder / "no_compiler", tree, cwd=folder, **MISSING)
    kinds = ("from_sdist", "from_tree", "pure", "no_compiler")
    return {"sdist": sdist, **{kind: next((folder / kind).iterdir()) for kind in kinds}}


def test_the_wheel_has_exactly_the_package(built: dict[str, Path]) -> None:
    metadata = {
        f"{NAME}.dist-info/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    extension = {f"blip3o_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"} if has_compiler() else set()
    for kind in ("from_tree", "from_sdist"):
        assert set(zipfile.ZipFile(built[kind]).namelist()) == package_files() | extension | metadata, kind
    for kind in ("pure", "no_compiler"):
        assert set(zipfile.ZipFile(built[kind]).namelist()) == package_files() | metadata, kind
        assert built[kind].name == f"{NAME}-py3-none-any.whl"


def test_the_sdist_has_exactly_the_sources(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        members = archive.getmembers()
        assert not [m.name for m in members if m.issym() or m.islnk()], "an sdist must build where links do not exist"
        names = {m.name.removeprefix(f"{NAME}/") for m in members if m.isfile()}
    top = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml"}
    top |= {"requirements.txt", "setup.py"}
    generated = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("blip3o_fast.egg-info/")}
    sources = {p.as_posix() for p in project_files() if p.parts[0] in ("csrc", "kernels")}
    assert names == top | generated | sources | package_files()


def test_the_wheel_says_what_it_needs(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["from_tree"]) as archive:
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode().split("\n\n")[0]
        scripts = archive.read(f"{NAME}.dist-info/entry_points.txt").decode()
    core = {
        line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and ";" not in line
    }
    assert {line.split(">")[0].split("<")[0] for line in core} == {
        "torch",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "typer",
        "PyYAML",
        "tqdm",
    }
    assert "Requires-Python: >=3.11" in metadata
    assert "blip3o-fast = blip3o_fast.cli:main" in scripts
    for extra in ("train", "data", "report", "wandb", "attention", "bench", "demo", "dev", "docs", "all"):
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.parametrize("kind", ["from_tree", "from_sdist", "pure", "no_compiler"])
def test_an_installed_wheel_runs_a_forward(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    """Only our package is installed; torch is lent by this environment's folder, whose .pth files stay unread."""
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    checked(*pip, built[kind], cwd=tmp_path)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    where, how = checked(python, "-W", "ignore", "-c", USE_IT, cwd=tmp_path).split()[-2:]
    assert Path(where).is_relative_to(tmp_path)
    assert how == ("native" if has_compiler() and kind.startswith("from") else "pure")
    script = checked(tmp_path / "env" / "bin" / "blip3o-fast", "--version", cwd=tmp_path)
    assert script.strip() == f"blip3o_fast {__version__}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_the_checkout(tmp_path / "tree")


def build_ext(tree: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run(sys.executable, "setup.py", "build_ext", "--build-lib", "out", cwd=tree, **variables)


def test_a_checkout_without_symlinks_is_told_what_to_do(tree: Path) -> None:
    link = tree / "blip3o_fast" / "kernels"
    link.unlink()
    link.write_text("../kernels")
    done = build_ext(tree)
    assert done.returncode != 0
    assert "git config core.symlinks true" in done.stderr


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cuda", "error: BLIP3O_FAST_BUILD=cuda, but "),
        ("fast", "must be one of auto, cuda, cpu, none, got 'fast'"),
    ],
)
def test_an_impossible_build_mode_is_an_error(mode: str, message: str, tree: Path) -> None:
    done = build_ext(tree, BLIP3O_FAST_BUILD=mode)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("kind", ["missing", "too old"])
def test_without_a_compiler_auto_is_pure_python_and_says_so(kind: str, tree: Path, tmp_path: Path) -> None:
    variables, reason = MISSING, ""
    if kind == "too old":
        variables, reason = compiler_script(tmp_path, "echo 'error: C++17 is needed' >&2; exit 1"), "C++17 is needed"
    done = build_ext(tree, **variables)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("blip3o_fast: ")]
    assert len(said) == 1 and reason in said[0]
    assert "pure Python, no C++ extension, because no working C++17 compiler" in said[0]
    assert not list((tree / "out").rglob("*.so")) if (tree / "out").exists() else True
    asked = build_ext(tree, BLIP3O_FAST_BUILD="cpu", **variables)
    assert asked.returncode != 0
    assert "error: BLIP3O_FAST_BUILD=cpu, but no working C++17 compiler" in asked.stderr


def test_a_compiler_that_fails_on_our_sources_is_an_error(tree: Path, tmp_path: Path) -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    only_probes = 'case "$*" in *probe.cpp*) exec $REAL "$@";; esac; echo "internal compiler error" >&2; exit 1'
    done = build_ext(tree, **compiler_script(tmp_path, only_probes))
    assert done.returncode != 0
    assert "internal compiler error" in done.stderr
    assert "pure Python" not in done.stderr


NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release ${CUDA_RELEASE:-13.0}, V1";;
    *probe.cu*) test -z "$CUDA_PROBE" || { echo "$CUDA_PROBE" >&2; exit 1; };;
    *) echo "internal compiler error" >&2; exit 1;;
esac
"""


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder with an nvcc that passes the probe and compiles nothing."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CUDA_HOME": "/nonexistent/cuda"}, "there is no nvcc in /nonexistent/cuda (CUDA_HOME)"),
        ({"CUDA_RELEASE": "12.3"}, "is of CUDA 12.3, and 12.4 is needed"),
        ({"CUDA_PROBE": "error: no libcudart_static"}, "does not work here: error: no libcudart_static"),
    ],
    ids=["missing", "too old", "broken"],
)
def test_without_a_toolkit_auto_builds_for_the_cpu_and_says_so(
    variables: dict[str, str], reason: str, tree: Path, tmp_path: Path, toolkit: Path
) -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    only_probes = 'case "$*" in *probe.cpp*) exec $REAL "$@";; esac; exit 1'  # what is built is not the question
    variables = {"CUDA_HOME": str(toolkit), **variables, **compiler_script(tmp_path, only_probes)}
    said = [line for line in build_ext(tree, **variables).stderr.splitlines() if line.startswith("blip3o_fast: ")]
    assert len(said) == 1 and "building the C++ extension for the CPU; none for CUDA, because" in said[0]
    assert reason in said[0]
    asked = build_ext(tree, BLIP3O_FAST_BUILD="cuda", **variables)
    assert asked.returncode != 0
    assert "error: BLIP3O_FAST_BUILD=cuda, but" in asked.stderr and reason in asked.stderr


def test_a_toolkit_that_fails_on_our_sources_is_an_error(tree: Path, tmp_path: Path, toolkit: Path) -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):  # they take a minute, and come first
        source.unlink()
    (tree / "csrc" / "bindings.cpp").write_text("")
    done = build_ext(tree, CUDA_HOME=str(toolkit), **compiler_script(tmp_path, PLAIN))
    assert done.returncode != 0
    assert "with CUDA 13.0, the one for GPUs" in done.stderr and "internal compiler error" in done.stderr


@pytest.mark.slow
def test_a_toolkit_builds_the_extension_for_gpus(tree: Path) -> None:
    """Without a GPU: it is the toolkit that decides. What ptxas says of the kernels is kept."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not has_compiler() or not Path(home, "bin", "nvcc").is_file():
        pytest.skip(f"this machine has no compiler or no nvcc in {home}")
    done = build_ext(tree, BLIP3O_FAST_BUILD="cuda", CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    tell = "import sys; sys.path.insert(0, 'out/blip3o_fast'); import _cuda; print(_cuda.source_hash)"
    told = checked(sys.executable, "-c", tell, cwd=tree).strip()
    assert told == _ext.source_hash(tree / "csrc", "cuda")
    reports = {path.stem for path in (tree / "build").rglob("*.ptxas")}
    assert reports == {path.stem for path in (tree / "csrc" / "cuda").glob("*.cu")}


def test_a_plain_compiler_builds_the_generic_set_and_a_change_what_it_touches(tree: Path, tmp_path: Path) -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    variables = compiler_script(tmp_path, PLAIN)

    def built_anew() -> tuple[list[str], str, str]:
        """The sources that were compiled, what was said, and what the extension tells of itself."""
        done = build_ext(tree, **variables)
        assert done.returncode == 0, done.stderr
        compiled = {name for name in re.findall(r" -c (\S+) ", done.stdout) if name.startswith("csrc/")}
        tell = "import sys; sys.path.insert(0, 'out/blip3o_fast'); import _C; print(_C.source_hash, _C.isas)"
        return sorted(compiled), done.stderr, checked(sys.executable, "-c", tell, cwd=tree).strip()

    compiled, said, told = built_anew()
    assert "csrc/bindings.cpp" in compiled
    if platform.machine() == "x86_64":
        assert "the compiler does not know AVX-512: kernels for the generic instruction set alone" in said
    assert told == f"{_ext.source_hash(tree / 'csrc', 'cpu')} ['generic']"
    assert built_anew()[0] == []
    with open(tree / "csrc" / "cpu" / "rms_norm_modulate.cpp", "a") as source:
        source.write("// changed\n")
    compiled, _, told_then = built_anew()
    assert compiled == ["csrc/cpu/rms_norm_modulate.cpp", "csrc/source_hash.cpp"]
    assert told_then != told
    assert told_then.split()[0] == _ext.source_hash(tree / "csrc", "cpu")


def test_an_error_in_our_sources_is_never_a_pure_python_install(tree: Path) -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    (tree / "csrc" / "bindings.cpp").write_text("this is not C++;\n")
    done = build_ext(tree, BLIP3O_FAST_BUILD="auto")
    assert done.returncode != 0
    assert "bindings.cpp" in done.stderr + done.stdout


@pytest.mark.slow
def test_the_whole_build_is_silent_and_runs_on_any_machine(tree: Path) -> None:
    """Of a function in several objects the linker keeps the first: it must be one for any machine."""
    if not has_compiler() or shutil.which("nm") is None:
        pytest.skip("no compiler or no nm")
    done = build_ext(tree, BLIP3O_FAST_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr

    def shared(folder: Path, namespace: str) -> set[str]:
        objects = sorted(folder.rglob("*.o"))
        assert objects, folder
        lines = checked("nm", "-C", *objects, cwd=folder).splitlines()
        weak = {line.split(maxsplit=2)[2] for line in lines if " W " in line or " u " in line}
        return {name for name in weak if f"blip3o_fast::{namespace}::" not in name}

    temporary = next((tree / "build").glob("temp*"))
    portable = shared(temporary / "csrc", "generic") | shared(temporary / "generic", "generic")
    for isa in temporary.iterdir():
        if isa.name not in ("csrc", "generic"):
            assert not shared(isa, isa.name) - portable, isa.name


def test_the_extension_knows_the_sources_it_was_built_from() -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    assert _ext.C is not None
    assert _ext.C.source_hash == _ext.source_hash(ROOT / "csrc", "cpu")


def test_setup_imports_no_torch() -> None:
    text = (ROOT / "setup.py").read_text()
    assert "import torch" not in text and "from torch" not in text
    pyproject = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in pyproject.splitlines() if line.startswith("requires = "))
    assert "torch" not in requires


def test_the_constraints_pin_every_direct_requirement() -> None:
    """torch without a local version, so that its CPU and CUDA builds both satisfy it."""
    import tomllib

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(r for e in ("train", "data", "report", "wandb", "tensorboard", "bench", "demo", "dev") for r in extras[e]),
    ]
    for requirement in wanted:
        name = re.split(r"[\s\[<>=~;]", requirement)[0]
        assert name == "blip3o_fast" or re.sub(r"[-_.]+", "-", name).lower() in known, requirement
    assert (ROOT / "requirements.txt").read_text().strip().count("\n") == 0
