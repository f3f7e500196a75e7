"""A network of diffusers or BLIP3-o as a `BLIP3oDiT`, for the sampler: the same weights, held once.

The sampler makes what does not change during a run once, which a stock forward has no way to be given. So the module
tree of `BLIP3oDiT` is put around the network's own layers: every Linear and norm is the very module, so the parameters
are the same objects, and an adapter in it, a cast or a load of the network is seen here too.
"""

import math
from typing import Any

import torch
from torch import nn

from blip3o_fast.models import forward as fused
from blip3o_fast.models import fuse, stock
from blip3o_fast.models.config import ALIASES, BLIP3oConfig
from blip3o_fast.models.layout import lay_out, tied
from blip3o_fast.models.modules import HEAD_NORM_EPS, QK_NORM_EPS
from blip3o_fast.models.rope import kept_rope_table, rope_from_complex

WRAPPER = "NextDiTCrossAttn"
# What a config may say beside the sizes; BLIP3-o's names are read where the object has no other.
_TOLD = ("scaling_factor", "time_convention", "prediction_type", "schedule", "sigma_min", "sigma_max")


def stock_network(x: Any) -> Any | None:
    """The network that x is, wraps (BLIP3-o's `NextDiTCrossAttn`) or has as its transformer (a pipeline), else None.

    A compiled network counts: it is one, and `from_stock` says what to do about it.
    """
    inner = x
    if not isinstance(x, nn.Module):
        inner = getattr(x, "transformer", None)
    elif type(x).__name__ == WRAPPER:
        inner = x._modules.get("model")
    plain = getattr(inner, "_orig_mod", inner)
    return inner if isinstance(plain, nn.Module) and fuse.is_network(plain) else None


def from_stock(cls: Any, x: Any) -> Any:
    """See `BLIP3oDiT.from_stock`."""
    network = stock_network(x)
    if network is None:
        raise ValueError(
            f"x must be diffusers' {stock.NETWORK}, a pipeline with one as its transformer, or BLIP3-o's {WRAPPER}; "
            f"got {type(x).__name__}"
        )
    reason = _refusal(network) or (None if network is x else _wrapper_refusal(x))
    if reason is not None:
        raise ValueError(f"{type(network).__name__} cannot be read: {reason}")
    config = _config(network, x)
    with torch.device("meta"):
        model = cls(config)
    for name, module in list(model.named_modules()):
        if not module._parameters:
            continue
        theirs = network.get_submodule(name)
        if module._modules:
            # A block with its gate, the network with its pad_token. They are read where the network has them: one that
            # is exchanged (`load_state_dict(assign=True)`) is exchanged here.
            for own in module._parameters:
                theirs.get_parameter(own)
            module._parameters = theirs._parameters
        else:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, theirs)
    keep = tied(network)
    for layer in model.layers:
        lay_out(layer, keep)
    shared = {id(module) for module in network.modules()}
    for module in model.modules():
        if id(module) not in shared:  # the network's own stay in the mode that each is in
            module.training = network.training
    return model


def is_current(model: Any, x: Any) -> bool:
    """Whether a model that `from_stock` made of x has the layers that x has now.

    One that was put in the place of another (an adapter) is not seen through the model. ValueError where x has become
    what cannot be read (hooked, compiled).
    """
    network = stock_network(x)
    if network is None:
        raise ValueError(f"the {type(x).__name__} has no network any more")
    reason = _refusal(network) or (None if network is x else _wrapper_refusal(x))
    if reason is not None:
        raise ValueError(f"the {type(x).__name__} cannot be read any more: {reason}")
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == {
        name: id(p) for name, p in network.named_parameters(remove_duplicate=False)
    } and all(
        model.get_submodule(name) is module
        for name, module in network.named_modules()
        if module._parameters and not module._modules
    )


# ---- what cannot be read ---------------------------------------------------------------------------------------------


