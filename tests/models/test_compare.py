"""`blip3o_fast.compare` and `blip3o-fast compare`: what they measure is so, and a difference is found."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blip3o_fast.models.compare as module
from blip3o_fast import compare, fuse
from blip3o_fast.cli import main
from blip3o_fast.models.compare_folder import CompareSettings, random_inputs


class Shifted(nn.Module):
    """Its input times its weight, and a little more; counts its calls."""

    def __init__(self, shift: float = 0.0, wrap: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.shift, self.wrap, self.calls = shift, wrap, 0

    def forward(self, x: Tensor, *, double: bool = False) -> Any:
        self.calls += 1
        out = x * self.weight * (2 if double else 1) + self.shift
        return out if self.wrap is None else self.wrap(out)


def test_the_numbers() -> None:
    stock, fast = Shifted(), Shifted(0.25)
    x = torch.tensor([[1.0, 1.0, 1.0]])
    found = compare(stock, fast, x, rounds=3)
    assert found.difference.max_abs == 0.25
    assert found.difference.relative_l2 == pytest.approx(0.25 * 3**0.5 / 14**0.5)
    a, b = torch.tensor([1.25, 2.25, 3.25]), torch.tensor([1.0, 2.0, 3.0])
    assert found.difference.cosine == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-6)
    assert found.stock_error is not None and found.stock_error.max_abs == 0
    assert found.fast_error is not None and found.fast_error.max_abs == 0.25
    assert stock.calls == fast.calls == 1 + 1 + 3, "one to compare, one to warm up, three to time"
    assert min(found.stock_seconds, found.fast_seconds, found.speedup) > 0
    assert (found.device, found.dtype, found.rounds) == ("cpu", "float32", 3)


def test_text_and_json() -> None:
    found = compare(Shifted(), Shifted(0.25), torch.ones(1, 3), rounds=1)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["difference"]["max_abs"] == 0.25 and values["fast_error"]["max_abs"] == 0.25
    lines = str(found).splitlines()
    assert lines[0].split() == ["max", "abs", "relative", "L2", "cosine"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "fast - stock",
        "stock - stock in fp64",
        "fast - stock in fp64",
    ]
    assert "2.50e-01" in lines[1] and f"{found.speedup:.2f} times as fast" in lines[4]


@pytest.mark.parametrize("wrap", [lambda t: (t,), lambda t: {"sample": t}, lambda t: [t, (t, 3)]])
def test_other_outputs_and_keywords(wrap: Any) -> None:
    found = compare(Shifted(wrap=wrap), Shifted(0.5, wrap), torch.ones(2, 3), double=True, rounds=1)
    assert found.difference.max_abs == 0.5
    assert found.stock_error is not None and found.stock_error.max_abs == 0


def test_a_nan_is_not_agreement() -> None:
    found = compare(Shifted(), Shifted(float("nan")), torch.ones(1, 3), rounds=1)
    assert not found.difference.max_abs <= 1e9
    assert found.difference.cosine != found.difference.cosine


def test_without_room_for_fp64_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1)
    found = compare(Shifted(), Shifted(), torch.ones(1, 3), rounds=1)
    assert found.stock_error is None and found.fast_error is None
    assert "no comparison with fp64: it needs" in str(found)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, Shifted(), torch.ones(1, 3)), "stock must be a torch.nn.Module, got int"),
        ((Shifted(), None, torch.ones(1, 3)), "fast must be a torch.nn.Module, got NoneType"),
        ((nn.Identity(), Shifted(), torch.ones(1, 3)), "stock has no parameters"),
        ((Shifted(), Shifted(wrap=lambda t: t[:, :2]), torch.ones(1, 3)), "the outputs must be tensors of the same"),
        ((Shifted(wrap=str), Shifted(wrap=str), torch.ones(1, 3)), "the outputs must be tensors"),
    ],
)
def test_what_cannot_be_compared(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(*args)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        compare(Shifted(), Shifted(), torch.ones(1, 3), rounds=0)


# ---- a folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from diffusers import LuminaNextDiT2DModel

    network = LuminaNextDiT2DModel(
        sample_size=6,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    )
    with torch.no_grad():
        network.pad_token.normal_()
        for layer in network.layers:
            layer.gate.normal_()
    network.save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def test_fused_against_stock(folder: Path) -> None:
    from diffusers import LuminaNextDiT2DModel

    stock = LuminaNextDiT2DModel.from_pretrained(folder)
    fast = fuse(copy.deepcopy(stock))
    found = compare(stock, fast, *random_inputs(stock, CompareSettings(folder, batch_size=2)), {}, rounds=2)
    assert found.difference.max_abs <= 1e-5 and found.difference.cosine > 1 - 1e-9
    assert found.stock_error is not None and found.fast_error is not None
    assert 0 < found.fast_error.max_abs <= 1e-5 and 0 < found.stock_error.max_abs <= 1e-5


@pytest.mark.parametrize("pipeline", [False, True])
def test_the_command(pipeline: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder
    if pipeline:
        path = folder.parent
        folder.rename(path / "transformer")
        (path / "model_index.json").write_text("{}")
    file = path / "compare.json"
    argv = ["compare", str(path), "--json", str(file), "--rounds", "1", "--context-tokens", "5"]
    assert main(argv) == 0
    assert "fast - stock in fp64" in capsys.readouterr().out
    values = json.loads(file.read_text())
    assert values["within_tolerance"] is True and values["tolerance"] == 1e-4
    assert 0 < values["difference"]["max_abs"] <= 1e-5
    assert main([*argv, "--tolerance", "0"]) == 1
    assert "past the tolerance of 0" in capsys.readouterr().err
    assert json.loads(file.read_text())["within_tolerance"] is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch_size must be at least 1"),
        (["--context_tokens", "-1"], "--context_tokens must be at least 1, got -1"),
        (["--tolerance", "-1"], "--tolerance must be a number >= 0, got -1.0"),
        (["--tolerance", "nan"], "--tolerance must be a number >= 0, got nan"),
    ],
)
def test_bad_flags(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(folder), *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no network of diffusers"),
        ("{", "is not a config of diffusers"),
        ("[]", "is not a config of diffusers"),
        ('{"_class_name": "SanaTransformer2DModel"}', "is of a SanaTransformer2DModel; compare is for a Lumina"),
    ],
)
def test_other_folders(config: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert main(["compare", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
