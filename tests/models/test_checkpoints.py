"""Checkpoints: ours, diffusers' and BLIP3-o's, there and back, and what does not fit is said by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import adjacent, projection_groups
from blip3o_fast.models.nextdit import BLIP3oDiT

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


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, STOCK], ids=["blip3o", "stock"])
def test_round_trip(config: BLIP3oConfig, tmp_path: Path) -> None:
    model = BLIP3oDiT(config)
    model.save_pretrained(tmp_path)
    loaded = BLIP3oDiT.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_model(loaded, model)
    for block in loaded.layers:
        assert all(adjacent([linear.weight for linear in group]) for group in projection_groups(block))
    assert all(p.requires_grad for name, p in loaded.named_parameters() if name != "pad_token")
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "README.md",
        "diffusion_pytorch_model.safetensors" if config is STOCK else "model.safetensors",
    }
    assert BLIP3oDiT.from_pretrained(str(tmp_path)).config == config


def test_loaded_weights_are_no_window_on_the_file(saved: tuple[BLIP3oDiT, Path]) -> None:
    model, folder = saved
    loaded = BLIP3oDiT.from_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(b"\xff" * 4096)
    assert_same_model(loaded, model)


def test_saving_over_itself(saved: tuple[BLIP3oDiT, Path]) -> None:
    _, folder = saved
    loaded = BLIP3oDiT.from_pretrained(folder)
    loaded.save_pretrained(folder)
    assert_same_model(BLIP3oDiT.from_pretrained(folder), loaded)
    other = BLIP3oDiT(STOCK)
    other.save_pretrained(folder)
    assert not (folder / "model.safetensors").exists(), "weights of another network in one folder with its config"
    assert_same_model(BLIP3oDiT.from_pretrained(folder), other)


@pytest.mark.parametrize(
    "given, expected",
    [(None, torch.bfloat16), ("auto", torch.bfloat16), (torch.float32, torch.float32), ("float16", torch.float16)],
)
def test_dtype(given: Any, expected: torch.dtype, tmp_path: Path) -> None:
    model = BLIP3oDiT(TINY).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = BLIP3oDiT.from_pretrained(tmp_path, torch_dtype=given)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert torch.equal(loaded.layers[0].attn1.to_q.weight, model.layers[0].attn1.to_q.weight.to(expected))


def test_bad_dtype_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch_dtype must be a floating dtype or its name, got torch.int8"):
        BLIP3oDiT.from_pretrained(tmp_path, torch_dtype=torch.int8)


def test_normalizer_travels_with_the_weights(tmp_path: Path) -> None:
    from blip3o_fast.models.normalizer import FeatureNormalizers, Normalizer

    model = BLIP3oDiT(TINY)
    features = torch.randn(50, 4, 16) * 3 + 1
    model.normalizer = FeatureNormalizers(
        condition=Normalizer.fit(torch.randn(50, 4, 24), "standardize"), target=Normalizer.fit(features, "pca:16")
    )
    model.save_pretrained(tmp_path)
    loaded = BLIP3oDiT.from_pretrained(tmp_path)
    assert torch.equal(loaded.normalizer.target(features), model.normalizer.target(features))
    loaded.normalizer = None
    loaded.save_pretrained(tmp_path)
    assert BLIP3oDiT.from_pretrained(tmp_path).normalizer is None


def test_weights_that_are_not_here_are_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = BLIP3oDiT(TINY)
    with pytest.raises(ValueError, match="70 weights are sharded, offloaded or never filled .*gather them before"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


# ---- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_loads_what_diffusers_saved(sharded: bool, stock_pair: Any, inputs: Any, tmp_path: Path) -> None:
    stock, ours = stock_pair(STOCK)
    stock.backbone.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "10GB")
    assert sharded == (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = BLIP3oDiT.from_pretrained(tmp_path)
    assert_same_model(loaded, ours)
    call = inputs(STOCK)
    assert (loaded(*call) - stock(*call)).abs().max().item() <= 1e-5


def test_diffusers_loads_what_we_saved(stock_pair: Any, inputs: Any, tmp_path: Path, recwarn: Any) -> None:
    from diffusers import LuminaNextDiT2DModel

    stock, ours = stock_pair(STOCK)
    ours.save_pretrained(tmp_path)
    loaded, info = LuminaNextDiT2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in stock.backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    known = {k: v for k, v in loaded.config.items() if not k.startswith("_")}
    assert known == {k: v for k, v in stock.backbone.config.items() if not k.startswith("_")}
    stock.backbone = loaded
    call = inputs(STOCK)
    assert (ours(*call) - stock(*call)).abs().max().item() <= 1e-5


def test_pad_token_is_kept_and_may_be_absent(tmp_path: Path) -> None:
    model = BLIP3oDiT(STOCK)
    with torch.no_grad():
        model.pad_token.normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(BLIP3oDiT.from_pretrained(tmp_path).pad_token, model.pad_token)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "pad_token"}, file)
    without = BLIP3oDiT.from_pretrained(tmp_path)
    assert torch.equal(without.pad_token, torch.zeros(64)) and not without.pad_token.requires_grad


# ---- BLIP3-o --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "model.dit.model.", "dit_model.", "module.", "_orig_mod."])
def test_knows_the_prefixes(prefix: str, saved: tuple[BLIP3oDiT, Path]) -> None:
    model, folder = saved
    rewrite(folder, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    assert_same_model(BLIP3oDiT.from_pretrained(folder), model)


def test_takes_the_network_out_of_a_whole_checkpoint(saved: tuple[BLIP3oDiT, Path]) -> None:
    model, folder = saved
    language_model = {"model.embed_tokens.weight": torch.zeros(3, 3), "lm_head.weight": torch.zeros(3)}
    rewrite(folder, lambda tensors: {**language_model, **{f"model.dit.model.{k}": v for k, v in tensors.items()}})
    (folder / "config.json").write_text('{"model_type": "llava_qwen", "hidden_act": "silu"}')
    assert_same_model(BLIP3oDiT.from_pretrained(folder, config="tiny"), model)
    assert_same_model(BLIP3oDiT.from_pretrained(folder, config=TINY.to_dict()), model)
    assert_same_model(BLIP3oDiT.from_pretrained(folder, config=TINY), model)


def test_reads_a_config_by_blip3os_names(saved: tuple[BLIP3oDiT, Path]) -> None:
    model, folder = saved
    names = {"dim": 64, "n_layers": 2, "n_heads": 2, "latent_embedding_size": 24, "in_channels": 16, "multiple_of": 32}
    (folder / "config.json").write_text(json.dumps({"model_type": "nextdit-crossattn", **names}))
    assert_same_model(BLIP3oDiT.from_pretrained(folder), model)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_refuses_the_network_that_mixes_channels(prefix: str, saved: tuple[BLIP3oDiT, Path]) -> None:
    _, folder = saved
    names = ("token_embedder.pos_embed", "eva_proj.weight", "eva_proj.bias", "layers.0.self_attn.in_proj_weight")
    rewrite(folder, lambda _: {prefix + name: torch.zeros(2) for name in names})
    with pytest.raises(ValueError, match="another network .*eva_proj.*mixes channels instead of tokens.*train anew"):
        BLIP3oDiT.from_pretrained(folder)


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_the_saved_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: the hub's client is replaced, what it is given to upload is loaded again."""
    import huggingface_hub.hub_mixin as mixin

    model, uploads = BLIP3oDiT(TINY), []

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **_: Any) -> str:
            uploads.append(BLIP3oDiT.from_pretrained(folder_path))
            return "url"

    monkeypatch.setattr(mixin, "HfApi", Api)
    assert model.push_to_hub("someone/model") == "url"
    assert_same_model(uploads[0], model)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, saved: tuple[BLIP3oDiT, Path]) -> None:
    import huggingface_hub

    model, folder = saved
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        asked.append({"repo_id": repo_id, **kwargs})
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = BLIP3oDiT.from_pretrained("someone/model", subfolder="model", revision="v1")
    assert_same_model(loaded, model)
    assert asked[0]["repo_id"] == "someone/model" and asked[0]["revision"] == "v1"
    assert asked[0]["allow_patterns"] == ["model/*.json", "model/*.safetensors"] and len(asked) == 1
