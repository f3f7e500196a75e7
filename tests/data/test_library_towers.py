"""open_clip and timm by name: their own features and preprocessing where they are installed, their interface elsewhere.

Neither can be installed everywhere (both need a torchvision that fits torch), so what we ask of them is also shown with
stand-ins.
"""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from blip3o_fast.data import library_towers
from blip3o_fast.data.encoders import Encoder, encoder_info, load_encoder

SIZES = ((300, 200), (201, 333), (224, 224), (50, 40), (641, 480))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def averaged(grid: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(grid, 8).flatten(2).transpose(1, 2)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# --- stand-ins -------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """A network of one convolution with the interface of timm's."""

    def __init__(self, width: int, step: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, step, step)
        self.feature_info = [{"num_chs": 3, "reduction": 2}, {"num_chs": width, "reduction": step}]
        self.sized: list[int] = []

    def set_input_size(self, img_size: int) -> None:
        self.sized.append(img_size)

    def forward_intermediates(self, x: Tensor, indices: int, norm: bool, intermediates_only: bool) -> list[Tensor]:
        assert (indices, norm, intermediates_only) == (1, False, True)
        return [self.conv(x)]


class Timm:
    __version__ = "9"

    def __init__(self, step: int = 32, **stated: Any) -> None:
        self.step, self.asked = step, []
        base = {"input_size": (3, 224, 224), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1), "crop_pct": 0.875}
        whole = base | {"crop_mode": "center", "interpolation": "bilinear"} | stated
        self.data = SimpleNamespace(resolve_model_data_config=lambda model: whole)

    def is_model(self, name: str) -> bool:
        return name == "net"

    def create_model(self, name: str, **options: Any) -> Trunk:
        self.asked.append(options)
        torch.manual_seed(0)
        return Trunk(5, self.step)


