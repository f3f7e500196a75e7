"""The module tree of stock diffusers' Lumina NextDiT: same names, same shapes, same order, `nn.Parameter` each.

The containers have no forward of their own: `forward.py` runs a block over the fused ops and `eager.py` as stock does,
both over these modules.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_fast.models import forward as fused
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import lay_out

QK_NORM_EPS = 1e-5
HEAD_NORM_EPS = 1e-6
TIME_FREQUENCIES = 256


def _linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """A Linear whose values are not drawn yet: `BLIP3oDiT.reset_parameters` draws them all, in one order."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=torch.get_default_dtype())
    return layer.to_empty(device=torch.get_default_device())


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight with stock's own sequence and roundings; the fused path reads only its weight and eps."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return hidden_states * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


fused.PLAIN_NORMS.add(RMSNorm)


class Attention(nn.Module):
    """Projections and q/k norms of one attention. The block's one output projection lies in attn2.to_out."""

    def __init__(self, config: BLIP3oConfig, context_dim: int, *, output: bool) -> None:
        super().__init__()
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.kv_heads * config.head_dim
        # The norms span all heads together.
        self.norm_q = nn.LayerNorm(query_width, eps=QK_NORM_EPS) if config.qk_norm else None
        self.norm_k = nn.LayerNorm(key_width, eps=QK_NORM_EPS) if config.qk_norm else None
        self.to_q = _linear(config.hidden_size, query_width, bias=False)
        self.to_k = _linear(context_dim, key_width, bias=False)
        self.to_v = _linear(context_dim, key_width, bias=False)
        if output:
            projection = _linear(query_width, config.hidden_size, bias=False)
            self.to_out: nn.Module = nn.ModuleList([projection, nn.Dropout(0.0)])
        else:
            self.to_out = nn.Identity()


class FeedForward(nn.Module):
    """SwiGLU: linear_2(silu(linear_1(x)) * linear_3(x))."""

    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        self.linear_1 = _linear(config.hidden_size, config.ffn_dim, bias=False)
        self.linear_2 = _linear(config.ffn_dim, config.hidden_size, bias=False)
        self.linear_3 = _linear(config.hidden_size, config.ffn_dim, bias=False)


class AdaptiveNorm(nn.Module):
    """The block's first norm and the Linear that gives scale_msa, gate_msa, scale_mlp, gate_mlp from silu(y)."""

    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        self.linear = _linear(config.conditioning_dim, 4 * config.hidden_size, bias=True)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class NextDiTBlock(nn.Module):
    """Self-attention and gated cross-attention over one query input, then SwiGLU; sandwich norms, tanh gates."""

    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        self.head_dim = config.head_dim
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.attn1 = Attention(config, dim, output=False)
        self.attn2 = Attention(config, config.context_dim, output=True)
        self.feed_forward = FeedForward(config)
        self.norm1 = AdaptiveNorm(config)
        self.ffn_norm1 = RMSNorm(dim, eps)
        self.norm2 = RMSNorm(dim, eps)
        self.ffn_norm2 = RMSNorm(dim, eps)
        self.norm1_context = RMSNorm(config.context_dim, eps)
        lay_out(self)

    def forward(
        self,
        hidden_states: Tensor,
        y: Tensor,
        context: Tensor,
        grid: fused.Grid,
        conditioning: Tensor | None = None,
        normed: Tensor | None = None,
        modulation: tuple[Tensor, ...] | None = None,
        following: "NextDiTBlock | None" = None,
        key_value: tuple[Tensor, Tensor] | None = None,
        following_modulation: tuple[Tensor, ...] | None = None,
    ) -> Any:
        """hidden_states [B, T, D], y [B, A], context [B, L, E'] -> [B, T, D].

        conditioning is silu(y). With `following` (the next block, where it lets its first norm be made here) the
        result is (hidden_states, its normed, its modulation), to be handed to it. key_value: this block's
        cross-attention keys and values, where they were made before (`PreparedCondition`); modulation and
        following_modulation: this block's and the next one's, likewise (`StepModulations`).
        """
        if not fused.fusable(self):
            return fused.unfused_block(self, hidden_states, y, context, grid)
        if conditioning is None:
            conditioning = nn.functional.silu(y)
        result = fused.block_forward(
            self,
            hidden_states,
            conditioning,
            context,
            grid,
            normed=normed,
            modulation=modulation,
            following=following,
            key_value=key_value,
            following_modulation=following_modulation,
        )
        return result[0] if following is None else result

    # What replaces the storage of parameters ends with the weights side by side again.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NextDiTBlock":
        super()._apply(fn, recurse)
        lay_out(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # deepcopy and pickle come through here
        lay_out(self)


class PatchEmbedder(nn.Module):
    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        self.proj = _linear(config.patch_size**2 * config.in_channels, config.hidden_size, bias=True)


class TwoLinear(nn.Module):
    """linear_1 and linear_2: the context projection (gelu between them) and the time embedding (silu)."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = _linear(in_features, hidden, bias=True)
        self.linear_2 = _linear(hidden, hidden, bias=True)


class TimeContextEmbedding(nn.Module):
    """y: an MLP of the time's sinusoids plus LayerNorm and Linear of the pooled context."""

    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        self.timestep_embedder = TwoLinear(TIME_FREQUENCIES, config.conditioning_dim)
        self.caption_embedder = nn.Sequential(
            nn.LayerNorm(config.context_dim), _linear(config.context_dim, config.conditioning_dim, bias=True)
        )


class Head(nn.Module):
    """linear_2(layer_norm(h) * (1 + linear_1(silu(y))))."""

    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        self.linear_1 = _linear(config.conditioning_dim, config.hidden_size, bias=True)
        self.norm = nn.LayerNorm(config.hidden_size, eps=HEAD_NORM_EPS, elementwise_affine=False)
        self.linear_2 = _linear(config.hidden_size, config.patch_size**2 * config.out_channels, bias=True)
