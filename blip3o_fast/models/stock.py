"""The forward that `fuse` gives to diffusers' `LuminaNextDiT2DModel`, over the network's own submodules.

A block takes the fused path only where reading its weights is the same as calling its modules: every container, norm
and attention processor is of the class that diffusers builds it from, which nobody has patched, and has no hook. The
Linear layers may be anything, since one that is not plain is called as a module (an adapter, a quantised or an
offloaded layer). Any other block runs its own forward, as it would without us; `obstacle` says why.

Only modules that are called fire hooks, so hooks for all modules of the process see the network and what runs by
itself. An all-false row of the context mask means "no context", where stock gives NaN.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_fast.models import forward as fused
from blip3o_fast.models import inputs
from blip3o_fast.models.patches import from_tokens
from blip3o_fast.models.rope import rope_from_complex

NETWORK = "LuminaNextDiT2DModel"
_BLOCK = "LuminaNextDiTBlock"
_BASE = "base_sequence_length"

# What stock is built from, filled by `learn`: importing this module imports no diffusers.
_BLOCKS: set[type] = set()
_KINDS: dict[str, type] = {}
# What their instances run when called, by class; None where somebody had replaced it before we came.
_CALLED: dict[type, Any] = {}


def learn(network_class: Any) -> None:
    """Get to know the classes of diffusers, and the block beside this network's class (BLIP3-o has a copy)."""
    from diffusers.models.activations import FP32SiLU
    from diffusers.models.attention import LuminaFeedForward
    from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
    from diffusers.models.embeddings import LuminaCombinedTimestepCaptionEmbedding, TimestepEmbedding, Timesteps
    from diffusers.models.normalization import LuminaLayerNormContinuous, LuminaRMSNormZero, RMSNorm
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock

    _KINDS.update(
        {
            "norm1": LuminaRMSNormZero,
            "norm1.silu": nn.SiLU,
            "attn1": Attention,
            "attn2": Attention,
            "feed_forward": LuminaFeedForward,
            "feed_forward.silu": FP32SiLU,
            "processor": LuminaAttnProcessor2_0,
            "rms_norm": RMSNorm,
            "layer_norm": nn.LayerNorm,
            "time_caption_embed": LuminaCombinedTimestepCaptionEmbedding,
            "time_proj": Timesteps,
            "timestep_embedder": TimestepEmbedding,
            "norm_out": LuminaLayerNormContinuous,
        }
    )
    fused.PLAIN_NORMS.add(RMSNorm)
    _BLOCKS.add(LuminaNextDiTBlock)
    beside = getattr(sys.modules.get(network_class.__module__), _BLOCK, None)
    if isinstance(beside, type):
        _BLOCKS.add(beside)
    for cls in (*_BLOCKS, *_KINDS.values()):
        _CALLED[cls] = _called(cls) if written_with(cls, _called(cls)) else None


def _called(cls: Any) -> Any:
    return cls.forward if issubclass(cls, nn.Module) else cls.__call__


def written_with(cls: type, function: Any) -> bool:
    """Whether a method of cls comes from the package of the class that defines it: others patch classes in place."""
    owner = next(c for c in cls.__mro__ if c.__dict__.get(function.__name__) is function or c is object)
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return home.partition(".")[0] == owner.__module__.partition(".")[0]


def _unpatched(cls: type) -> bool:
    return _called(cls) is _CALLED[cls]


# ---- what may be read instead of being called ------------------------------------------------------------------------


def _as_built(module: Any, kind: str) -> bool:
    expected: Any = _KINDS[kind]
    return type(module) is expected and _unpatched(expected) and fused.untouched(module)


def _rms_norm(norm: Any) -> bool:
    return _as_built(norm, "rms_norm") and norm.weight is not None and fused.dense(norm.weight) and norm.bias is None


def _qk_norm(norm: Any) -> bool:
    """None (no norm), or a LayerNorm with weight and bias."""
    if norm is None:
        return True
    if not _as_built(norm, "layer_norm") or norm.weight is None or norm.bias is None:
        return False
    return fused.dense(norm.weight) and fused.dense(norm.bias)


