"""What a checkpoint may look like: files and shards of both kinds, sizes told by the shapes, and other networks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.matching import refuse_strangers
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.normalizer import FeatureNormalizers, Normalizer
from blip3o_fast.models.recognise import config_from_shapes

# multiple_of: what the shapes alone make of a feed-forward width of 192
TINY = BLIP3oConfig.preset("tiny", multiple_of=64)
STOCK = BLIP3oConfig.preset("tiny", context_projection=False, time_convention="lumina", num_kv_heads=2)
LANGUAGE_MODEL = {"model.embed_tokens.weight": torch.zeros(3, 3), "lm_head.weight": torch.zeros(3)}


@pytest.fixture(scope="module")
def model() -> BLIP3oDiT:
    return BLIP3oDiT(TINY)


def assert_same(loaded: BLIP3oDiT, model: BLIP3oDiT) -> None:
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def write_shards(folder: Path, tensors: dict[str, Tensor], name: str, write: Callable[..., None]) -> Path:
    """Two shards and the index that transformers and diffusers write; returns the index."""
    stem, _, suffix = name.partition(".")
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    keys = list(tensors)
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for file, part in zip(names, parts, strict=True):
        write({key: tensors[key] for key in part}, folder / file)
    weight_map = {key: file for file, part in zip(names, parts, strict=True) for key in part}
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_shards_of_safetensors(name: str, model: BLIP3oDiT, tmp_path: Path) -> None:
    index = write_shards(tmp_path, dict(model.state_dict()), name, save_file)
    assert_same(BLIP3oDiT.from_pretrained(tmp_path), model)
    assert_same(BLIP3oDiT.from_pretrained(index), model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_shards_of_bin(name: str, model: BLIP3oDiT, tmp_path: Path) -> None:
    write_shards(tmp_path, dict(model.state_dict()), name, torch.save)
    assert_same(BLIP3oDiT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["any.safetensors", "any.bin", "any.pt"])
@pytest.mark.parametrize("beside", [True, False], ids=["with config.json", "alone"])
def test_a_file_by_itself(name: str, beside: bool, model: BLIP3oDiT, tmp_path: Path) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(dict(model.state_dict()), tmp_path / name)
    expected = model
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | {"sigma_min": 0.25}))
        expected = BLIP3oDiT({**TINY.to_dict(), "sigma_min": 0.25})
        expected.load_state_dict(model.state_dict())
        FeatureNormalizers(
            condition=Normalizer.fit(torch.randn(9, 4, 24), "standardize"),
            target=Normalizer.fit(torch.randn(9, 4, 16), "standardize"),
        ).save(tmp_path)
    loaded = BLIP3oDiT.from_pretrained(tmp_path / name)
    assert_same(loaded, expected)
    assert (loaded.normalizer is not None) == beside


def test_a_bin_of_an_old_torch(model: BLIP3oDiT, tmp_path: Path) -> None:
    torch.save(dict(model.state_dict()), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_same(BLIP3oDiT.from_pretrained(tmp_path / "old.bin"), model)


def test_the_file_of_a_training_program(model: BLIP3oDiT, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "step": 3}, tmp_path / "a.pt")
    assert_same(BLIP3oDiT.from_pretrained(tmp_path / "a.pt"), model)


def test_files_that_cannot_be_read(model: BLIP3oDiT, tmp_path: Path) -> None:
    for name, write, word in (
        ("cut.safetensors", save_file, "not a complete safetensors file"),
        ("cut.bin", torch.save, "not a complete file of torch.save"),
    ):
        write(dict(model.state_dict()), tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3000])
        with pytest.raises(ValueError, match=rf"{name} is {word}"):
            BLIP3oDiT.from_pretrained(tmp_path / name)
    (tmp_path / "note.txt").write_text("weights")
    with pytest.raises(ValueError, match=r"note\.txt is no checkpoint: a file of weights ends in \.safetensors, \.bin"):
        BLIP3oDiT.from_pretrained(tmp_path / "note.txt")
    with pytest.raises(ValueError, match="subfolder must be None for a file"):
        BLIP3oDiT.from_pretrained(tmp_path / "cut.bin", subfolder="x")
    with pytest.raises(FileNotFoundError, match=r"if cut\.bin is meant, give the file itself"):
        BLIP3oDiT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.bin is not a folder with a checkpoint, nor a file of weights"):
        BLIP3oDiT.from_pretrained("some/gone.bin")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a pipeline of diffusers, whose network is in subfolder='transformer'"):
        BLIP3oDiT.from_pretrained(tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "run" / "checkpoint-10")
    model.save_pretrained(tmp_path / "run" / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match=r"the run is not finished, its last checkpoint is .*checkpoint-10$"):
        BLIP3oDiT.from_pretrained(tmp_path / "run")


def test_an_index_that_does_not_fit_its_shards(model: BLIP3oDiT, tmp_path: Path) -> None:
    index = write_shards(tmp_path, dict(model.state_dict()), "pytorch_model.bin", torch.save)
    for content, word in (("{", "is not JSON"), ("[]", "must hold an object"), ('{"a": 1}', "must hold weight_map")):
        (tmp_path / "bad.bin.index.json").write_text(content)
        with pytest.raises(ValueError, match=rf"bad\.bin\.index\.json {word}"):
            BLIP3oDiT.from_pretrained(tmp_path / "bad.bin.index.json")
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names 'pytorch_model-00002-of-00002\.bin', which is not"):
        BLIP3oDiT.from_pretrained(index)


def test_mixed_dtypes_become_the_one_that_holds_all(model: BLIP3oDiT, tmp_path: Path) -> None:
    mixed = {k: v.bfloat16() if v.dim() == 2 else v for k, v in model.state_dict().items()}
    save_file(mixed, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"\d+ tensors in bfloat16.*without torch_dtype all become float32"):
        loaded = BLIP3oDiT.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(value, mixed[name].float()) for name, value in loaded.state_dict().items())
    assert BLIP3oDiT.from_pretrained(tmp_path, torch_dtype="bfloat16").dtype == torch.bfloat16
    halves = {k: v.bfloat16() if v.dim() == 2 else v.half() for k, v in model.state_dict().items()}
    save_file(halves, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="all become float32"):
        assert {p.dtype for p in BLIP3oDiT.from_pretrained(tmp_path).parameters()} == {torch.float32}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(mixed | {"layers.0.gate": torch.zeros(2).to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"layers\.0\.gate must be floating point of 16 bits or more"):
            BLIP3oDiT.from_pretrained(tmp_path, torch_dtype="bfloat16")


# ---- sizes from shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"ffn_dim_multiplier": 1.5, "multiple_of": 256},
        {"ffn_dim_multiplier": 1.1, "multiple_of": 1},
        {"num_kv_heads": 1, "num_layers": 3},
        {"qk_norm": False, "learn_sigma": True, "cross_attention_dim": 40},
    ],
)
def test_the_shapes_tell_every_size(sizes: dict[str, Any]) -> None:
    config = BLIP3oConfig.preset("tiny", **sizes)
    with torch.device("meta"):
        state = BLIP3oDiT(config).state_dict()
        found = BLIP3oDiT(config_from_shapes(state))
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert found.config.num_attention_heads == config.num_attention_heads
    assert (found.config.kv_heads, found.config.ffn_dim) == (config.kv_heads, config.ffn_dim)


def test_any_feed_forward_width_is_told(model: BLIP3oDiT) -> None:
    """Also those that a product of two rounded numbers just misses."""
    state = dict(model.state_dict())
    for width in range(97, 700):
        state["layers.0.feed_forward.linear_1.weight"] = torch.empty(width, 64, device="meta")
        assert config_from_shapes(state).ffn_dim == width


@pytest.mark.parametrize("multiplier, width", [(None, 4864), (1.5, 7168)])
def test_both_widths_of_released_checkpoints(multiplier: float | None, width: int) -> None:
    config = BLIP3oConfig.preset("blip3o-8b", num_layers=1, ffn_dim_multiplier=multiplier)
    with torch.device("meta"):
        state = BLIP3oDiT(config).state_dict()
    assert state["layers.0.feed_forward.linear_1.weight"].shape == (width, 1792)
    assert config_from_shapes(state) == config


def test_a_whole_checkpoint_needs_no_config_of_ours(model: BLIP3oDiT, tmp_path: Path) -> None:
    """Its config.json describes the language model, in words that also mean something for the network."""
    tensors = LANGUAGE_MODEL | {f"model.dit.model.{k}": v for k, v in model.state_dict().items()}
    write_shards(tmp_path, tensors, "model.safetensors", save_file)
    values = {"model_type": "blip3o_qwen", "architectures": ["blip3oQwenForCausalLM"], "hidden_size": 3584}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same(BLIP3oDiT.from_pretrained(tmp_path), model)
    gone = "model.dit.model.layers.0.attn1.to_k.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.attn1\.to_k\.weight is missing: the checkpoint is not whole"):
        BLIP3oDiT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing \(1\):\n  layers\.0\.attn1\.to_k\.weight"):
        BLIP3oDiT.from_pretrained(tmp_path, config=TINY)


def test_the_config_of_a_wider_build_is_set_right(tmp_path: Path) -> None:
    """BLIP3-o's config.json says nothing of the width, which came with the version of a library."""
    model = BLIP3oDiT({**TINY.to_dict(), "ffn_dim_multiplier": 1.5})
    assert model.config.ffn_dim == 256 != TINY.ffn_dim
    save_file({f"model.{k}": v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    names = {"dim": 64, "n_layers": 2, "n_heads": 2, "latent_embedding_size": 24, "in_channels": 16, "multiple_of": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nextdit-crossattn", **names}))
    loaded = BLIP3oDiT.from_pretrained(tmp_path)
    assert loaded.config.ffn_dim == 256
    x, t, context = torch.randn(1, 64, 16), torch.rand(1), torch.randn(1, 3, 24)
    assert torch.equal(loaded(x, t, context), model(x, t, context))


def test_a_stock_network_needs_its_config(tmp_path: Path) -> None:
    save_file(dict(BLIP3oDiT(STOCK).state_dict()), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FileNotFoundError, match="do not tell its patch size: give config="):
        BLIP3oDiT.from_pretrained(tmp_path)


def test_a_file_without_its_first_names_is_still_ours(model: BLIP3oDiT, tmp_path: Path) -> None:
    without = {k: v for k, v in model.state_dict().items() if not k.startswith("patch_embedder")}
    save_file({f"model.{k}": v for k, v in without.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(2\):\n  patch_embedder.proj.weight\n  patch_embedder.proj.bias$"):
        BLIP3oDiT.from_pretrained(tmp_path, config=TINY)


# ---- other networks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def relatives() -> dict[str, Any]:
    """Near relatives, as diffusers and transformers build them."""
    from diffusers import Lumina2Transformer2DModel, SanaTransformer2DModel
    from transformers import ViTConfig, ViTModel

    heads = {"num_layers": 1, "num_attention_heads": 2}
    return {
        "Lumina2Transformer2DModel": Lumina2Transformer2DModel(
            hidden_size=96, num_refiner_layers=1, num_kv_heads=2, axes_dim_rope=(16, 16, 16), cap_feat_dim=8, **heads
        ),
        "SanaTransformer2DModel": SanaTransformer2DModel(
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=8, **heads,
        ),
        "vision transformer": ViTModel(
            ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Lumina2Transformer2DModel", "SanaTransformer2DModel", "vision transformer"])
def test_relatives_are_refused_by_name(name: str, relatives: dict[str, Any], tmp_path: Path) -> None:
    relatives[name].save_pretrained(tmp_path)
    supported = "Supported are BLIP3-o's NextDiTCrossAttn .* and diffusers' LuminaNextDiT2DModel"
    with pytest.raises(ValueError, match=rf"{name}.*{supported}"):
        BLIP3oDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"is a .*{name}.*{supported}"):
        BLIP3oDiT.from_pretrained(tmp_path)


def test_the_class_in_the_config_is_named(tmp_path: Path) -> None:
    save_file({"strange.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["StrangeModel"], "model_type": "strange"}')
    with pytest.raises(ValueError, match=r"\(StrangeModel by its config\.json\) is of an unknown network .*Supported"):
        BLIP3oDiT.from_pretrained(tmp_path)


def test_another_class_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="describes a FluxTransformer2DModel, which is another network"):
        BLIP3oDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "names, word",
    [
        (LANGUAGE_MODEL, "a language model without a diffusion transformer"),
        (["base_model.model.layers.0.attn1.to_q.lora_A.weight"], "a LoRA adapter"),
        (["x_embedder.weight", "layers.0.attention.wq.weight", "cap_embedder.1.weight"], "Alpha-VLLM's own code"),
        (["layers.0.attention.wq.weight.absmax"], "quantised weights of bitsandbytes"),
        (["strange.weight"], r"unknown network \(its first names are strange.weight\)"),
        ([], "it holds no tensors"),
    ],
)
def test_other_names_are_refused(names: Any, word: str) -> None:
    with pytest.raises(ValueError, match=f"^the file is .*{word}.*Supported are"):
        refuse_strangers(names, "the file")


def test_names_of_ours_are_not_strange(model: BLIP3oDiT) -> None:
    refuse_strangers(model.state_dict(), "the file")
    refuse_strangers(["model.dit.model.layers.0.gate", *LANGUAGE_MODEL, "blocks.0.attn.qkv.weight"], "the file")


def test_the_seeds_networks_are_refused_with_a_way_out(tmp_path: Path) -> None:
    names = ("token_embedder.pos_embed", "eva_proj.weight", "layers.0.self_attn.in_proj_weight")
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "blip3o-dit", "dim": 512}')
    with pytest.raises(ValueError) as error:
        BLIP3oDiT.from_pretrained(tmp_path)
    text = str(error.value)
    assert "\n" not in text, "one paragraph"
    for part in ("mixes channels instead of tokens", "cannot be converted", "blip3o-fast train --embeddings_path"):
        assert part in text


def test_a_folder_saved_over_shards_has_no_old_index(model: BLIP3oDiT, tmp_path: Path) -> None:
    write_shards(tmp_path, dict(BLIP3oDiT(TINY).state_dict()), "pytorch_model.bin", torch.save)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.index.json"))
    assert_same(BLIP3oDiT.from_pretrained(tmp_path), model)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["layers.0.gate"], model.layers[0].gate)
