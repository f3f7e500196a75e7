"""`blip3o_fast.compare` and `blip3o-fast compare`: what they measure is so, and a difference is found."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blip3o_fast.models.compare as module
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, compare, fuse
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
    assert stock.calls == fast.calls == 1 + 1 + 1 + 3, "one to compare, one for memory, one to warm up, three to time"
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


def call_of(stock: Any, folder: Path, **changes: Any) -> list[Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rope = get_2d_rotary_pos_embed_lumina(stock.head_dim, 384, 384)
    return [*random_inputs(stock, CompareSettings(folder, **changes)), rope, {}]


def test_fused_against_stock(folder: Path) -> None:
    from diffusers import LuminaNextDiT2DModel

    stock = LuminaNextDiT2DModel.from_pretrained(folder)
    fast = fuse(copy.deepcopy(stock))
    found = compare(stock, fast, *call_of(stock, folder, batch_size=2), rounds=2)
    assert found.difference.max_abs <= 1e-5 and found.difference.cosine > 1 - 1e-9
    assert found.stock_error is not None and found.fast_error is not None
    assert 0 < found.fast_error.max_abs <= 1e-5 and 0 < found.stock_error.max_abs <= 1e-5


PARTS = ["patch_embedder.proj", "time_caption_embed", "layers.0", "layers.1", "norm_out"]


def test_layer_by_layer(folder: Path) -> None:
    """The fused path is what is seen: no block leaves it, and a changed block is found."""
    from diffusers import LuminaNextDiT2DModel

    from blip3o_fast.models import stock as stock_forward

    stock = LuminaNextDiT2DModel.from_pretrained(folder)
    fast = fuse(copy.deepcopy(stock))
    found = compare(stock, fast, *call_of(stock, folder), rounds=1, layers=True)
    assert [part.name for part in found.layers] == PARTS
    for part in found.layers:
        assert part.difference.max_abs <= 1e-5 and part.difference.cosine > 1 - 1e-9
        assert part.stock_error is not None and part.fast_error is not None
        assert part.fast_error.max_abs <= 1e-5 and part.stock_error.max_abs <= 1e-5
    # To the bit as without looking, and the blocks' own modules were not called.
    with torch.no_grad():
        call = call_of(stock, folder)
        alone = fast(*call).sample
        with module.seen_parts(fast) as seen:
            assert torch.equal(fast(*call).sample, alone)
        assert all(stock_forward.obstacle(layer) is None for layer in fast.layers)
        assert [name for name in PARTS if name in seen] == PARTS
        fast.layers[1].norm2.weight.mul_(1.01)
    changed = {p.name: p.difference.max_abs for p in compare(stock, fast, *call, rounds=1, layers=True).layers}
    assert changed["layers.0"] <= 1e-5 < 1e-4 < changed["layers.1"]
    values = json.loads(json.dumps(found.to_dict()))["layers"]
    assert [value["name"] for value in values] == PARTS and values[2]["fast_error"]["max_abs"] <= 1e-5
    lines = str(found).splitlines()[-len(PARTS) :]
    assert [line.split()[0] for line in lines] == PARTS and all(len(line.split()) == 6 for line in lines)
    with pytest.raises(ValueError, match="layers must be False"):
        compare(Shifted(), Shifted(), torch.ones(1, 3), rounds=1, layers=True)


class Hungry(Shifted):
    """Two buffers of a megabyte at once, and another one after them."""

    def forward(self, x: Tensor, *, double: bool = False) -> Any:
        held = [torch.zeros(1 << 18) for _ in range(2)]
        out = super().forward(x) + held[0][0] * held[1][0]
        del held
        return out + torch.zeros(1 << 18)[0]


def test_peak_memory() -> None:
    found = compare(Shifted(), Hungry(), torch.ones(1, 3), rounds=1)
    assert found.stock_peak_bytes is not None and found.fast_peak_bytes is not None
    assert 0 < found.stock_peak_bytes < 1 << 14
    assert 2 << 20 <= found.fast_peak_bytes < (2 << 20) + (1 << 14)
    assert "allocated at the height of a call, beside the weights: stock 0.00 MiB, fast 2.00 MiB" in str(found)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert compare(Shifted(), Hungry(), torch.ones(1, 3), rounds=1).fast_peak_bytes is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_of_ours(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", sample_size=2))
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.normal_()
    model.save_pretrained(tmp_path)
    file, tolerance = tmp_path / "compare.json", {"float32": "1e-5", "bfloat16": "0.1", "float16": "0.01"}[dtype]
    argv = ["compare", str(tmp_path), "--json", str(file), "--rounds", "1", "--layers", "--dtype", dtype]
    assert main([*argv, "--tolerance", tolerance]) == 0, capsys.readouterr()
    values = json.loads(file.read_text())
    assert values["dtype"] == dtype and {"layers.0", "layers.1"} <= {part["name"] for part in values["layers"]}
    assert 0 < values["difference"]["max_abs"] <= float(tolerance)
    assert main([*argv, "--tolerance", "0"]) == 1


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
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:1, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: there are "),
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