def obstacle(block: Any) -> str | None:
    """Why a block must run its own forward; None where the fused ops compute the same from its weights."""
    if type(block) not in _BLOCKS:
        return f"it is a {type(block).__name__}"
    if not _unpatched(type(block)):
        return f"the forward of {type(block).__name__} was replaced"
    if not fused.untouched(block) or block._compiled_call_impl is not None:
        return "it has a hook, a forward of its own or is compiled"
    attn1, attn2, norm1, feed_forward = block.attn1, block.attn2, block.norm1, block.feed_forward
    for kind, part in (
        ("norm1", norm1),
        ("norm1.silu", norm1.silu),
        ("attn1", attn1),
        ("attn2", attn2),
        ("feed_forward", feed_forward),
        ("feed_forward.silu", feed_forward.silu),
    ):
        if not _as_built(part, kind):
            return f"{kind} is hooked, patched or is a {type(part).__name__}"
    processor = _KINDS["processor"]
    if type(attn1.processor) is not processor or type(attn2.processor) is not processor:
        return f"its attention processors are {type(attn1.processor).__name__} and {type(attn2.processor).__name__}"
    if not _unpatched(processor):
        return f"the call of {processor.__name__} was replaced"
    for attn in (attn1, attn2):
        if attn.heads != block.gate.shape[0] or attn.scale != block.head_dim**-0.5:
            return "an attention has other heads or another scale than its block"
    norms = (norm1.norm, block.norm2, block.ffn_norm1, block.ffn_norm2, block.norm1_context)
    qk_norms = (attn1.norm_q, attn1.norm_k, attn2.norm_q, attn2.norm_k)
    if not all(_rms_norm(norm) for norm in norms) or not all(_qk_norm(norm) for norm in qk_norms):
        return "a norm is hooked, patched or of another kind"
    if len({norm.eps for norm in norms}) > 1 or len({norm.eps for norm in qk_norms if norm is not None}) > 1:
        return "its norms differ in eps"
    return None if fused.dense(block.gate) else "its gate is no plain parameter"


def readable_time(embed: Any) -> bool:
    """Whether a network's time embedding computes what `forward.embed_condition` computes from its layers."""
    if not _as_built(embed, "time_caption_embed") or not _as_built(embed.time_proj, "time_proj"):
        return False
    time, waves = embed.timestep_embedder, embed.time_proj
    if (waves.num_channels, waves.flip_sin_to_cos, waves.downscale_freq_shift, waves.scale) != (256, True, 0, 1):
        return False
    plain = _as_built(time, "timestep_embedder") and time.cond_proj is None and time.post_act is None
    return plain and _as_built(time.act, "norm1.silu")


def readable_head(norm_out: Any) -> bool:
    """Whether a network's head computes what `forward.head` computes from its layers."""
    if not _as_built(norm_out, "norm_out") or not _as_built(norm_out.silu, "norm1.silu"):
        return False
    norm = norm_out.norm
    return _as_built(norm, "layer_norm") and norm.weight is None and norm.bias is None


# ---- the blocks ------------------------------------------------------------------------------------------------------