def _refusal(network: Any) -> str | None:
    """Why running our forward over the network's layers would not be the network."""
    if hasattr(network, "_orig_mod") or network._compiled_call_impl is not None:
        return "it is compiled (torch.compile): give the model that was compiled"
    reason = fuse.refusal(network)
    if reason is not None:
        return f"it {reason}"
    stock.learn(fuse.named_base(type(network)) or type(network))
    if not fused.untouched(network):
        return "it has a hook as a whole: remove it, or drive the network by hand"
    for i, layer in enumerate(network.layers):
        if (reason := stock.obstacle(layer)) is not None:
            return f"layers.{i}: {reason}"
        if layer.attn1.norm_q is not None and layer.attn1.norm_q.eps != QK_NORM_EPS:
            return f"layers.{i}: its norms of queries and keys have eps {layer.attn1.norm_q.eps}"
    projection = network._modules.get("caption_projection")
    if projection is not None and getattr(projection.act_1, "approximate", None) != "tanh":
        return f"caption_projection has another activation, {projection.act_1}"
    for part in ("patch_embedder", "caption_projection"):
        module = network._modules.get(part)
        if module is not None and not fused.untouched(module):
            return f"{part} has a hook or a forward of its own"
    if not stock.readable_time(network.time_caption_embed):
        return "time_caption_embed is hooked or of another kind"
    if not stock.readable_head(network.norm_out) or network.norm_out.norm.eps != HEAD_NORM_EPS:
        return "norm_out is hooked or of another kind"
    return None


def _wrapper_refusal(x: Any) -> str | None:
    if isinstance(x, nn.Module) and not fused.untouched(x):
        return f"the {type(x).__name__} around it has a hook or a forward of its own"
    table = getattr(x, "freqs_cis", None)
    if not isinstance(table, torch.Tensor) or table.is_meta:
        return None
    head_dim, side = x.model.head_dim, min(16, *table.shape[:2])
    ours = kept_rope_table(side, side, head_dim, torch.device("cpu"))
    theirs = rope_from_complex(table, side, side, torch.device("cpu"))
    same = ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5)
    return None if same else "the rotary table around it (freqs_cis) is not the usual one"


# ---- its config ------------------------------------------------------------------------------------------------------


def _told(config: Any) -> dict[str, Any]:
    """What a config object of diffusers (a mapping) or transformers (attributes) says, by our names."""
    values: dict[str, Any] = dict(config) if hasattr(config, "keys") else dict(getattr(config, "__dict__", {}))
    return {ALIASES.get(name, name): value for name, value in values.items()}


def _config(network: Any, x: Any) -> BLIP3oConfig:
    """The sizes from the layers themselves, which cannot be wrong; what layers do not tell from the two configs."""
    told = _told(getattr(network, "config", {}))
    if network is not x and isinstance(x, nn.Module):
        told |= _told(getattr(x, "config", {}))
    projection = network._modules.get("caption_projection")
    block, patch = network.layers[0], network.patch_size
    hidden, ffn = network.patch_embedder.proj.out_features, block.feed_forward.linear_1.out_features
    channels = network.patch_embedder.proj.in_features // patch**2
    fields: dict[str, Any] = {
        "sample_size": told.get("sample_size", 8),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "num_layers": len(network.layers),
        "num_attention_heads": block.gate.shape[0],
        "num_kv_heads": block.attn1.to_k.out_features // block.head_dim,
        "norm_eps": block.norm2.eps,
        "learn_sigma": network.norm_out.linear_2.out_features == 2 * channels * patch**2,
        "qk_norm": block.attn1.norm_q is not None,
        "cross_attention_dim": (block.attn2.to_k if projection is None else projection.linear_1).in_features,
        "context_projection": projection is not None,
        "time_convention": "lumina" if projection is None else "blip3o",
        "condition_dropout": told.get("condition_dropout"),
        **_ffn_rule(told, hidden, ffn),
    }
    return BLIP3oConfig(**fields | {name: told[name] for name in _TOLD if name in told})


def _ffn_rule(told: dict[str, Any], hidden: int, ffn: int) -> dict[str, Any]:
    """Values of the rule for the feed-forward's width (`BLIP3oConfig.ffn_dim`) that give ffn: those of the config,
    unless it is of a build where another version of the library made another width of them."""
    inner = int(8 * hidden / 3)
    for multiple_of, multiplier in (
        (told.get("multiple_of", 256), told.get("ffn_dim_multiplier")),
        (256, 1.5),
    ):
        base = inner if multiplier is None else int(multiplier * inner)
        if multiple_of * math.ceil(base / multiple_of) == ffn:
            return {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    return {"multiple_of": ffn, "ffn_dim_multiplier": min(1.0, ffn / inner)}


def as_ours(model: Any) -> Any:
    """What the sampler drives: a stock network as a `BLIP3oDiT` over its own layers, any other model as it is."""
    from blip3o_fast.models.nextdit import BLIP3oDiT

    if isinstance(model, BLIP3oDiT) or stock_network(model) is None:
        return model
    return BLIP3oDiT.from_stock(model)
