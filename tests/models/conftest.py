"""The oracle of these tests: diffusers' own modules, with our configuration and our weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT


class Stock(nn.Module):
    """diffusers' `LuminaNextDiT2DModel`, behind diffusers' `PixArtAlphaTextProjection` where the config has it."""

    def __init__(self, config: BLIP3oConfig) -> None:
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina

        super().__init__()
        self.caption_projection = None
        if config.context_projection:
            self.caption_projection = PixArtAlphaTextProjection(config.cross_attention_dim, config.hidden_size)
        self.backbone = LuminaNextDiT2DModel(
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            # stock raises TypeError for None where qk_norm is on
            num_kv_heads=config.kv_heads,
            multiple_of=config.multiple_of,
            ffn_dim_multiplier=config.ffn_dim_multiplier,
            norm_eps=config.norm_eps,
            learn_sigma=config.learn_sigma,
            qk_norm=config.qk_norm,
            cross_attention_dim=config.context_dim,
        )
        self.config = config
        self.rope = get_2d_rotary_pos_embed_lumina(config.head_dim, 384, 384)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        if encoder_mask is None:
            encoder_mask = torch.ones(encoder_hidden_states.shape[:2], dtype=torch.bool)
        if self.caption_projection is not None:
            encoder_hidden_states = self.caption_projection(encoder_hidden_states)
        extra: dict[str, Any] = {}
        if base_sequence_length is not None:
            extra["base_sequence_length"] = base_sequence_length
        return self.backbone(hidden_states, timestep, encoder_hidden_states, encoder_mask, self.rope, extra).sample

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by our names."""
        return {
            name.removeprefix("backbone."): parameter
            for name, parameter in self.named_parameters()
            if not (name == "backbone.pad_token" and self.config.context_projection)
        }


@pytest.fixture
def stock_pair() -> Callable[..., tuple[Stock, BLIP3oDiT]]:
    """stock_pair(config, dtype): diffusers' model and ours with the same weights, none of them zero or one."""

    def build(config: BLIP3oConfig, dtype: torch.dtype = torch.float32) -> tuple[Stock, BLIP3oDiT]:
        stock, ours = Stock(config).to(dtype), BLIP3oDiT(config).to(dtype)
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if name.endswith("gate") or parameter.dim() == 1:
                    # gates are zero and norms one at the start, which would hide most mistakes
                    parameter.add_(torch.randn_like(parameter) * (1.0 if name.endswith("gate") else 0.2))
            for name, parameter in stock.named().items():
                parameter.copy_(ours.get_parameter(name))
        return stock, ours

    return build


@pytest.fixture
def inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """inputs(config, batch, context, height, width, dtype): hidden_states [B, C, H, W], timestep [B], context."""

    def build(
        config: BLIP3oConfig,
        batch: int = 2,
        context: int = 5,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor, Tensor]:
        height = config.sample_size if height is None else height
        width = config.sample_size if width is None else width
        hidden_states = torch.randn(batch, config.in_channels, height, width, dtype=dtype)
        timestep = torch.rand(batch) * 1000
        return hidden_states, timestep, torch.randn(batch, context, config.cross_attention_dim, dtype=dtype)

    return build


# ---- the drop-in: diffusers' own network, which `fuse` changes in place ----------------------------------------------


@pytest.fixture
def build_lumina() -> Callable[..., Any]:
    """build_lumina(**overrides): a tiny `LuminaNextDiT2DModel`, no gate zero and no norm one."""

    def build(**overrides: Any) -> Any:
        from diffusers import LuminaNextDiT2DModel

        sizes: dict[str, Any] = {"sample_size": 4, "patch_size": 1, "in_channels": 6, "hidden_size": 64}
        sizes |= {"num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 32}
        model = LuminaNextDiT2DModel(**{**sizes, "learn_sigma": False, "cross_attention_dim": 24, **overrides})
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name == "pad_token":
                    p.normal_()  # stock leaves uninitialised memory
                elif p.dim() == 1:
                    p.add_(torch.randn_like(p) * (1.0 if name.endswith("gate") else 0.2))
        return model

    return build


@pytest.fixture
def lumina_call() -> Callable[..., list[Any]]:
    """lumina_call(model, batch, rows, columns, **rope): stock's positional arguments, half of the context masked."""

    def make(model: Any, batch: int = 2, rows: int = 4, columns: int = 4, **rope: float) -> list[Any]:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        config, patch = model.config, model.config.patch_size
        mask = (torch.rand(batch, 5) < 0.5).long()
        mask[:, 0] = 1
        table = get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384, **rope)
        x = torch.randn(batch, config.in_channels, rows * patch, columns * patch)
        return [x, torch.rand(batch) * 1000, torch.randn(batch, 5, config.cross_attention_dim), mask, table, {}]

    return make
