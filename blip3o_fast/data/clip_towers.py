"""CLIP through transformers, and EVA-CLIP through the module of `eva`: towers by name, from a folder or the hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .preprocessing import clip_preprocessing
from .shards import EncoderInfo
from .tower import GRID, POOLING, FilesError, Grid, Tower, choose, from_hub, import_package, square

# name -> repository of the hub, {tower: width}, pixels
CLIP: dict[str, tuple[str, dict[str, int], int]] = {
    "clip-vit-b-32": ("openai/clip-vit-base-patch32", {"projected": 512, "hidden": 768}, 256),
    "clip-vit-l-14": ("openai/clip-vit-large-patch14", {"projected": 768, "hidden": 1024}, 224),
}
EVA: dict[str, tuple[str, dict[str, int], int]] = {
    "eva02-clip-b-16": ("timm/eva02_base_patch16_clip_224.merged2b", {"projected": 512, "hidden": 768}, 224),
    "eva02-clip-l-14": ("timm/eva02_large_patch14_clip_224.merged2b", {"projected": 768, "hidden": 1024}, 224),
    "eva02-clip-l-14-336": ("timm/eva02_large_patch14_clip_336.merged2b", {"projected": 768, "hidden": 1024}, 336),
    "eva02-clip-e-14": ("timm/eva02_enormous_patch14_clip_224.laion2b", {"projected": 1024, "hidden": 1792}, 224),
    "eva02-clip-e-14-plus": (
        "timm/eva02_enormous_patch14_clip_224.laion2b_plus",
        {"projected": 1024, "hidden": 1792},
        224,
    ),
    "eva-clip-8b": ("BAAI/EVA-CLIP-8B", {"projected": 1280, "hidden": 4096}, 224),
}


def clip_tower(name: str, tower: str, revision: str) -> Tower:
    """A name of `CLIP`, or ``clip:FOLDER_OR_ID``: any CLIP whose vision network transformers reads."""
    source, widths, size = CLIP.get(name) or (name.removeprefix("clip:"), {}, 0)
    if not widths:
        config = _clip_config(name, source, revision)
        widths, size = {"projected": config.projection_dim, "hidden": config.hidden_size}, _clip_size(config)
    chosen, dim = choose(name, tower, widths)
    preprocess = clip_preprocessing(size)
    info = EncoderInfo(name, dim, _at(source, revision), chosen, str(preprocess), POOLING)

    def load() -> tuple[nn.Module, Grid]:
        config = _clip_config(name, source, revision)
        found = config.projection_dim if chosen == "projected" else config.hidden_size
        if found != dim:
            raise FilesError(f"{name}: {source} has width {found}; {dim} was expected")
        transformers = import_package("transformers")
        kind = transformers.CLIPVisionModel if chosen == "hidden" else transformers.CLIPVisionModelWithProjection
        model, report = from_hub(
            name,
            source,
            lambda: kind.from_pretrained(source, revision=revision or "main", output_loading_info=True),
        )
        missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
        if missing:  # transformers would go on with random numbers in their place
            hint = "; its hidden tower needs none" if missing == ["visual_projection.weight"] else ""
            raise FilesError(f"{name}: {source} has no weights of {', '.join(missing[:3])}{hint}")
        return model, _clip_hidden if chosen == "hidden" else _clip_projected

    return Tower(info, preprocess, load)


def eva_tower(name: str, tower: str, revision: str, *, trust_remote_code: bool = False) -> Tower:
    """A name of `EVA`, or ``eva:FOLDER_FILE_OR_ID``: EVA-CLIP in any of the files that `eva_weights` reads."""
    source, widths, size = EVA.get(name) or (name.removeprefix("eva:"), {}, 0)
    if not widths:
        widths, size = from_hub(name, source, lambda: _eva_shape(source, revision))
    chosen, dim = choose(name, tower, widths)
    preprocess = clip_preprocessing(size)
    info = EncoderInfo(name, dim, _at(source, revision), chosen, str(preprocess), POOLING)

    def load() -> tuple[nn.Module, Grid]:
        from .eva_weights import EvaFiles

        # 8 billion weights in float32 are 30 GB; the authors publish and use them in half precision
        dtype = torch.float16 if name == "eva-clip-8b" else torch.float32
        model = from_hub(name, source, lambda: EvaFiles.read(source, revision)).network(dtype)
        config = model.config
        found = (config.projection_dim if chosen == "projected" else config.width, config.image_size)
        if found != (dim, size):
            raise FilesError(f"{name}: {source} has width {found[0]} at {found[1]} pixels; {dim} at {size} expected")
        return model, _eva_hidden if chosen == "hidden" else _eva_projected

    if trust_remote_code and name == "eva-clip-8b":
        return Tower(info, preprocess, lambda: _remote(name, source, chosen, revision))
    return Tower(info, preprocess, load)


# --- features of a grid ----------------------------------------------------------------------------


def _clip_hidden(model: nn.Module, pixels: Tensor) -> Tensor:
    return square(_clip_tokens(model, model.config, pixels))


def _clip_projected(model: Any, pixels: Tensor) -> Tensor:
    tokens = _clip_tokens(model.vision_model, model.config, pixels)
    return square(model.visual_projection(model.vision_model.post_layernorm(tokens)))


def _clip_tokens(vision: Any, config: Any, pixels: Tensor) -> Tensor:
    own = pixels.shape[-1] == config.image_size
    output = vision(pixel_values=pixels) if own else vision(pixel_values=pixels, interpolate_pos_encoding=True)
    tokens: Tensor = output.last_hidden_state[:, 1:]  # the first token is the class token
    return tokens


def _eva_hidden(model: nn.Module, pixels: Tensor) -> Tensor:
    return square(model(pixels))


def _eva_projected(model: Any, pixels: Tensor) -> Tensor:
    return square(model.project(model(pixels)))


# --- where the weights are -------------------------------------------------------------------------


def _clip_config(name: str, source: str, revision: str) -> Any:
    transformers = import_package("transformers")
    return from_hub(
        name, source, lambda: transformers.CLIPVisionConfig.from_pretrained(source, revision=revision or "main")
    )


def _clip_size(config: Any) -> int:
    """The tower's own picture size, or the smallest that has 8 x 8 patches."""
    return max(config.image_size, GRID * config.patch_size)


