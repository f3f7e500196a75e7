"""EVA-CLIP's vision network: timm's numbers from the same weights, in every naming and kind of file.

timm cannot always be installed (it needs a torchvision that fits torch), so what it gave is kept in
eva_golden.json; where it can be imported, the same is asked of it again. ``python tests/data/test_eva.py`` writes the
file anew. Weights and pictures come from numpy's RandomState, whose numbers do not change.
"""

import json
import re
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip3o_fast.data.encoders import encoder_info, load_encoder
from blip3o_fast.data.eva import EvaConfig, EvaVision
from blip3o_fast.data.eva_weights import _BY_WIDTH, EvaFiles, canonical

GOLDEN = Path(__file__).with_name("eva_golden.json")
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 20, "global_pool": "token"}
EVA02 = {
    "mlp_ratio": 4 * 2 / 3,
    "qkv_fused": False,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "scale_attn_inner": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (16, 16),
}
# what timm is asked for, and what we must be told beside the weights
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "EVA02 B, L": ({"img_size": 64, **EVA02}, {"rotary": True}),
    "EVA02 L, larger pictures": ({"img_size": 96, **EVA02}, {"rotary": True}),
    "EVA02 E": ({"img_size": 64, "mlp_ratio": 3, "use_post_norm": True}, {"post_norm": True}),
    "EVA01 g": ({"img_size": 64, "mlp_ratio": 3}, {}),
    "RMSNorm, no biases": ({"img_size": 64, "mlp_ratio": 3, "qkv_bias": False, "norm_layer": "rms"}, {}),
}
PUBLISHED = {
    "eva02-clip-b-16": "eva02_base_patch16_clip_224",
    "eva02-clip-l-14": "eva02_large_patch14_clip_224",
    "eva02-clip-l-14-336": "eva02_large_patch14_clip_336",
    "eva02-clip-e-14": "eva02_enormous_patch14_clip_224",
    "g": "eva_giant_patch14_clip_224",
}


def random(name: str, shape: list[int], scale: float = 0.3) -> Tensor:
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * scale
    return torch.from_numpy(numbers.astype(np.float32))


def pixels(side: int) -> Tensor:
    return random("pixels", [2, 3, side, side], 1.0)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def weights_of(golden: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """The weights of a kind under timm's names."""
    return {name: random(name, shape) for name, shape in golden["kinds"][kind]["shapes"].items()}


def ask_timm(kind: str) -> dict[str, Any]:
    """Shapes of the weights, and hidden and projected tokens, as timm has them."""
    from timm.layers import LayerNorm, RmsNorm
    from timm.models.eva import Eva

    options = {**SMALL, **KINDS[kind][0]}
    norm = RmsNorm if options.pop("norm_layer", None) else LayerNorm
    model = Eva(**options, norm_layer=partial(norm, eps=1e-6)).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: random(name, shape) for name, shape in shapes.items()})
    with torch.no_grad():
        picture = pixels(options["img_size"])
        last = {"indices": 1, "output_fmt": "NLC", "intermediates_only": True}
        hidden = model.forward_intermediates(picture, norm=False, **last)[-1]
        projected = model.head(model.forward_intermediates(picture, norm=True, **last)[-1])
        assert torch.allclose(model.head(model.forward_features(picture)[:, 1:]), projected)
    return {"shapes": shapes, "hidden": few(hidden), "projected": few(projected)}


def few(tokens: Tensor) -> list[float]:
    """Some numbers of ``[2, patches, C]`` in which an error anywhere shows: attention mixes all of a picture."""
    return [round(float(x), 5) for x in tokens[:, ::13, ::5].flatten()]


