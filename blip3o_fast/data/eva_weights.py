"""Published EVA-CLIP weights -> the names of `eva`, whatever file and naming they come in.

Three namings are in use: that of the authors' own files (``visual.blocks.0.attn.q_bias``), that of their
repositories for transformers (``vision_model.encoder.layers.0.self_attn.q_proj.bias``) and timm's
(``blocks.0.attn.q_proj.bias``, in open_clip's files behind ``visual.trunk.``). Files are safetensors or torch's, whole
or in parts; torch's are read with ``weights_only``, and of several parts only those that hold the vision network.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .eva import EvaConfig, EvaVision
from .tower import FilesError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What shapes cannot tell of weights that come without the authors' config.json. Each published size has a width of
# its own: B, L, g, E (and E+).
_BY_WIDTH: dict[int, dict[str, Any]] = {
    768: {"heads": 12, "rotary": True},
    1024: {"heads": 16, "rotary": True},
    1408: {"heads": 16},
    1792: {"heads": 16, "post_norm": True},
}
_PREFIXES = ("visual.trunk.", "visual.", "vision_model.")
_NOT_WEIGHTS = re.compile(r"(^|\.)(rope\.|mask_token$|position_ids$|k_bias$)|rope\.freqs_")
_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^(embeddings\.patch_embedding|patch_embed\.proj)\.", "patch_embed."),
        (r"^encoder\.layers\.", "blocks."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.", ".attn."),
        (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attn\.([qkv])_bias$", r".attn.\1.bias"),
        (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (r"\.mlp\.(w1|fc1_g)\.", ".mlp.gate."),
        (r"\.mlp\.(w2|fc1_x)\.", ".mlp.up."),
        (r"\.mlp\.w3\.", ".mlp.down."),
        (r"^post_layernorm\.", "norm."),
        (r"^visual_projection\.", "head."),
    )
)


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision network's tensors under the names of `EvaVision`; those of the text side are left out."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in weights)), "")
    found = {}
    for name, tensor in weights.items():
        inside = name.startswith(prefix) or (prefix == "vision_model." and name.startswith("visual_projection."))
        if inside and not _NOT_WEIGHTS.search(name):
            name = name.removeprefix(prefix)
            for pattern, new in _RENAMES:
                name = pattern.sub(new, name)
            found[name] = tensor
    # transformers' naming counts its matrices: three are SwiGLU's gate, up and down, two are up and down
    numbered = ("gate", "up", "down") if any(".mlp.fc3." in name for name in found) else ("up", "down")
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        name = re.sub(r"\.mlp\.fc([123])\.", lambda match: f".mlp.{numbered[int(match[1]) - 1]}.", name)
        if name in ("cls_token", "pos_embed"):
            tensor = tensor.reshape(-1) if name == "cls_token" else tensor.reshape(-1, tensor.shape[-1])
        if name.endswith(".attn.qkv.weight"):
            for side, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{side}.")] = part
        else:
            renamed[name] = tensor
    return renamed


def structure(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None, where: str) -> EvaConfig:
    """The structure of weights named by `canonical`, with the help of the authors' config.json where there is one."""
    if config is None or "architecture" in config:  # timm's description has no more than the weights themselves
        width = weights["patch_embed.weight"].shape[0] if "patch_embed.weight" in weights else 0
        if width not in _BY_WIDTH:
            known = ", ".join(map(str, _BY_WIDTH))
            raise FilesError(
                f"{where}: a width of {width}; without the authors' config.json the widths {known} are known"
            )
        return _from_weights(weights, where, **_BY_WIDTH[width])
    vision = config.get("vision_config", config)
    for key in ("num_attention_heads", "layer_norm_eps"):
        if not isinstance(vision.get(key), int | float):
            raise FilesError(f"{where}: config.json says nothing of the vision network's {key}")
    if vision.get("hidden_act", "gelu") not in ("gelu", "silu"):  # SwiGLU ignores it
        raise FilesError(f"{where}: hidden_act {vision['hidden_act']!r}; only gelu is known of EVA-CLIP")
    found = _from_weights(
        weights,
        where,
        heads=vision["num_attention_heads"],
        eps=vision["layer_norm_eps"],
        post_norm=bool(vision.get("post_layernorm")),
        rotary=bool(vision.get("use_rope")),
        rotary_theta=vision.get("rope_theta", 10000.0),
        rotary_grid=vision.get("pretrained_seq_len", 16),
    )
    said = {
        "hidden_size": found.width,
        "num_hidden_layers": found.layers,
        "intermediate_size": found.mlp_width,
        "patch_size": found.patch_size,
        "image_size": found.image_size,
        "use_rms_norm": found.rms_norm,
        "use_swiglu_mlp": found.gated,
        "use_sub_ln": found.inner_norm,
        **{f"{side}_bias": side in found.biases for side in "qkv"},
    }
    wrong = [f"{key} {vision[key]} (found {value})" for key, value in said.items() if vision.get(key, value) != value]
    if wrong:
        raise FilesError(f"{where}: its weights are not what its config.json says: {', '.join(wrong)}")
    return found


