"""A checkpoint that does not fit is refused by name, and one that is a program does not run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.recognise import read_config

TINY = BLIP3oConfig.preset("tiny")
STOCK = BLIP3oConfig.preset("tiny", context_projection=False, time_convention="lumina", num_kv_heads=2)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 64, 16), torch.rand(2), torch.randn(2, 5, 24)


def assert_same_model(ours: BLIP3oDiT, expected: BLIP3oDiT) -> None:
    assert ours.config == expected.config
    assert list(ours.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    call = arguments()
    assert torch.equal(ours(*call), expected(*call))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[BLIP3oDiT, Path]:
    """A model and the folder that it was saved to."""
    model = BLIP3oDiT(TINY)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


# ---- what does not fit ----------------------------------------------------------------------------------------------


def broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(tensors)
    del tensors["layers.0.gate"], tensors["norm_out.linear_2.bias"]
    tensors["layers.9.gate"] = torch.zeros(2)
    tensors["layers.1.feed_forward.linear_1.weight"] = torch.zeros(256, 64)
    return tensors


def test_every_name_in_one_error(saved: tuple[BLIP3oDiT, Path]) -> None:
    _, folder = saved
    rewrite(folder, broken)
    with pytest.raises(ValueError) as error:
        BLIP3oDiT.from_pretrained(folder)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "missing (2):",
        "  layers.0.gate",
        "  norm_out.linear_2.bias",
        "unexpected (1):",
        "  layers.9.gate",
        "mis-shaped (1):",
        "  layers.1.feed_forward.linear_1.weight: (256, 64) in the checkpoint, (192, 64) in the model",
        "If only the feed-forward width differs: ffn_dim_multiplier (1.5 gives 7168 at width 1792, which some "
        "BLIP3-o builds have) or multiple_of.",
    ]


def test_not_strict(saved: tuple[BLIP3oDiT, Path]) -> None:
    model, folder = saved
    whole = load_file(folder / "model.safetensors")
    missing_one = {name: value for name, value in whole.items() if name != "norm_out.linear_2.bias"}
    rewrite(folder, lambda _: {**missing_one, "extra": torch.zeros(1)})
    with pytest.warns(UserWarning, match=r"(?s)missing \(1\):.*norm_out.linear_2.bias.*unexpected \(1\):.*extra"):
        loaded = BLIP3oDiT.from_pretrained(folder, strict=False)
    assert torch.isfinite(loaded(*arguments())).all()
    assert torch.equal(loaded.layers[1].norm2.weight, model.layers[1].norm2.weight)
    rewrite(folder, lambda _: broken(whole))
    with pytest.raises(ValueError, match="mis-shaped"):
        BLIP3oDiT.from_pretrained(folder, strict=False)


@pytest.mark.parametrize("config, word", [(STOCK, "has a context projection"), (TINY, "has no context projection")])
def test_says_which_of_the_two_networks_it_is(config: BLIP3oConfig, word: str, tmp_path: Path) -> None:
    BLIP3oDiT(TINY if config is STOCK else STOCK).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"The checkpoint {word}"):
        BLIP3oDiT.from_pretrained(tmp_path, config=config)


def test_missing_files(tmp_path: Path, saved: tuple[BLIP3oDiT, Path]) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder with a checkpoint"):
        BLIP3oDiT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no weights: looked for model.safetensors, diffusion_pytorch"):
        BLIP3oDiT.from_pretrained(tmp_path / "empty")
    _, folder = saved
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        BLIP3oDiT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: give config="):
        read_config(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        BLIP3oDiT.from_pretrained(folder, config="tiny")


def test_an_index_stays_in_its_folder(saved: tuple[BLIP3oDiT, Path]) -> None:
    _, folder = saved
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.0.gate": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="no file of weights of its folder"):
        BLIP3oDiT.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"layers.0.gate": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="which is not in the folder"):
        BLIP3oDiT.from_pretrained(folder)


# ---- pickles --------------------------------------------------------------------------------------------------------


def test_bin_is_read_as_weights_only(saved: tuple[BLIP3oDiT, Path]) -> None:
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_same_model(BLIP3oDiT.from_pretrained(folder), model)


class _Attack:
    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_a_bin_that_is_a_program_does_not_run(saved: tuple[BLIP3oDiT, Path], tmp_path: Path) -> None:
    _, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Attack(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is more than weights: reading it would run .*pathlib"):
        BLIP3oDiT.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
