"""`blip3o-fast compare`: stock and fast on the weights of a folder.

Of diffusers' network: its own forward, and the same network fused. Of one of ours that diffusers does not have (with a
context projection): the eager forward, stock's sequence over our modules, and `BLIP3oDiT`.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip3o_fast.files import replacing
from blip3o_fast.models.compare import Comparison, compare
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.models.fuse import fuse
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.stock import NETWORK

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class CompareSettings:
    """What `blip3o-fast compare` is told.

    path: a folder of diffusers: the network's, or a pipeline's with the network in `transformer`; or of ours.
    tolerance: of the largest absolute difference between the two outputs.
    json: a file for the numbers, or None.
    batch_size, context_tokens: B and L of the random inputs; the grid is the config's.
    rounds: timed calls of each. seed: of the inputs. layers: also block by block.
    dtype: of weights and inputs. device: cpu, cuda or cuda:1.
    """

    path: Path
    tolerance: float = 1e-4
    json: Path | None = None
    batch_size: int = 1
    context_tokens: int = 64
    rounds: int = 5
    seed: int = 0
    layers: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    def check(self) -> None:
        """ValueError naming the flag, before anything is loaded."""
        for name in ("batch_size", "context_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not (self.tolerance >= 0 and math.isfinite(self.tolerance)):
            raise ValueError(f"--tolerance must be a number >= 0, got {self.tolerance}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        kind, _, number = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            raise ValueError(f"--device must be cpu, cuda or cuda:1, got {self.device!r}")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {self.device}: there are {torch.cuda.device_count()} CUDA devices here")


def network_folder(path: Path) -> Path:
    """Where the network's config.json is; ValueError or FileNotFoundError where there is none of ours."""
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} has no network of diffusers or of ours: looked for {config}")
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a config of diffusers: {error}") from error
    if name not in (NETWORK, None):
        raise ValueError(f"{config} is of a {name}; compare is for a {NETWORK}, and for a BLIP3oDiT")
    return folder


def random_inputs(network: Any, settings: CompareSettings) -> list[Any]:
    """The arguments that stock, fused and our networks share, of the shapes that the config speaks of."""
    config, batch, tokens = network.config, settings.batch_size, settings.context_tokens
    draw = torch.Generator().manual_seed(settings.seed)
    side = config.sample_size
    made = [
        torch.randn(batch, config.in_channels, side, side, generator=draw),
        torch.rand(batch, generator=draw),
        torch.randn(batch, tokens, config.cross_attention_dim, generator=draw),
        torch.ones(batch, tokens, dtype=torch.int64),
    ]
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    return [made[0].to(device, dtype), made[1].to(device), made[2].to(device, dtype), made[3].to(device)]


class _Eager(nn.Module):
    """A `BLIP3oDiT` run as stock runs such a network."""

    def __init__(self, model: BLIP3oDiT) -> None:
        super().__init__()
        self.__dict__.update(model.__dict__)  # its very modules, by the same names

    def forward(self, *args: Any) -> torch.Tensor:
        return eager_forward(self, *args)


def _both(folder: Path, settings: CompareSettings) -> tuple[Any, Any, list[Any]]:
    """Stock, fast over the very same parameters (a large model fits twice that fits once), and their arguments."""
    dtype = getattr(torch, settings.dtype)
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name") is None:
        ours = BLIP3oDiT.from_pretrained(folder, torch_dtype=dtype, device=settings.device)
        return _Eager(ours), ours, random_inputs(ours, settings)
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    stock = LuminaNextDiT2DModel.from_pretrained(folder, torch_dtype=dtype).to(settings.device).eval()
    fast = fuse(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))
    rope = get_2d_rotary_pos_embed_lumina(stock.head_dim, 384, 384)
    return stock, fast, [*random_inputs(stock, settings), rope, {}]


def compare_folder(settings: CompareSettings) -> tuple[Comparison, bool]:
    """(what was found, whether it is within the tolerance); the JSON file is written where one is asked for."""
    settings.check()
    stock, fast, inputs = _both(network_folder(settings.path), settings)
    found = compare(stock, fast, *inputs, rounds=settings.rounds, layers=settings.layers)
    within = found.difference.max_abs <= settings.tolerance  # False for a NaN
    if settings.json is not None:
        values = {**found.to_dict(), "tolerance": settings.tolerance, "within_tolerance": within}
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        with replacing(settings.json) as beside:
            beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return found, within