def _from_weights(weights: Mapping[str, Tensor], where: str, **rest: Any) -> EvaConfig:
    try:
        return EvaConfig.from_weights(weights, **rest)
    except ValueError as error:
        raise FilesError(f"{where}: {error}") from error


@dataclass(frozen=True)
class EvaFiles:
    """What a folder, a file or a repository holds: tensors by the names of `EvaVision`, and config.json."""

    source: str
    weights: dict[str, Tensor]
    config: dict[str, Any] | None

    @classmethod
    def read(cls, source: str, revision: str = "") -> EvaFiles:
        """Raises `FilesError` where there is no EVA-CLIP, and the hub's own errors where it cannot be had."""
        get = opener(source, revision)
        return cls(source, canonical(read_weights(source, get)), read_config(get))

    def network(self, dtype: torch.dtype | None = None) -> EvaVision:
        """The network around these weights, in their own dtype unless one is given."""
        config = structure(self.weights, self.config, self.source)
        try:
            model = EvaVision.from_weights(config, self.weights)
        except ValueError as error:
            raise FilesError(f"{self.source}: {error}") from error
        rotation = model.rotation
        model = model if dtype is None else model.to(dtype)
        model.rotation = rotation  # angles stay float32
        return model


def opener(source: str, revision: str = "") -> Callable[[str], Path | None]:
    """``name -> path`` of a file in a folder or in a repository of the hub; None where it has no such file."""
    place = Path(source)
    if place.is_file():
        return lambda name: None
    if place.is_dir():
        return lambda name: place / name if (place / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(source, name, revision=revision or "main"))
        except LocalEntryNotFoundError:  # the hub is out of reach: whether it has the file is unknown
            raise
        except EntryNotFoundError:
            return None

    return fetch


def read_config(get: Callable[[str], Path | None]) -> dict[str, Any] | None:
    """config.json, if there is one."""
    path = get("config.json")
    if path is None:
        return None
    return _json(path)


def read_weights(source: str, get: Callable[[str], Path | None]) -> dict[str, Tensor]:
    """Every tensor of the first file of `WEIGHT_FILES` that there is; of parts, those with the vision network."""
    if Path(source).is_file():
        return _read(Path(source))
    path = next((path for path in map(get, WEIGHT_FILES) if path is not None), None)
    if path is None:
        raise FilesError(f"{source}: holds none of {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        return _read(path)
    weights: dict[str, Tensor] = {}
    for name in _parts(path):
        part = get(name)
        if part is None:
            raise FilesError(f"{source}: its part {name} is missing")
        weights.update(_read(part))
    return weights


def _parts(index: Path) -> Iterable[str]:
    parts = _json(index).get("weight_map")
    if not isinstance(parts, dict):
        raise FilesError(f"{index}: has no weight_map")
    vision = sorted({str(part) for name, part in parts.items() if name.startswith(("vision_model.", "visual"))})
    for part in vision:
        if Path(part).name != part or not part.endswith((".safetensors", ".bin")):
            raise FilesError(f"{index}: names {part!r}, which is no file beside it")
    return vision


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FilesError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise FilesError(f"{path}: a JSON object is needed")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise FilesError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FilesError(f"{path}: not a file of plain tensors ({reason})") from error
    for key in ("state_dict", "module", "model"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise FilesError(f"{path}: holds no dictionary of tensors")
    return found