def published_structures() -> dict[str, dict[str, Any]]:
    import timm

    found = {}
    for name, timm_name in PUBLISHED.items():
        with torch.device("meta"):
            model = timm.create_model(timm_name, num_classes=20)
        block = model.blocks[0]
        found[name] = {
            "width": model.embed_dim,
            "layers": len(model.blocks),
            "heads": block.attn.num_heads,
            "mlp_width": block.mlp.fc2.in_features,
            "patch_size": model.patch_embed.patch_size[0],
            "image_size": model.patch_embed.img_size[0],
            "projection_dim": 20,
            "gated": hasattr(block.mlp, "fc1_g"),
            "inner_norm": block.attn.norm.__class__.__name__ != "Identity",
            "post_norm": type(block).__name__ == "EvaBlockPostNorm",
            "rotary": model.rope is not None,
            "eps": model.norm.eps,
        }
    return found


# --- the same numbers as timm's --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_timms(golden: dict[str, Any], kind: str) -> None:
    weights = canonical(weights_of(golden, kind))
    config = EvaConfig.from_weights(weights, heads=2, **KINDS[kind][1])
    model = EvaVision.from_weights(config, weights)
    with torch.no_grad():
        hidden = model(pixels(config.image_size))
        projected = model.project(hidden)
    assert hidden.shape == (2, config.side**2, 32) and projected.shape == (2, config.side**2, 20)
    for found, key in ((hidden, "hidden"), (projected, "projected")):
        wanted = np.array(golden["kinds"][kind][key])
        assert np.linalg.norm(np.array(few(found)) - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_known_by_their_width(golden: dict[str, Any], name: str) -> None:
    wanted = EvaConfig(**golden["published"][name])
    with torch.device("meta"):
        weights = EvaVision(wanted).state_dict()
    assert EvaConfig.from_weights(weights, **_BY_WIDTH[wanted.width]) == wanted


def test_timm_still_gives_these_numbers(golden: dict[str, Any]) -> None:
    pytest.importorskip(
        "timm", reason="timm is not installed: its numbers are those of eva_golden.json", exc_type=Exception
    )
    assert golden["published"] == published_structures()
    for kind in KINDS:
        found, kept = ask_timm(kind), golden["kinds"][kind]
        assert found["shapes"] == kept["shapes"]
        for key in ("hidden", "projected"):
            assert np.allclose(found[key], kept[key], rtol=1e-4, atol=1e-4)


# --- namings and files -----------------------------------------------------------------------------


def authors_naming(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of the authors' own files, with what else these hold."""
    rules = (
        (r"attn\.norm\.", "attn.inner_attn_ln."), (r"mlp\.norm\.", "mlp.ffn_ln."), (r"mlp\.fc1_g\.", "mlp.w1."),
        (r"mlp\.fc1_x\.", "mlp.w2."), (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
    )  # fmt: skip
    gated = any("fc1_g" in name for name in weights)
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed["visual." + (name.replace("mlp.fc2", "mlp.w3") if gated else name)] = tensor
    other = {"visual.rope.freqs_cos": torch.zeros(3), "visual.blocks.0.attn.rope.freqs_sin": torch.zeros(3)}
    return renamed | other | {"text.token_embedding.weight": torch.zeros(4, 4), "logit_scale": torch.tensor(1.0)}


def transformers_naming(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of the authors' repositories for transformers."""
    rules = (
        (r"^cls_token", "embeddings.class_embedding"), (r"^pos_embed", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.attn\.norm\.", ".self_attn.inner_attn_ln."), (r"\.attn\.", ".self_attn."),
        (r"mlp\.norm\.", "mlp.ffn_ln."), (r"^norm\.", "post_layernorm."), (r"_([qv])_bias", r"\1_proj.bias"),
    )  # fmt: skip
    gated = any("fc1_g" in name for name in weights)
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("head."):
            renamed["visual_projection." + name.removeprefix("head.")] = tensor
            continue
        if name in ("cls_token", "pos_embed"):
            tensor = tensor[0, 0] if name == "cls_token" else tensor[0]
        if gated:
            name = name.replace("mlp.fc2", "mlp.fc3").replace("mlp.fc1_g", "mlp.fc1").replace("mlp.fc1_x", "mlp.fc2")
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        name = re.sub(r"self_attn\.([qv])_bias$", r"self_attn.\1_proj.bias", name)
        if name.endswith("self_attn.qkv.weight"):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {f"vision_model.{name.replace('qkv', side + '_proj')}": part.clone() for side, part in parts}
        else:
            renamed[f"vision_model.{name}"] = tensor.clone()
    other = {"vision_model.embeddings.position_ids": torch.arange(65)[None]}
    return renamed | other | {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4)}


def open_clip_naming(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"visual.trunk.{name}": tensor for name, tensor in weights.items()} | {"text.x": torch.zeros(2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("naming", [authors_naming, transformers_naming, open_clip_naming])
def test_every_naming_is_the_same_network(golden: dict[str, Any], kind: str, naming: Any) -> None:
    weights = weights_of(golden, kind)
    wanted, found = canonical(weights), canonical(naming(weights))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def config_of(config: EvaConfig) -> dict[str, Any]:
    """config.json as the authors' repositories for transformers have it."""
    vision = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "projection_dim": config.projection_dim,
        "layer_norm_eps": config.eps,
        "post_layernorm": config.post_norm,
        "use_rms_norm": config.rms_norm,
        "use_rope": config.rotary,
        "q_bias": "q" in config.biases,
        "k_bias": False,
        "v_bias": "v" in config.biases,
        "hidden_act": "gelu",
    }
    return {"model_type": "clip", "projection_dim": config.projection_dim, "vision_config": vision}


@pytest.fixture(params=["RMSNorm, no biases", "EVA01 g"], ids=["rms", "layernorm"])
def repository(request: pytest.FixtureRequest, golden: dict[str, Any], tmp_path: Path) -> tuple[Path, EvaVision]:
    """A small one in the layout of BAAI/EVA-CLIP-8B (parts and an index), and the network that it is."""
    weights = weights_of(golden, request.param)
    inside = canonical(weights)
    model = EvaVision.from_weights(EvaConfig.from_weights(inside, heads=2), inside)
    named = transformers_naming(weights)
    halves = [sorted(named)[::2], sorted(named)[1::2]]
    index = {}
    for number, names in enumerate(halves, 1):
        part = f"pytorch_model-0000{number}-of-00003.bin"
        torch.save({name: named[name] for name in names}, tmp_path / part)
        index |= dict.fromkeys(names, part)
    # a part with the text side alone need not be there
    index["text_model.final_layer_norm.weight"] = "pytorch_model-00003-of-00003.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(config_of(model.config)))
    return tmp_path, model


def test_a_repository_for_transformers(repository: tuple[Path, EvaVision]) -> None:
    folder, model = repository
    assert EvaFiles.read(str(folder)).network().config == model.config
    picture = pixels(64)
    with torch.no_grad():
        tokens = model(picture)
        for tower, wanted in (("", model.project(tokens)), ("projected", model.project(tokens)), ("hidden", tokens)):
            encoder = load_encoder(f"eva:{folder}", tower=tower)
            assert encoder.info == encoder_info(f"eva:{folder}", tower=tower)
            assert encoder.info.tower == (tower or "projected")
            assert torch.allclose(encoder.encode(picture), wanted, atol=1e-5)


def test_one_file(golden: dict[str, Any], tmp_path: Path) -> None:
    """Without config.json a network of a width that was never published is refused, not guessed."""
    weights = weights_of(golden, "EVA02 B, L")
    torch.save({"state_dict": authors_naming(weights)}, tmp_path / "EVA02_CLIP.pt")
    with pytest.raises(
        ValueError, match=r"EVA02_CLIP\.pt: a width of 32; .* the widths 768, 1024, 1408, 1792 are known"
    ):
        load_encoder(f"eva:{tmp_path / 'EVA02_CLIP.pt'}")


def test_a_published_width_needs_no_config(tmp_path: Path) -> None:
    config = EvaConfig(768, 1, 12, 96, 16, 128, 24, gated=True, inner_norm=True, rotary=True)
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in EvaVision(config).state_dict().items()}
    weights = {name: random(name, shape, 0.02) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "eva02_base_patch16_clip_224", "num_classes": 24}')
    encoder = load_encoder(f"eva:{tmp_path}", tower="hidden")
    assert encoder.dim == 768 and encoder.preprocess.size == 128 and encoder.info.tower == "hidden"
    assert encoder.model.config == config


def test_half_precision_keeps_its_angles(golden: dict[str, Any]) -> None:
    weights = canonical(weights_of(golden, "EVA02 B, L"))
    config = EvaConfig.from_weights(weights, heads=2, rotary=True)
    exact = EvaVision.from_weights(config, weights)
    half = EvaFiles("here", weights, config_of(config)).network(torch.float16)
    assert (
        half.rotation is not None and half.rotation.dtype == torch.float32 and half.norm.weight.dtype == torch.float16
    )
    with torch.no_grad():
        found, wanted = half(pixels(64).half()).float(), exact(pixels(64))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3


# --- what is refused -------------------------------------------------------------------------------


def test_config_and_weights_must_agree(repository: tuple[Path, EvaVision]) -> None:
    folder, _ = repository
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        changed = {k: v for k, v in (config["vision_config"] | changes).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config | {"vision_config": changed}))
        with pytest.raises(ValueError, match=match):
            load_encoder(f"eva:{folder}")

    refused("num_hidden_layers 3 .found 2.", num_hidden_layers=3)
    refused("use_sub_ln True .found False.", use_sub_ln=True)
    refused("k_bias True .found False.", k_bias=True)
    refused("says nothing of the vision network's num_attention_heads", num_attention_heads=None)
    refused("says nothing of the vision network's layer_norm_eps", layer_norm_eps=None)
    refused("hidden_act 'quick_gelu'; only gelu is known", hidden_act="quick_gelu")
    refused("heads: got 3, which do not divide a width of 32", num_attention_heads=3)


def test_weights_that_are_another_network(golden: dict[str, Any]) -> None:
    weights = canonical(weights_of(golden, "EVA01 g"))
    config = EvaConfig.from_weights(weights, heads=2)
    with pytest.raises(ValueError, match=r"1 tensors do not fit this EVA network: extra \[2\] for \(none\)"):
        EvaVision.from_weights(config, weights | {"extra": torch.zeros(2)})
    missing = {name: tensor for name, tensor in weights.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2\.bias \(none\) for \[32\]"):
        EvaVision.from_weights(config, missing)
    with pytest.raises(ValueError, match="no EVA vision network"):
        EvaConfig.from_weights({}, heads=2)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.safetensors", b"junk", "not a whole safetensors file"),
        ("pytorch_model.bin", b"junk", "not a file of plain tensors"),
        ("config.json", b"[1]", "a JSON object is needed"),
        ("config.json", b"{", "not JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"visual.x": "../../x.bin"}}', r"names '\.\./\.\./x\.bin'"),
        ("model.safetensors.index.json", b'{"weight_map": {"visual.x": "x.bin"}}', r"its part x\.bin is missing"),
        ("readme.txt", b"", r"holds none of model\.safetensors"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_encoder(f"eva:{tmp_path}")


def test_no_code_is_run(tmp_path: Path) -> None:
    """A pickle that would run something is refused by torch's own restricted reader."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"visual.cls_token": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        load_encoder(f"eva:{tmp_path}")
    assert not (tmp_path / "ran").exists()


if __name__ == "__main__":
    kept = {"kinds": {kind: ask_timm(kind) for kind in KINDS}, "published": published_structures()}
    GOLDEN.write_text(json.dumps(kept, sort_keys=True) + "\n")
