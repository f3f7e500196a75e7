"""The sdist and the wheel: built for real, exactly the right files, installed into an empty environment, used once.

Everything happens in a copy of the checkout, so that a test run leaves nothing in the tree.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from blip3o_fast import __version__

ROOT = Path(__file__).resolve().parent.parent
NAME = f"blip3o_fast-{__version__}"

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
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
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


def package_files() -> set[str]:
    """Every file that an installation has below blip3o_fast, the extension aside."""
    kinds = (".py", ".yaml", ".json", ".css")
    found = {p.as_posix() for p in project_files() if p.parts[0] == "blip3o_fast" and p.suffix in kinds}
    kernels = {f"blip3o_fast/{p.as_posix()}" for p in project_files() if p.parts[0] == "kernels" and p.suffix == ".py"}
    return found | kernels | {"blip3o_fast/py.typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel from the checkout, the wheel from the sdist, and a wheel without the extension."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = copy_of_the_checkout(folder / "tree")
    build = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
    checked(*build, "--sdist", "--outdir", folder / "sdist", tree, cwd=folder)
    sdist = next((folder / "sdist").iterdir())
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    checked(*pip, "--wheel-dir", folder / "from_sdist", sdist, cwd=folder)
    checked(*build, "--wheel", "--outdir", folder / "from_tree", tree, cwd=folder)
    checked(*build, "--wheel", "--outdir", folder / "pure", tree, cwd=folder, BLIP3O_FAST_BUILD="none")
    wheels = {kind: next((folder / kind).iterdir()) for kind in ("from_sdist", "from_tree", "pure")}
    return {"sdist": sdist, **wheels}


def has_compiler() -> bool:
    from blip3o_fast import _ext

    return _ext.C is not None


def test_the_wheel_has_exactly_the_package(built: dict[str, Path]) -> None:
    metadata = {
        f"{NAME}.dist-info/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    extension = {f"blip3o_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"} if has_compiler() else set()
    for kind in ("from_tree", "from_sdist"):
        assert set(zipfile.ZipFile(built[kind]).namelist()) == package_files() | extension | metadata, kind
    assert set(zipfile.ZipFile(built["pure"]).namelist()) == package_files() | metadata
    assert built["pure"].name == f"{NAME}-py3-none-any.whl"


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


@pytest.mark.parametrize("kind", ["from_tree", "from_sdist", "pure"])
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
    assert how == ("native" if has_compiler() and kind != "pure" else "pure")
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
    [("cuda", "has no CUDA sources yet"), ("fast", "must be one of auto, cpu, none, got 'fast'")],
)
def test_an_impossible_build_mode_is_an_error(mode: str, message: str, tree: Path) -> None:
    done = build_ext(tree, BLIP3O_FAST_BUILD=mode)
    assert done.returncode != 0
    assert message in done.stderr


def test_without_a_compiler_auto_is_pure_python_and_says_so(tree: Path) -> None:
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = build_ext(tree, **missing)
    assert done.returncode == 0, done.stderr
    assert "pure Python, no C++ extension, because no working C++17 compiler" in done.stderr
    assert not list((tree / "out").rglob("*.so")) if (tree / "out").exists() else True
    asked = build_ext(tree, BLIP3O_FAST_BUILD="cpu", **missing)
    assert asked.returncode != 0
    assert "error: BLIP3O_FAST_BUILD=cpu, but no working C++17 compiler" in asked.stderr


def test_an_error_in_our_sources_is_never_a_pure_python_install(tree: Path) -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    with open(tree / "csrc" / "bindings.cpp", "a") as source:
        source.write("\nthis is not C++;\n")
    done = build_ext(tree, BLIP3O_FAST_BUILD="auto")
    assert done.returncode != 0
    assert "bindings.cpp" in done.stderr + done.stdout


def test_the_extension_knows_the_sources_it_was_built_from() -> None:
    if not has_compiler():
        pytest.skip("this machine has no C++17 compiler or no Python.h")
    from blip3o_fast import _ext

    assert _ext.C is not None
    assert _ext.C.source_hash == _ext.source_hash(ROOT / "csrc")


def test_setup_imports_no_torch() -> None:
    text = (ROOT / "setup.py").read_text()
    assert "import torch" not in text and "from torch" not in text
    pyproject = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in pyproject.splitlines() if line.startswith("requires = "))
    assert "torch" not in requires


def test_the_constraints_pin_every_direct_requirement() -> None:
    """torch without a local version, so that its CPU and CUDA builds both satisfy it."""
    import re
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
        *(r for e in ("train", "data", "report", "bench", "demo", "dev") for r in extras[e]),
    ]
    for requirement in wanted:
        name = re.split(r"[\s\[<>=~;]", requirement)[0]
        assert name == "blip3o_fast" or re.sub(r"[-_.]+", "-", name).lower() in known, requirement
    assert (ROOT / "requirements.txt").read_text().strip().count("\n") == 0
