"""Encoders of two libraries, by their own names: ``open_clip:ViT-L-14/openai`` and ``timm:NAME``.

A picture is prepared as each model states it for itself. Both libraries give the last layer's features as a grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .preprocessing import INTERPOLATIONS, Preprocessing, torchvision_preprocessing
from .shards import EncoderInfo
from .tower import GRID, POOLING, Grid, Tower, choose, from_hub, import_package

_TIMM = "timm (with a torchvision that fits the installed torch)"
_OPEN_CLIP = "open_clip_torch (with a torchvision that fits the installed torch)"


def open_clip_tower(name: str, tower: str, revision: str) -> Tower:
    """``open_clip:MODEL/PRETRAINED``: a tag of open_clip.list_pretrained(), or a file of weights."""
    _no_revision(name, revision, "the weights are those of the tag behind the slash")
    model_name, _, pretrained = name.removeprefix("open_clip:").partition("/")
    open_clip = import_package("open_clip", _OPEN_CLIP)
    if not pretrained or open_clip.get_model_config(model_name) is None:
        known = "open_clip.list_pretrained()"
        raise ValueError(f"encoder: got {name!r}; open_clip:MODEL/PRETRAINED is needed, a pair of {known}")
    with torch.device("meta"), _quietly():
        visual = open_clip.create_model(model_name, pretrained=None, device="meta").visual
    widths = {"projected": _open_clip_width(visual), "hidden": _features(visual)}
    chosen, dim = choose(name, tower, widths)
    stated = dict(open_clip.get_model_preprocess_cfg(visual))
    stated |= {k: v for k, v in open_clip.get_pretrained_cfg(model_name, pretrained).items() if k in stated}
    own = stated["size"][0] if isinstance(stated["size"], tuple | list) else stated["size"]
    size = max(own, GRID * _step(visual))
    preprocess = _open_clip_preprocessing(name, stated, size)
    source = f"{model_name}/{pretrained} (open_clip_torch {open_clip.__version__})"
    info = EncoderInfo(name, dim, source, chosen, str(preprocess), POOLING)

    def load() -> tuple[nn.Module, Grid]:
        model = from_hub(
            name,
            f"{model_name}/{pretrained}",
            lambda: open_clip.create_model(
                model_name, pretrained=pretrained, weights_only=True, force_image_size=size if size != own else None
            ),
        )
        return model.visual, _open_clip_projected if chosen == "projected" else _open_clip_hidden

    return Tower(info, preprocess, load)


def timm_tower(name: str, tower: str, revision: str) -> Tower:
    """``timm:NAME``: a name of timm.list_pretrained(); only the hidden tower, as few of them have another."""
    _no_revision(name, revision, "the weights are those of the tag in the name")
    timm = import_package("timm", _TIMM)
    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name):
        raise ValueError(f"encoder: got {name!r}; timm:NAME is needed, a name of timm.list_pretrained()")
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=0)
    chosen, dim = choose(name, tower, {"hidden": _features(model)})
    stated = timm.data.resolve_model_data_config(model)
    size = max(stated["input_size"][-1], GRID * _step(model))
    preprocess = _timm_preprocessing(name, stated, size)
    info = EncoderInfo(name, dim, f"{model_name} (timm {timm.__version__})", chosen, str(preprocess), POOLING)

    def load() -> tuple[nn.Module, Grid]:
        model = from_hub(name, model_name, lambda: timm.create_model(model_name, pretrained=True, num_classes=0))
        if size != stated["input_size"][-1] and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)  # transformers: positions are interpolated
        return model, _timm_hidden

    return Tower(info, preprocess, load)


# --- features of a grid ----------------------------------------------------------------------------


def _timm_hidden(model: Any, pixels: Tensor) -> Tensor:
    grid: Tensor = model.forward_intermediates(pixels, indices=1, norm=False, intermediates_only=True)[-1]
    return grid


def _open_clip_hidden(visual: Any, pixels: Tensor) -> Tensor:
    return _open_clip_grid(visual, pixels, normed=False)


def _open_clip_projected(visual: Any, pixels: Tensor) -> Tensor:
    grid = _open_clip_grid(visual, pixels, normed=True).movedim(1, -1)
    if hasattr(visual, "trunk"):
        grid = visual.head(visual.trunk.head(visual.trunk.fc_norm(grid)))
    else:
        grid = grid @ visual.proj
    return grid.movedim(-1, 1)


def _open_clip_grid(visual: Any, pixels: Tensor, *, normed: bool) -> Tensor:
    found = visual.forward_intermediates(
        pixels, indices=1, normalize_intermediates=normed, intermediates_only=True, output_fmt="NCHW"
    )
    grid: Tensor = found["image_intermediates"][-1]
    return grid


# --- what a model says of itself -------------------------------------------------------------------


def _features(model: Any) -> int:
    """Channels of the last layer; 0 where the network has none that this module can reach."""
    trunk = getattr(model, "trunk", model)
    if hasattr(trunk, "feature_info"):
        return int(trunk.feature_info[-1]["num_chs"])
    return int(model.conv1.out_channels) if hasattr(model, "conv1") and hasattr(model, "transformer") else 0


def _step(model: Any) -> int:
    """Pixels from one cell of the grid to the next."""
    trunk = getattr(model, "trunk", model)
    return int(trunk.feature_info[-1]["reduction"] if hasattr(trunk, "feature_info") else model.conv1.stride[0])


def _open_clip_width(visual: Any) -> int:
    """Channels of the joint space; 0 where a picture is pooled in a way that no single patch can take part in."""
    if hasattr(visual, "trunk"):
        plain = getattr(visual.trunk, "global_pool", "") in ("token", "avg") and hasattr(visual.trunk, "fc_norm")
        last = [
            layer for layer in (*visual.trunk.head.modules(), *visual.head.modules()) if hasattr(layer, "out_features")
        ]
        return int(last[-1].out_features) if plain and last else 0
    plain = getattr(visual, "attn_pool", None) is None and getattr(visual, "proj", None) is not None
    return int(visual.proj.shape[1]) if plain and not getattr(visual, "final_ln_after_pool", False) else 0


def _open_clip_preprocessing(name: str, stated: Mapping[str, Any], size: int) -> Preprocessing:
    given, mode = stated["size"], stated["resize_mode"]
    edges = set(given) if isinstance(given, tuple | list) else {given}
    if len(edges) > 1 or mode not in ("shortest", "squash") or stated["interpolation"] not in INTERPOLATIONS:
        raise ValueError(f"{name}: its pictures are prepared in a way that is not known here: {dict(stated)}")
    return torchvision_preprocessing(
        size, stated["mean"], stated["std"], crop=mode == "shortest", interpolation=stated["interpolation"]
    )


def _timm_preprocessing(name: str, stated: Mapping[str, Any], size: int) -> Preprocessing:
    mode, interpolation = stated["crop_mode"], stated["interpolation"]
    shorter = int(size / stated["crop_pct"])
    known = mode == "center" or (mode == "squash" and shorter == size)
    if not known or interpolation not in INTERPOLATIONS or stated["input_size"][0] != 3:
        raise ValueError(f"{name}: its pictures are prepared in a way that is not known here: {dict(stated)}")
    return torchvision_preprocessing(
        size,
        stated["mean"],
        stated["std"],
        crop=mode == "center",
        shorter=shorter if shorter != size else 0,
        interpolation=interpolation,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """open_clip warns of random weights, which a network that is only described shall have."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _no_revision(name: str, revision: str, why: str) -> None:
    if revision:
        raise ValueError(f"revision: got {revision!r}; {name} takes none, {why}")