def use(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(library_towers, "import_package", lambda name, package: module)


def test_what_is_asked_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = Timm()
    use(monkeypatch, timm)
    info = encoder_info("timm:net")
    assert timm.asked == [{"num_classes": 0}]  # a description needs no weights
    encoder = load_encoder("timm:net")
    assert timm.asked[1:] == [{"num_classes": 0}, {"num_classes": 0, "pretrained": True}]
    # 7 x 7 cells at its own 224 pixels are too few: larger pictures, prepared alike
    assert encoder.info == info and encoder.preprocess.size == 256 and encoder.model.sized == [256]
    assert (info.dim, info.tower, info.revision) == (5, "hidden", "net (timm 9)")
    assert (
        "256x256 bilinear (shorter side to 292, centre crop of torchvision), mean (127.5, 102.0" in info.preprocessing
    )
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert relative(encoder.encode(pixels), averaged(encoder.model.conv(pixels))) <= 1e-6
    with pytest.raises(ValueError, match="tower: got 'projected'; timm:net has 'hidden'"):
        load_encoder("timm:net", tower="projected")
    with pytest.raises(ValueError, match="encoder: got 'timm:nothing'; timm:NAME is needed"):
        load_encoder("timm:nothing")
    with pytest.raises(ValueError, match="revision: got 'abc'; timm:net takes none"):
        load_encoder("timm:net", revision="abc")


@pytest.mark.parametrize(
    "stated",
    [
        {"crop_mode": "border"},
        {"crop_mode": "squash"},  # with a crop of 0.875 after it
        {"interpolation": "lanczos"},
        {"input_size": (1, 224, 224)},
    ],
)
def test_other_ways_to_prepare_a_picture_are_refused(monkeypatch: pytest.MonkeyPatch, stated: dict[str, Any]) -> None:
    use(monkeypatch, Timm(**stated))
    with pytest.raises(ValueError, match="timm:net: its pictures are prepared in a way that is not known here"):
        encoder_info("timm:net")


class Visual(nn.Module):
    """open_clip's vision transformer, as far as we look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.transformer = nn.Conv2d(3, 6, 32, 32), nn.Identity()
        self.proj, self.attn_pool = nn.Parameter(torch.randn(6, 4)), None

    def forward_intermediates(
        self, x: Tensor, normalize_intermediates: bool, **options: Any
    ) -> dict[str, list[Tensor]]:
        assert options == {"indices": 1, "intermediates_only": True, "output_fmt": "NCHW"}
        return {"image_intermediates": [self.conv1(x) * (2 if normalize_intermediates else 1)]}


def test_what_is_asked_of_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create_model(name: str, **options: Any) -> Any:
        asked.append((name, options))
        torch.manual_seed(0)
        return SimpleNamespace(visual=Visual())

    stated = {
        "size": (224, 224),
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    library = SimpleNamespace(
        __version__="3",
        create_model=create_model,
        get_model_config=lambda name: {} if name == "ViT-B-32" else None,
        get_model_preprocess_cfg=lambda visual: stated,
        get_pretrained_cfg=lambda name, tag: {"mean": CLIP_MEAN, "std": CLIP_STD, "url": "x"},
    )
    use(monkeypatch, library)
    encoder = load_encoder("open_clip:ViT-B-32/tag/with slash")
    assert asked == [
        ("ViT-B-32", {"pretrained": None, "device": "meta"}),
        ("ViT-B-32", {"pretrained": "tag/with slash", "weights_only": True, "force_image_size": 256}),
    ]
    assert encoder.info == encoder_info("open_clip:ViT-B-32/tag/with slash", tower="projected")
    assert encoder.dim == 4 and encoder_info("open_clip:ViT-B-32/tag", tower="hidden").dim == 6
    assert "256x256 bicubic (aspect not kept" in encoder.info.preprocessing and "122.77" in encoder.info.preprocessing
    pixels, visual = torch.randn(1, 3, 256, 256), encoder.model
    with torch.no_grad():
        grid = (2 * visual.conv1(pixels)).movedim(1, -1) @ visual.proj
        assert relative(encoder.encode(pixels), averaged(grid.movedim(-1, 1))) <= 1e-6
        hidden = load_encoder("open_clip:ViT-B-32/tag", tower="hidden").encode(pixels)
        assert relative(hidden, averaged(visual.conv1(pixels))) <= 1e-6
    for name in ("open_clip:ViT-B-32", "open_clip:ViT-B-32/", "open_clip:other/tag"):
        with pytest.raises(ValueError, match="encoder: got 'open_clip:.*'; open_clip:MODEL/PRETRAINED is needed"):
            encoder_info(name)
    stated["resize_mode"] = "longest"
    with pytest.raises(ValueError, match="prepared in a way that is not known here"):
        encoder_info("open_clip:ViT-B-32/tag")


# --- the libraries themselves ----------------------------------------------------------------------


def library(name: str) -> ModuleType:
    why = f"{name} is not installed (it needs a torchvision that fits torch)"
    found: ModuleType = pytest.importorskip(name, reason=why, exc_type=ImportError)
    return found


def last_output(module: nn.Module, run: Any) -> Tensor:
    """What ``module`` gives while ``run`` runs."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, given, output: kept.append(output))
    with torch.no_grad():
        run()
    handle.remove()
    return kept[-1]


def grid_of(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def same_pictures(encoder: Encoder, transform: Any) -> None:
    for size in SIZES:
        assert float((transform(picture(*size)) - encoder.preprocess(picture(*size))).abs().max()) <= 1e-6, size


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "resnet18"])
def test_timm(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    timm = library("timm")
    create = timm.create_model

    def random_weights(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = create(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", random_weights)
    encoder = load_encoder(f"timm:{name}")
    stated = timm.data.resolve_model_data_config(encoder.model) | {"input_size": (3, *[encoder.preprocess.size] * 2)}
    same_pictures(encoder, timm.data.create_transform(**stated))
    pixels = torch.randn(1, 3, encoder.preprocess.size, encoder.preprocess.size)
    model: Any = encoder.model
    layer = (
        model.blocks[-1] if hasattr(model, "blocks") else model.stages[-1] if hasattr(model, "stages") else model.layer4
    )
    output = last_output(layer, lambda: model.forward_features(pixels))
    grid = output if output.dim() == 4 else grid_of(output[:, model.num_prefix_tokens :])
    assert relative(encoder.encode(pixels), averaged(grid)) <= 1e-5


@pytest.mark.parametrize("trunk", [False, True], ids=["own", "of timm"])
@pytest.mark.parametrize("tower", ["projected", "hidden"])
def test_open_clip(tmp_path: Path, trunk: bool, tower: str) -> None:
    open_clip = library("open_clip")
    own = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    timms = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": timms if trunk else own, "text_cfg": text}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "tiny.pt")
    encoder = load_encoder(f"open_clip:tiny/{tmp_path}/tiny.pt", tower=tower)
    size = encoder.preprocess.size
    assert size == (160 if trunk else 128)
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny", pretrained=str(tmp_path / "tiny.pt"), force_image_size=size
    )
    same_pictures(encoder, transform)
    visual, pixels = model.visual.eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        if tower == "hidden":
            layer = visual.trunk.blocks[-1] if trunk else visual.transformer
            tokens = last_output(layer, lambda: visual(pixels))[:, 1:]
        elif trunk:
            tokens = visual.head(visual.trunk.forward_features(pixels)[:, 1:])
        else:
            visual.output_tokens = True
            tokens = visual(pixels)[1] @ visual.proj
        assert encoder.dim == tokens.shape[-1]
        assert relative(encoder.encode(pixels), averaged(grid_of(tokens))) <= 1e-5