class _Blocks:
    """All blocks of one call: each by the fused ops where it can be read, else by its own forward.

    tokens and rotary: the mask of all tokens and the rotary table as stock hands them to its blocks. extra: its
    cross_attention_kwargs; beyond base_sequence_length they are an attention processor's business, so every block then
    runs by itself.
    """

    def __init__(
        self, network: Any, grid: fused.Grid, tokens: Tensor, rotary: Tensor, extra: dict[str, Any], direct: bool
    ) -> None:
        self.network, self.grid, self.tokens, self.rotary, self.extra = network, grid, tokens, rotary, extra
        self.layers = list(network.layers)
        self.direct = [direct and obstacle(layer) is None for layer in self.layers]

    def __call__(self, h: Tensor, y: Tensor, context: Tensor, conditioning: Tensor) -> Tensor:
        network = self.network
        if network.training and network.gradient_checkpointing and torch.is_grad_enabled():
            run = _checkpointing(network)
            for i in range(len(self.layers)):
                h = run(functools.partial(self.one, i), h, y, context, conditioning)
            return h
        normed = modulation = None
        for i, layer in enumerate(self.layers):
            if not self.direct[i]:
                h = self.one(i, h, y, context, conditioning)
                continue
            h, normed, modulation = fused.block_forward(
                layer,
                h,
                conditioning,
                context,
                self.grid,
                normed=normed,
                modulation=modulation,
                following=self.following(i),
            )
        return h

    def following(self, i: int) -> Any:
        """The next block, where its first norm can be made at the end of this one: one launch covers both."""
        if i + 1 == len(self.layers) or not self.direct[i + 1]:
            return None
        layer, after = self.layers[i], self.layers[i + 1]
        same_eps = after.norm1.norm.eps == layer.ffn_norm2.eps
        return after if same_eps and fused.plain_linear(after.norm1.linear) else None

    def one(self, i: int, h: Tensor, y: Tensor, context: Tensor, conditioning: Tensor) -> Tensor:
        """The i-th block alone."""
        layer = self.layers[i]
        if self.direct[i]:
            return fused.block_forward(layer, h, conditioning, context, self.grid)[0]
        mask = self.grid.mask
        if mask is None:
            mask = context.new_ones(context.shape[:2], dtype=torch.bool)
        else:
            # Attending to nothing gives NaN there. Attending to zeros adds the zero it should add.
            empty = ~mask.any(1, keepdim=True)
            context, mask = context.masked_fill(empty.unsqueeze(-1), 0), mask | empty
        return layer(h, self.tokens, self.rotary, context, mask, temb=y, cross_attention_kwargs=self.extra)


def _checkpointing(network: Any) -> Callable[..., Tensor]:
    """What the network was told to checkpoint with: diffusers keeps it beside the switch."""
    given = network.__dict__.get("_gradient_checkpointing_func")
    return functools.partial(checkpoint, use_reentrant=False) if given is None else given


# ---- the network -----------------------------------------------------------------------------------------------------


def predict(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor | None,
    image_rotary_emb: Tensor,
    cross_attention_kwargs: Mapping[str, Any] | None,
) -> Tensor:
    """[B, C, H, W] to [B, out_channels, H, W], with stock's arguments.

    Beyond stock, encoder_mask and cross_attention_kwargs may be None. Raises ValueError where a shape does not fit.
    """
    inputs.check_tensors(
        hidden_states=hidden_states,
        timestep=timestep,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=image_rotary_emb,
    )
    if hidden_states.dim() != 4:
        raise ValueError(f"hidden_states must have shape (B, C, H, W), got {tuple(hidden_states.shape)}")
    extra = dict(cross_attention_kwargs or {})
    base = extra.get(_BASE)
    if base is not None and base < 2:
        raise ValueError(f"{_BASE} must be at least 2, got {base}")
    patch = network.patch_size
    batch, rows, columns = hidden_states.shape[0], hidden_states.shape[2] // patch, hidden_states.shape[3] // patch
    rope = rope_from_complex(image_rotary_emb, rows, columns, hidden_states.device)
    # The corner is cut out before the table moves to the device: stock moves all of its 384 x 384 places.
    h, tokens, _, rotary = network.patch_embedder(hidden_states, image_rotary_emb[:rows, :columns])
    rotary = rotary.to(h.device)

    context = encoder_hidden_states
    if "caption_projection" in network._modules:  # BLIP3-o's network
        context = network.caption_projection(context)
    if readable_time(network.time_caption_embed):
        y = fused.embed_condition(network, timestep.expand(batch), fused.pool_context(context, encoder_mask))
    else:
        weights = context.new_ones(context.shape[:2]) if encoder_mask is None else encoder_mask
        y = network.time_caption_embed(timestep, context, weights)
    conditioning = nn.functional.silu(y)

    grid = fused.Grid(rope, None if encoder_mask is None else encoder_mask.bool(), base)
    blocks = _Blocks(network, grid, tokens, rotary, extra, direct=extra.keys() <= {_BASE})
    h = blocks(h, y, context, conditioning)
    out = fused.head(network, h, conditioning) if readable_head(network.norm_out) else network.norm_out(h, y)
    return from_tokens(out, network, rows, columns, as_tokens=False)
