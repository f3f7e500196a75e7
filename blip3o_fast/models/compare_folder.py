"""`blip3o-fast compare`: stock and fused on the weights of a folder that diffusers wrote."""

import copy
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blip3o_fast.models.compare import Comparison, compare
from blip3o_fast.models.fuse import fuse
from blip3o_fast.models.stock import NETWORK


@dataclass
class CompareSettings:
    """What `blip3o-fast compare` is told.

    path: a folder of diffusers: the network's, or a pipeline's with the network in `transformer`.
    tolerance: of the largest absolute difference between the two outputs.
    json: a file for the numbers, or None.
    batch_size, context_tokens: B and L of the random inputs; the grid is the config's.
    rounds: timed calls of each. seed: of the inputs.
    """

    path: Path
    tolerance: float = 1e-4
    json: Path | None = None
    batch_size: int = 1
    context_tokens: int = 64
    rounds: int = 5
    seed: int = 0

    def check(self) -> None:
        """ValueError naming the flag, before anything is loaded."""
        for name in ("batch_size", "context_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not (self.tolerance >= 0 and math.isfinite(self.tolerance)):
            raise ValueError(f"--tolerance must be a number >= 0, got {self.tolerance}")


def network_folder(path: Path) -> Path:
    """Where the network's config.json is; ValueError or FileNotFoundError where there is none of ours."""
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} has no network of diffusers: looked for {config}")
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a config of diffusers: {error}") from error
    if name != NETWORK:
        raise ValueError(f"{config} is of a {name}; compare is for a {NETWORK}")
    return folder


def random_inputs(network: Any, settings: CompareSettings) -> list[Any]:
    """Stock's arguments, of the shapes that the config speaks of."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    config, batch, tokens = network.config, settings.batch_size, settings.context_tokens
    draw = torch.Generator().manual_seed(settings.seed)
    side = config.sample_size
    return [
        torch.randn(batch, config.in_channels, side, side, generator=draw),
        torch.rand(batch, generator=draw),
        torch.randn(batch, tokens, config.cross_attention_dim, generator=draw),
        torch.ones(batch, tokens, dtype=torch.int64),
        get_2d_rotary_pos_embed_lumina(network.head_dim, 384, 384),
    ]


def compare_folder(settings: CompareSettings) -> tuple[Comparison, bool]:
    """(what was found, whether it is within the tolerance); the JSON file is written where one is asked for."""
    settings.check()
    folder = network_folder(settings.path)
    from diffusers import LuminaNextDiT2DModel

    stock = LuminaNextDiT2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    # A second network over the very same parameters: a large model fits twice that fits once.
    fast = fuse(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))
    found = compare(stock, fast, *random_inputs(stock, settings), {}, rounds=settings.rounds)
    within = found.difference.max_abs <= settings.tolerance  # False for a NaN
    if settings.json is not None:
        values = {**found.to_dict(), "tolerance": settings.tolerance, "within_tolerance": within}
        beside = settings.json.with_name(f".{settings.json.name}.{os.getpid()}")
        beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, settings.json)
    return found, within
