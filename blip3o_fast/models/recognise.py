"""The configuration of a checkpoint: from its config.json, and where that says nothing of the network, from the shapes.

A whole BLIP3-o checkpoint's config.json describes its language model; a single file has none. The shapes of BLIP3-o's
network give every size. What they do not give is what BLIP3-o always has: patches of one token, eps 1e-5, its time.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from blip3o_fast.models.config import STOCK_CLASS, BLIP3oConfig
from blip3o_fast.models.matching import SUPPORTED
from blip3o_fast.models.reading import CONFIG, folder_of, read_json

# transformers' name of BLIP3-o's DiT alone, and of the training scripts'.
_OUR_MODEL_TYPES = ("nextdit-crossattn", "blip3o-dit")


def read_config(path: Path) -> BLIP3oConfig:
    """The config.json of a folder, or beside a file. FileNotFoundError, or ValueError naming what is wrong with it."""
    file = folder_of(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder_of(path)} has no {CONFIG}: give config=, a BLIP3oConfig, a dict or a preset's name"
        )
    values = read_json(file)
    refuse_other_class(values, file)
    try:
        return BLIP3oConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def refuse_other_class(values: Mapping[str, Any], file: Path) -> None:
    """ValueError where a config.json says that another class of diffusers wrote it."""
    name = values.get("_class_name")
    if name is not None and name != STOCK_CLASS:
        raise ValueError(f"{file} describes a {name}, which is another network. {SUPPORTED}")


def named_by(values: Mapping[str, Any]) -> str:
    """The class that a config.json of transformers names, for a message; often that of a larger model."""
    names = values.get("architectures")
    return f" ({', '.join(map(str, names))} by its {CONFIG})" if isinstance(names, list) and names else ""


def recognise(path: Path, given: Mapping[str, Tensor]) -> BLIP3oConfig:
    """The config of the network whose tensors (by our names) were found in the folder or file."""
    file = folder_of(path) / CONFIG
    values = read_json(file) if file.is_file() else {}
    model_type = values.get("model_type")
    of_blip3o = "caption_projection.linear_1.weight" in given
    if of_blip3o and (not values or model_type not in (None, *_OUR_MODEL_TYPES)):
        return config_from_shapes(given)
    if not values:
        raise FileNotFoundError(
            f"{folder_of(path)} has no {CONFIG}, and the shapes of a stock network do not tell its patch size: give "
            "config=, a BLIP3oConfig, a dict or a preset's name"
        )
    config = read_config(path)
    # The same config.json was written by builds with 4864 and with 7168 columns, so the file decides.
    return _with_ffn_dim(config, given) if model_type in _OUR_MODEL_TYPES else config


def config_from_shapes(given: Mapping[str, Tensor]) -> BLIP3oConfig:
    """The config of a BLIP3-o network with these tensors; ValueError where one that is needed is not there."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in given:
            raise ValueError(
                f"{name} is missing: the checkpoint is not whole, so its sizes cannot be told. Give config= to see all "
                "that is missing"
            )
        return tuple(given[name].shape)

    hidden_size, in_channels = shape("patch_embedder.proj.weight")
    heads = shape("layers.0.gate")[0]
    layers = {name.split(".")[1] for name in given if name.startswith("layers.")}
    try:
        config = BLIP3oConfig(
            in_channels=in_channels,
            hidden_size=hidden_size,
            num_layers=len(layers),
            num_attention_heads=heads,
            num_kv_heads=shape("layers.0.attn1.to_k.weight")[0] * heads // hidden_size,
            cross_attention_dim=shape("caption_projection.linear_1.weight")[1],
            learn_sigma=shape("norm_out.linear_2.weight")[0] == 2 * in_channels,
            qk_norm="layers.0.attn1.norm_q.weight" in given,
        )
    except (ValueError, IndexError) as error:
        raise ValueError(f"the shapes are those of no network: {error}") from error
    if config.num_kv_heads == config.num_attention_heads:
        config = replace(config, num_kv_heads=None)
    return _with_ffn_dim(config, given)


def _with_ffn_dim(config: BLIP3oConfig, given: Mapping[str, Tensor]) -> BLIP3oConfig:
    """The config with the feed-forward width of the file: by the multipliers in use, else by one that gives it."""
    weight = given.get("layers.0.feed_forward.linear_1.weight")
    if weight is None or weight.shape[0] == config.ffn_dim:
        return config
    width = int(weight.shape[0])
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        for multiplier in (None, 1.5):
            candidate = replace(config, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if candidate.ffn_dim == width:
                return candidate
    # 8/3 * hidden_size * multiplier is cut off to a whole number: half a unit more lands on the width.
    return replace(config, multiple_of=1, ffn_dim_multiplier=(width + 0.5) / int(8 * config.hidden_size / 3))
