"""The vision network of EVA-CLIP: one module for all published sizes, so that none of the hub's code has to run.

A vision transformer with a class token and learned positions. The sizes differ in a few places::

                      MLP       norm inside    block norms   rotary   biases of q, k, v
                                attention, MLP               q, k
    EVA02-CLIP B, L   SwiGLU    yes            before        yes      q, v
    EVA01-CLIP g      GELU      no             before        no       q, v
    EVA02-CLIP E, E+  GELU      no             after         no       q, v
    EVA-CLIP 8B       GELU      no             before        no       as the weights have them

`eva_weights` reads the files and gives the weights the names used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class EvaConfig:
    """The structure of one network. Sizes in channels or pixels; ``projection_dim`` is 0 without a projection."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    projection_dim: int
    gated: bool = False  # SwiGLU instead of GELU
    inner_norm: bool = False  # in front of the last matrix of the attention and of the MLP
    post_norm: bool = False  # the norms of a block follow its two branches instead of preceding them
    rms_norm: bool = False  # RMSNorm instead of LayerNorm
    rotary: bool = False
    biases: str = "qv"  # which of q, k, v have one
    projection_bias: bool = True
    eps: float = 1e-6
    rotary_theta: float = 10000.0
    rotary_grid: int = 16  # positions run over 0 .. 16 whatever the grid, as in pretraining

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def side(self) -> int:
        """Patches along one edge of a picture."""
        return self.image_size // self.patch_size

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        *,
        heads: int,
        post_norm: bool = False,
        rotary: bool = False,
        eps: float = 1e-6,
        rotary_theta: float = 10000.0,
        rotary_grid: int = 16,
    ) -> EvaConfig:
        """The structure that weights under this module's names have; what shapes cannot tell is given.

        Raises ``ValueError`` where a tensor is missing, the patches are not a square grid, or ``heads`` does not
        divide the width into heads of an even size (a multiple of 4 with ``rotary``).
        """
        try:
            width, _, patch, _ = weights["patch_embed.weight"].shape
            positions = weights["pos_embed"].shape[0]
            mlp_width = weights["blocks.0.mlp.up.weight"].shape[0]
        except (KeyError, ValueError) as error:
            raise ValueError(f"weights: no EVA vision network; {error} is missing or misshapen") from error
        side = round((positions - 1) ** 0.5)
        if side * side + 1 != positions:
            raise ValueError(f"weights: {positions} positions are not a class token and a square grid")
        if heads < 1 or width % heads or (width // heads) % (4 if rotary else 1):
            raise ValueError(f"heads: got {heads}, which do not divide a width of {width}")
        head = weights.get("head.weight")
        return cls(
            width=width,
            layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            heads=heads,
            mlp_width=mlp_width,
            patch_size=patch,
            image_size=side * patch,
            projection_dim=0 if head is None else head.shape[0],
            gated="blocks.0.mlp.gate.weight" in weights,
            inner_norm="blocks.0.attn.norm.weight" in weights,
            post_norm=post_norm,
            rms_norm="norm.bias" not in weights,
            rotary=rotary,
            biases="".join(side for side in "qkv" if f"blocks.0.attn.{side}.bias" in weights),
            projection_bias="head.bias" in weights,
            eps=eps,
            rotary_theta=rotary_theta,
            rotary_grid=rotary_grid,
        )


class EvaVision(nn.Module):
    """``pixels [N, 3, image_size, image_size]`` -> patch tokens ``[N, side * side, C]`` in row-major order.

    ``forward`` gives the last block's output (C = width); ``project`` takes tokens through the final norm and the
    projection into the space that pictures and texts share (C = projection_dim).
    """

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1 + config.side**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config, config.width)
        self.head = (
            nn.Linear(config.width, config.projection_dim, config.projection_bias) if config.projection_dim else None
        )
        self.rotation: Tensor | None
        self.register_buffer("rotation", None, persistent=False)

    @classmethod
    def from_weights(cls, config: EvaConfig, weights: Mapping[str, Tensor]) -> EvaVision:
        """The network around these very tensors (nothing is copied); ValueError where they are not all of it."""
        with torch.device("meta"):
            model = cls(config)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if wanted != found:
            wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
            shown = [f"{name} {_shape(found, name)} for {_shape(wanted, name)}" for name in wrong[:3]]
            raise ValueError(f"weights: {len(wrong)} tensors do not fit this EVA network: {', '.join(shown)}")
        model.load_state_dict(dict(weights), assign=True)
        if config.rotary:
            model.rotation = rotary_table(config)
        return model.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), 1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.rotation)
        return x[:, 1:]

    def project(self, tokens: Tensor) -> Tensor:
        assert self.head is not None
        projected: Tensor = self.head(self.norm(tokens))
        return projected


class Block(nn.Module):
    """Attention and an MLP, each added to the stream."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1, self.norm2 = _norm(config, config.width), _norm(config, config.width)
        self.attn, self.mlp = Attention(config), Mlp(config)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        if self.post_norm:
            x = x + self.norm1(self.attn(x, rotation))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.width, config.width, side in config.biases) for side in "qkv")
        self.norm = _norm(config, config.width) if config.inner_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        q, k, v = (side(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for side in (self.q, self.k, self.v))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj(self.norm(out))
        return projected


class Mlp(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width) if config.gated else None
        self.up = nn.Linear(config.width, config.mlp_width)
        self.norm = _norm(config, config.mlp_width) if config.inner_norm else nn.Identity()
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(self.norm(inner))
        return out


def rotary_table(config: EvaConfig) -> Tensor:
    """Float32 ``[2, side * side, head_dim]``: cosines and sines of the angles of every patch.

    The first half of a head turns by the patch's row, the second by its column; neighbouring channels are a pair.
    """
    half = config.head_dim // 2
    frequencies = config.rotary_theta ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
    positions = torch.arange(config.side, dtype=torch.float32) / config.side * config.rotary_grid
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
    rows = angles[:, None].expand(-1, config.side, -1)
    columns = angles[None].expand(config.side, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the patch tokens of ``x [N, heads, 1 + patches, head_dim]``; the class token has no place to turn by."""
    cos, sin = rotation
    patches = x[:, :, 1:]
    first, second = patches.unflatten(-1, (-1, 2)).unbind(-1)
    turned = patches * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin
    return torch.cat([x[:, :, :1], turned.to(x.dtype)], dim=2)


def _norm(config: EvaConfig, width: int) -> nn.Module:
    return nn.RMSNorm(width, config.eps) if config.rms_norm else nn.LayerNorm(width, config.eps)


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "(none)"