def _eva_shape(source: str, revision: str) -> tuple[Mapping[str, int], int]:
    """Widths and picture size as config.json has them, else from the weights."""
    from .eva_weights import EvaFiles, opener, read_config

    config = read_config(opener(source, revision)) or {}
    vision = config.get("vision_config", config)
    shape = (
        vision.get("projection_dim", config.get("projection_dim")),
        vision.get("hidden_size"),
        vision.get("image_size"),
    )
    if not all(type(value) is int for value in shape):
        found = EvaFiles.read(source, revision).network().config
        shape = (found.projection_dim, found.width, found.image_size)
    return {"projected": shape[0], "hidden": shape[1]}, shape[2]


def _at(source: str, revision: str) -> str:
    return f"{source}@{revision or 'main'}"


def _remote(name: str, source: str, chosen: str, revision: str) -> tuple[nn.Module, Grid]:
    """The network through the repository's own Python code, for who wants to compare."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"{name}: {source} brings Python code that would run on this machine; with trust_remote_code "
            "pass the revision as well, the 40 hex digits of a commit that you have read"
        )
    transformers = import_package("transformers")
    print(f"warning: {name} runs the Python code of {source} at {revision[:12]} on this machine", file=sys.stderr)
    options: dict[str, Any] = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
    model = from_hub(
        name, source, lambda: transformers.AutoModel.from_pretrained(source, dtype=torch.float16, **options)
    )

    def hidden(model: Any, pixels: Tensor) -> Tensor:
        tokens: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        return tokens

    def projected(model: Any, pixels: Tensor) -> Tensor:
        tokens: Tensor = model.visual_projection(model.vision_model.post_layernorm(hidden(model, pixels)))
        return tokens

    tokens: Callable[[Any, Tensor], Tensor] = hidden if chosen == "hidden" else projected
    return model, lambda model, pixels: square(tokens(model, pixels))
