"""Export: what diffusers and a BLIP3-o checkpoint get is the network, bit for bit, and nothing half written."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_fast.cli import main
from blip3o_fast.models import export
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.normalizer import FeatureNormalizers, Normalizer

TINY = BLIP3oConfig.preset("tiny", multiple_of=64)
STOCK = BLIP3oConfig.preset("tiny", context_projection=False, time_convention="lumina", num_kv_heads=2)
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


def assert_same_weights(loaded: BLIP3oDiT, model: BLIP3oDiT) -> None:
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value), name


def normalizers() -> FeatureNormalizers:
    return FeatureNormalizers(
        condition=Normalizer.fit(torch.randn(9, 4, 24), "standardize"),
        target=Normalizer.fit(torch.randn(9, 4, 16), "standardize"),
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[BLIP3oDiT, Path]:
    model = BLIP3oDiT(TINY)
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.normal_()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A whole BLIP3-o checkpoint in miniature: three shards, the DiT in bf16 in the last two beside other tensors."""
    folder = tmp_path / "base"
    folder.mkdir()
    dit = {f"model.dit.model.{k}": torch.randn_like(v).bfloat16() for k, v in BLIP3oDiT(TINY).state_dict().items()}
    names = list(dit)
    parts = [
        {"model.embed_tokens.weight": torch.randn(5, 3)},
        {"model.layers.0.mlp.gate": torch.randn(3)} | {name: dit[name] for name in names[:20]},
        {"lm_head.weight": torch.randn(4).bfloat16()} | {name: dit[name] for name in names[20:]},
    ]
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / shard, metadata={"format": "pt", "by": "the base"})
    weight_map = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
    total = sum(t.nbytes for part in parts for t in part.values())
    metadata = {"total_size": total, "total_parameters": 7}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "blip3o_qwen", "hidden_size": 3584}))
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("words")
    return folder


def everything(folder: Path) -> dict[str, Tensor]:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {name: load_file(folder / shard)[name] for name, shard in weight_map.items()}
    assert len(tensors) == sum(len(load_file(folder / shard)) for shard in SHARDS)
    return tensors


# ---- diffusers ------------------------------------------------------------------------------------------------------


def test_diffusers_loads_it_without_a_word(
    stock_pair: Callable[..., Any], inputs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: Any
) -> None:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.utils import logging as diffusers_logging

    stock, ours = stock_pair(STOCK)
    ours.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out", to="diffusers")
    size = sum(p.nbytes for p in ours.parameters())
    assert (done.tensors, done.bytes, done.dtype) == (len(ours.state_dict()), size, "float32")
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            loaded, info = LuminaNextDiT2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.records and not [w for w in recwarn if "keys" in str(w.message)]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    stock.backbone = loaded
    call = inputs(STOCK)
    assert (ours(*call) - stock(*call)).abs().max().item() <= 1e-5
    again = BLIP3oDiT.from_pretrained(tmp_path / "out")
    assert again.config == ours.config
    assert_same_weights(again, ours)


def test_diffusers_has_no_projection(saved: tuple[BLIP3oDiT, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a context projection .* GELU .*which diffusers' .* has not"):
        export(saved[1], tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


def test_what_diffusers_cannot_know_is_said(tmp_path: Path) -> None:
    model = BLIP3oDiT({**STOCK.to_dict(), "time_convention": "blip3o"})
    model.normalizer = normalizers()
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning) as caught:
        export(tmp_path / "model", tmp_path / "out", to="diffusers", dtype="bfloat16")
    said = " ".join(str(w.message) for w in caught)
    assert "no place for the normalisation" in said and "feed 1 - sigma and expect data - noise" in said
    again = BLIP3oDiT.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and again.config == model.config
    features = torch.randn(2, 4, 16)
    assert torch.equal(again.normalizer.target(features), model.normalizer.target(features))


# ---- BLIP3-o --------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_base_with_the_network_inside(saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path) -> None:
    model, folder = saved
    before = {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}
    done = export(folder, tmp_path / "out", to="blip3o", base=base)
    out = done.output
    assert before == {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}, "the base stays"
    assert (done.tensors, done.dtype) == (len(model.state_dict()), "bfloat16")
    assert_same_weights(BLIP3oDiT.from_pretrained(out), model.bfloat16())
    theirs, ours = everything(base), everything(out)
    assert list(theirs) == list(ours)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]) != name.startswith("model.dit.model."), name
    assert (out / SHARDS[0]).read_bytes() == before[SHARDS[0]]
    assert (out / SHARDS[0]).stat().st_ino != (base / SHARDS[0]).stat().st_ino
    assert (out / "config.json").read_bytes() == before["config.json"]
    assert (out / "sub" / "vocab.txt").read_text() == "words"
    with safe_open(out / SHARDS[1], framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "the base"}
    assert json.loads((out / INDEX).read_text()) == json.loads(before[INDEX])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "out"}, "nothing is left beside"


