"""The same trained weights in stock diffusers, sampled by a plain loop: the other side of the demo's comparison.

Nothing here uses our kernels, ops or sampler. A BLIP3-o network is diffusers' `LuminaNextDiT2DModel` behind a
two-layer projection of the context (`PixArtAlphaTextProjection`), which is what BLIP3-o's own code builds.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig


class StockBLIP3o(nn.Module):
    """diffusers' modules, assembled as BLIP3-o does.

    forward: hidden_states [B, T, C], timestep [B] as the network sees it, encoder_hidden_states [B, L, E] -> [B, T, C].
    """

    def __init__(self, config: BLIP3oConfig) -> None:
        from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
        from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel

        super().__init__()
        width = config.hidden_size
        context = width if config.context_projection else config.cross_attention_dim
        self.side = config.sample_size
        self.dit = LuminaNextDiT2DModel(
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            hidden_size=width,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_kv_heads or config.num_attention_heads,  # stock fails on None with qk_norm
            multiple_of=config.multiple_of,
            ffn_dim_multiplier=config.ffn_dim_multiplier,
            norm_eps=config.norm_eps,
            learn_sigma=config.learn_sigma,
            qk_norm=config.qk_norm,
            cross_attention_dim=context,
        )
        if config.context_projection:
            self.caption_projection = PixArtAlphaTextProjection(config.cross_attention_dim, hidden_size=width)
        self.freqs_cis = get_2d_rotary_pos_embed_lumina(width // config.num_attention_heads, 384, 384)

    @classmethod
    def with_weights(cls, config: BLIP3oConfig, state_dict: Mapping[str, Tensor]) -> "StockBLIP3o":
        """Load our parameters, whose names are stock's; only the projection sits beside the DiT instead of in it."""
        model = cls(config)
        state = {
            name if name.startswith("caption_projection.") else f"dit.{name}": value
            for name, value in state_dict.items()
        }
        state.setdefault("dit.pad_token", model.dit.pad_token.detach().zero_())  # a parameter that stock never reads
        model.load_state_dict(state, strict=True)
        return model.eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        context = encoder_hidden_states
        if hasattr(self, "caption_projection"):
            context = self.caption_projection(context)
        image = hidden_states.transpose(1, 2).unflatten(2, (self.side, self.side))
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        freqs = self.freqs_cis.to(hidden_states.device)
        out = self.dit(image, timestep, context, mask, freqs, cross_attention_kwargs={}, return_dict=False)[0]
        return out.flatten(2).transpose(1, 2)


@torch.no_grad()
def sample_stock(
    model: StockBLIP3o, condition: Tensor, noise: Tensor, *, num_steps: int, guidance_scale: float
) -> Tensor:
    """Euler from sigma 1 to 0 with classifier-free guidance, as a reader of BLIP3-o's paper would write it.

    condition [B, L, E] and noise [B, T, C], both in the model's own (normalised) space; returns [B, T, C] there.
    """
    x_t, null = noise, torch.zeros_like(condition)
    sigmas = torch.linspace(1, 0, num_steps + 1)
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        timestep = (1000 * sigma).expand(2 * len(x_t))
        v_uncond, v_cond = model(torch.cat([x_t, x_t]), timestep, torch.cat([null, condition])).chunk(2)
        x_t = x_t + (next_sigma - sigma) * (v_uncond + guidance_scale * (v_cond - v_uncond))
    return x_t
