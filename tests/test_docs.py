"""The documents speak of what exists, and the Python of the README does what it says."""

import importlib.util
import re
import subprocess
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load_checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / "scripts" / "check_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_docs = load_checker()


def test_links_paths_commands_and_blocks_are_good() -> None:
    assert not check_docs.problems()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](nowhere.md)", "no such file"),
        ("[a](#nowhere)", "no such heading"),
        ("`blip3o_fast/nowhere.py`", "no such file or folder"),
        ("```\nx  flow/nowhere.py\n```\n", "no such file in blip3o_fast"),
        ("`blip3o_fast.flow.nothing(x)`", "no such name"),
        ("`make nothing`", "no such target"),
        ("`blip3o-fast fly`", "no verb fly"),
        ("```\nblip3o-fast train --wings 2\n```\n", "train has no flag --wings"),
        ("```python\nx = = 1\n```\n", "Python block"),
        ("<<MEASURE: x>>", "a number is missing"),
    ],
)
def test_the_checks_find_what_is_wrong(
    text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.md"
    bad.write_text(text)
    monkeypatch.setattr(check_docs, "documents", lambda: [bad])
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    (tmp_path / "Makefile").write_text("help:\n")
    found = check_docs.problems()
    assert len(found) == 1 and problem in found[0], found


def make_embeddings(folder: Path, count: int, condition_dim: int, target_dim: int) -> None:
    """Shards as `extract` writes them, of random features of which one side follows from the other."""
    from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter

    condition = torch.randn(count, 64, condition_dim)
    target = condition @ torch.randn(condition_dim, target_dim) / condition_dim**0.5
    writer = ShardWriter(folder, Meta(EncoderInfo("one", condition_dim), EncoderInfo("two", target_dim)))
    names = [f"picture {i}" for i in range(count)]
    writer.write(0, condition, target, names, names, "test")


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks in order, on tiny sizes: trained weights are written, then loaded and sampled from."""
    training, sampling, _ = check_docs.python_blocks(ROOT / "README.md")
    assert len(training.splitlines()) <= 20 and len(sampling.splitlines()) <= 12
    for given, tiny in (
        ('preset("small", cross_attention_dim=1280)', 'preset("tiny")'),
        ("pca:64", "pca:16"),
        ("range(200)", "range(2)"),
        ("[:32]", "[:4]"),
        ("step * 32", "step * 4"),
    ):
        assert given in training, f"the README changed: {given}"
        training = training.replace(given, tiny)
    assert "num_steps=30" in sampling
    sampling = sampling.replace("num_steps=30", "num_steps=3")
    monkeypatch.chdir(tmp_path)
    make_embeddings(tmp_path / "runs" / "embeddings", 40, 24, 20)
    scope: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(training, "README training", "exec"), scope)
        before = scope["model"]
        exec(compile(sampling, "README sampling", "exec"), scope)
    assert (tmp_path / "runs" / "model" / "model.safetensors").exists()
    assert scope["model"] is not before
    features, held_out = scope["features"], scope["held_out"]
    assert features.shape == held_out.targets.shape == (4, 64, 20)
    assert features.isfinite().all()


def test_the_drop_in_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import LuminaNextDiT2DModel

    _, _, drop_in = check_docs.python_blocks(ROOT / "README.md")
    sizes = {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2}
    network = LuminaNextDiT2DModel(**sizes, multiple_of=16, cross_attention_dim=24)
    torch.nn.init.normal_(network.pad_token)  # uninitialised memory otherwise
    network.save_pretrained(tmp_path / "runs" / "lumina")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(drop_in, "README drop-in", "exec"), scope)
    assert type(scope["fast"]) is not type(scope["stock"]) is LuminaNextDiT2DModel
    assert scope["result"].difference.max_abs <= 1e-5


def test_continuous_integration_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make type", "make test"]
    assert all(command in readme for command in commands)


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE)
    assert listed == (
        "help setup demo test test-all test-matrix wheels lint type docs bench bench-cpu readme-table bench-compare "
        "memory-report sass-report launch-report gpu-check tune sanitize clean".split()
    )