def test_another_dtype_is_counted_in_the_index(saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path) -> None:
    model, folder = saved
    done = export(folder, tmp_path / "out", to="blip3o", base=base, dtype=torch.float32, hard_links=True)
    assert_same_weights(BLIP3oDiT.from_pretrained(tmp_path / "out"), model)
    metadata = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    tensors = everything(tmp_path / "out")
    assert metadata == {"total_size": sum(t.nbytes for t in tensors.values()), "total_parameters": 7}
    assert done.bytes == sum(p.nbytes for p in model.parameters())
    assert [os.path.samefile(tmp_path / "out" / shard, base / shard) for shard in SHARDS] == [True, False, False]


def test_a_base_of_one_file(saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path) -> None:
    save_file(everything(base), base / "model.safetensors")
    for name in (*SHARDS, INDEX):
        (base / name).unlink()
    export(saved[1], tmp_path / "out", to="blip3o", base=base)
    assert_same_weights(BLIP3oDiT.from_pretrained(tmp_path / "out"), saved[0].bfloat16())


def test_what_does_not_fit_the_base_is_listed(base: Path, tmp_path: Path) -> None:
    BLIP3oDiT({**TINY.to_dict(), "num_layers": 1, "cross_attention_dim": 30}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError) as error:
        export(tmp_path / "model", tmp_path / "out", to="blip3o", base=base)
    lines = str(error.value).splitlines()
    assert lines[0] == f"the network does not fit --base {base}:"
    assert lines[1] == "missing (26):" and "  layers.1.gate" in lines
    assert lines[-2:] == [
        "mis-shaped (1):",
        "  caption_projection.linear_1.weight: (64, 30) in the checkpoint, (64, 24) in the base",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}


def test_a_network_that_blip3o_would_run_wrongly(base: Path, tmp_path: Path) -> None:
    BLIP3oDiT({**TINY.to_dict(), "time_convention": "lumina"}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"would run this network wrongly: .*time_convention='lumina' \('blip3o'\)"):
        export(tmp_path / "model", tmp_path / "out", to="blip3o", base=base)


def test_nothing_half_written_is_left(
    saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(saved[1], tmp_path / "out", to="blip3o", base=base, overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "out"}


def test_an_output_is_replaced_as_a_whole(saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--output .*out exists; give another name, or --overwrite"):
        export(saved[1], tmp_path / "out", to="blip3o", base=base)
    export(saved[1], tmp_path / "out", to="blip3o", base=base, overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "out"}


def test_overwriting_loses_nothing_but_an_export(saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"--output .*out holds files, and no config.json"):
        export(saved[1], tmp_path / "out", to="blip3o", base=base, overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    before = sorted(saved[1].iterdir())
    for output in (saved[1], saved[1].parent):
        with pytest.raises(ValueError, match=r"--output .* (holds the checkpoint .* itself|must lie outside --base)"):
            export(saved[1], output, to="blip3o", base=base, overwrite=True)
    assert sorted(saved[1].iterdir()) == before


# ---- which weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_averaged_weights_of_a_training_checkpoint(
    raw: bool, saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path
) -> None:
    from blip3o_fast.training.ema import EMA

    model, folder = saved
    average = EMA(BLIP3oDiT(TINY), 0.9)
    average.save(folder)
    done = export(folder, tmp_path / "out", to="blip3o", base=base, dtype="float32", raw_weights=raw)
    assert done.averaged == (not raw) and ("averaged weights" in str(done)) == (not raw)
    expected = BLIP3oDiT(TINY)
    expected.load_state_dict(model.state_dict() if raw else average.average)
    assert_same_weights(BLIP3oDiT.from_pretrained(tmp_path / "out"), expected)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, word",
    [
        ({"to": "onnx"}, "--to must be one of diffusers, blip3o, got 'onnx'"),
        ({"to": "blip3o"}, "--to blip3o needs --base"),
        ({"to": "diffusers", "base": "x"}, "--to diffusers takes no --base"),
        ({"to": "diffusers", "dtype": "int8"}, "--dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"to": "blip3o", "base": "."}, "must lie outside --base"),
        ({"to": "blip3o", "base": "empty"}, "has neither model.safetensors.index.json nor model.safetensors"),
        ({"to": "blip3o", "base": "language"}, "has no tensors under model.dit.model."),
    ],
)
def test_bad_arguments(
    given: dict[str, Any], word: str, saved: tuple[BLIP3oDiT, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved[1].parent)
    Path("empty").mkdir()
    Path("language").mkdir()
    save_file({"lm_head.weight": torch.zeros(2)}, "language/model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        export("model", "out", **given)
    assert not Path("out").exists()


def test_the_command_line(
    saved: tuple[BLIP3oDiT, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = saved
    model.normalizer = normalizers()
    model.save_pretrained(folder)
    command = ["export", str(folder), "--to", "blip3o", "--base", str(base), "--output", str(tmp_path / "out")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert f"70 tensors, {2 * model.num_parameters():,} bytes, bfloat16, weights, for blip3o: {tmp_path}" in said.out
    assert said.err.startswith("warning: blip3o has no place for the normalisation")
    assert BLIP3oDiT.from_pretrained(tmp_path / "out").normalizer is not None
    assert main(command) == 2
    assert "error: --output" in capsys.readouterr().err
