"""Imports point downwards only, every op is found under its one name, and files stay readable."""

import ast
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blip3o_fast"

# folder or file of the package -> what it may import from the package (itself always). `env` imports only the standard
# library when it is loaded, so every layer may read its variables through it.
BELOW_OPS = {"kernels", "_ext", "_C", "env"}
LAYERS = {
    "kernels": set(),
    "_ext": {"_C"},
    "files": set(),
    "page": set(),
    "env": set(),  # at module level; its report looks at everything, from inside functions
    "testing": set(),
    "timing": set(),
    "ops": BELOW_OPS,
    "models": {"ops", "kernels", "timing", "files", "env"},
    "flow": {"ops", "env"},
    "sampling": {"data", "models", "flow", "ops", "files", "env"},
    "data": {"models", "files", "env"},
    "training": {"evaluation", "sampling", "data", "models", "flow", "ops", "files", "page", "env"},
    "evaluation": {"sampling", "data", "models", "flow", "ops", "files", "env"},
    "demo": {"timing", "evaluation", "training", "sampling", "data", "models", "flow", "ops", "files", "page", "env"},
    "cli": {
        "cli_bench",
        "cli_download",
        "cli_export",
        "cli_extract",
        "cli_features",
        "cli_interpolate",
        "cli_train",
        "cli_try",
        "cli_tune_sampler",
        "cli_verbs",
        "env",
    },
    "cli_bench": {"cli_verbs"},
    "cli_download": {"cli_verbs", "data"},
    "cli_export": {"cli_verbs", "models", "env"},
    "cli_extract": {"cli_verbs", "data"},
    "cli_features": {"cli_verbs", "data"},
    "cli_interpolate": {"cli_verbs", "evaluation"},
    "cli_train": {"training", "env"},
    "cli_try": {"cli_verbs", "demo"},
    "cli_tune_sampler": {"cli_verbs", "evaluation"},
    "cli_verbs": {"data", "evaluation", "demo", "models", "env"},
    "__main__": {"cli"},
}
# `data` knows of the models nothing but how features are normalised and what a device can do; sampling of the data
# where conditions come from; `training` of the evaluation only its metrics and baselines; the models of the kernels
# only how their launches are recorded and compiled ahead.
ONLY = {
    ("models", "kernels"): {"_launch", "_compile"},
    ("data", "models"): {"device_flops", "normalizer", "normalizer_fit"},
    ("training", "evaluation"): {"metrics", "baselines"},
    ("sampling", "data"): {"dataset", "reader", "shards"},
}


def python_files(folder: Path = PACKAGE) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imported(path: Path, tree: ast.AST) -> list[tuple[str, ...]]:
    """The parts below `blip3o_fast` of everything that a file of the package imports from it."""
    here = path.relative_to(ROOT).with_suffix("").parts
    package = here if path.name == "__init__.py" else here[:-1]
    if path.name == "__init__.py":
        package = here[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        else:
            continue
        found += [name[1:] for name in names if name[0] == "blip3o_fast"]
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_point_downwards() -> None:
    wrong, edges = [], 0
    for path in python_files():
        layer = layer_of(path)
        if layer in ("__init__", "env"):  # lazy by design; test_import_is_lean looks at them
            continue
        assert layer in LAYERS, f"{path.relative_to(ROOT)} is in no layer: add {layer!r} to LAYERS"
        for parts in imported(path, ast.parse(path.read_text())):
            target = parts[0] if parts else "__init__"
            if target in (layer, "__init__", "__version__"):
                continue
            edges += 1
            allowed = target in LAYERS[layer]
            if allowed and (layer, target) in ONLY:
                allowed = len(parts) > 1 and parts[1] in ONLY[layer, target]
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports blip3o_fast.{'.'.join(parts)}")
    assert not wrong, "\n".join(wrong)
    assert edges > 10, "the walk saw almost no imports: it is broken"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from blip3o_fast.flow.path import FlowPath", ("flow", "path", "FlowPath")),
        ("import blip3o_fast.training", ("training",)),
        ("from blip3o_fast import sampling", ("sampling",)),
        ("from ..models import config", ("models", "config")),
        ("from .. import training", ("training",)),
        ("def f():\n    from . import solvers", ("flow", "solvers")),
    ],
)
def test_the_walk_understands_every_kind_of_import(source: str, expected: tuple[str, ...]) -> None:
    assert imported(PACKAGE / "flow" / "loss.py", ast.parse(source)) == [expected]


def test_only_env_reads_the_environment() -> None:
    wrong = []
    for path in python_files():
        if layer_of(path) == "env":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                wrong += [
                    f"{path.relative_to(ROOT)}:{node.lineno}"
                    for alias in node.names
                    if alias.name in ("environ", "getenv")
                ]
    assert not wrong, f"read environment variables through blip3o_fast.env: {', '.join(wrong)}"


def op_names() -> set[str]:
    """The ops; rope_table, which makes an argument of one of them, is public and no op."""
    return {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")} - {"rope_table"}


def test_every_op_has_one_name_in_every_folder() -> None:
    """The stem rule: whatever a folder has for an op, the file has the op's name; reference and test always exist."""
    from blip3o_fast import ops

    names = op_names()
    assert names, "no ops were found"
    for name in sorted(names):
        assert callable(getattr(ops, name)), f"blip3o_fast.ops.{name} is not exported"
        assert callable(getattr(ops, f"{name}_ref")), f"blip3o_fast.ops.{name}_ref is not exported"
        assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file(), f"tests/ops/test_{name}.py is missing"
    for pattern in ("kernels/*.py", "csrc/cpu/*.cpp", "csrc/cuda/*.cu", "benchmarks/ops/*.py"):
        stems = {p.stem for p in ROOT.glob(pattern) if not p.stem.startswith("_")}
        # what is too long for one file is split into <op>_<part>
        strange = {s for s in stems if not any(s == name or s.startswith(f"{name}_") for name in names)}
        assert not strange, f"{pattern} names no op: {sorted(strange)}"
    exported = {name for name in ops.__all__ if hasattr(ops, f"{name}_ref")}
    assert exported == names, "an op lives in the file of its name"


def test_kernels_is_a_tracked_symlink_and_never_a_package() -> None:
    link = PACKAGE / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow HuggingFace's kernels package"
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-s", "blip3o_fast/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert listing.startswith("120000 "), "git does not track blip3o_fast/kernels as a symbolic link"


def test_tests_are_not_packages_and_have_unique_names() -> None:
    files = python_files(ROOT / "tests")
    assert not [p for p in files if p.name == "__init__.py"]
    names = [p.name for p in files if p.name.startswith("test_")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_kernels_import_nothing_of_the_layers_above() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith(("import blip3o_fast", "from blip3o_fast")):
                assert "blip3o_fast.kernels" in line, f"{path.relative_to(ROOT)}: {line.strip()}"


def test_native_sources_know_no_torch() -> None:
    for path in [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cu*")]:
        for line in path.read_text().splitlines():
            assert not (line.startswith("#include") and any(w in line for w in ("torch/", "ATen/", "c10/"))), path


def test_files_stay_readable() -> None:
    """About 300 lines, one concept per file."""
    long = {
        str(p.relative_to(ROOT)): n
        for folder in ("blip3o_fast", "benchmarks", "scripts")
        for p in python_files(ROOT / folder)
        if (n := len(p.read_text().splitlines())) > 350
    }
    assert not long, long
