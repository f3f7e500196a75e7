"""`BLIP3oDiT.from_stock`: our model over the very layers of diffusers' and BLIP3-o's networks, or a refusal."""

import copy
import types
from typing import Any

import pytest
import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

from blip3o_fast import BLIP3oDiT, fuse
from blip3o_fast.models.adopt import as_ours

TINY: dict[str, Any] = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 6,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 32,
    "learn_sigma": False,
    "cross_attention_dim": 24,
}


def build(**overrides: Any) -> Any:
    network = LuminaNextDiT2DModel(**{**TINY, **overrides}).eval()
    with torch.no_grad():
        network.pad_token.normal_()
        for name, p in network.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * (1.0 if name.endswith("gate") else 0.2))
    return network


def agree(network: Any, ours: BLIP3oDiT) -> None:
    config = ours.config
    side = config.sample_size
    x, time = torch.randn(2, config.in_channels, side, side), torch.rand(2)
    context, mask = torch.randn(2, 5, config.cross_attention_dim), torch.ones(2, 5, dtype=torch.int64)
    rope = get_2d_rotary_pos_embed_lumina(config.head_dim, 384, 384)
    with torch.no_grad():
        expected = network(x, time, context, mask, rope, {}).sample
        assert (ours(x, time, context) - expected).abs().max() <= 1e-5


SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patch 2, twice the channels": {"patch_size": 2, "learn_sigma": True},
    "no norms of q and k": {"qk_norm": False},
    "another width inside": {"ffn_dim_multiplier": 0.7, "multiple_of": 8, "norm_eps": 1e-4},
}


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_are_exchanged_are_seen(fused: bool) -> None:
    """assign=True puts other parameters in their place, gates and pad_token included."""
    network, other = build(), build()
    ours = BLIP3oDiT.from_stock(fuse(network) if fused else network)
    network.load_state_dict(other.state_dict(), assign=True)
    theirs = dict(network.named_parameters())
    assert all(p is theirs[name] for name, p in ours.named_parameters())
    agree(other, ours)


def test_weights_in_one_memory_stay_so() -> None:
    network = build()
    one, two = network.layers[0].attn2.to_k, network.layers[1].attn2.to_k
    two.weight = nn.Parameter(one.weight.data)  # another parameter of the same memory
    agree(network, BLIP3oDiT.from_stock(network))
    assert one.weight.data_ptr() == two.weight.data_ptr()


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_the_network(changes: dict[str, Any], fused: bool) -> None:
    stock = build(**changes)
    network = fuse(copy.deepcopy(stock)) if fused else stock
    ours = BLIP3oDiT.from_stock(network)
    theirs = dict(network.named_parameters())
    assert list(theirs) == [name for name, _ in ours.named_parameters()]
    assert all(p is theirs[name] for name, p in ours.named_parameters())
    assert ours.config.time_convention == "lumina" and not ours.training
    for name, value in stock.config.items():
        if not name.startswith("_"):
            assert getattr(ours.config, name) == value, name
    agree(stock, ours)


def test_what_changes_the_network_changes_ours() -> None:
    network = build()
    ours = BLIP3oDiT.from_stock(network)
    network.load_state_dict(build().state_dict())
    agree(network, ours)
    network.double()
    theirs = dict(network.named_parameters())
    assert ours.dtype == torch.float64 and all(p is theirs[name] for name, p in ours.named_parameters())
    network.float().layers[1].feed_forward.linear_1.register_forward_hook(lambda module, args, out: 2 * out)
    agree(network, ours)


@pytest.mark.parametrize("width", [4864, 7168, 300, 100])
def test_a_width_that_its_config_does_not_give(width: int) -> None:
    """BLIP3-o's builds have 7168 where their config says 4864."""
    hidden = 1792 if width > 1000 else 64
    with torch.device("meta"):
        network = LuminaNextDiT2DModel(
            **{**TINY, "hidden_size": hidden, "num_layers": 1, "num_attention_heads": hidden // 16, "multiple_of": 256}
        )
        ffn = network.layers[0].feed_forward
        ffn.linear_1, ffn.linear_3 = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        ffn.linear_2 = nn.Linear(width, hidden, bias=False)
    config = BLIP3oDiT.from_stock(network).config
    assert config.ffn_dim == width
    if width > 1000:
        assert (config.multiple_of, config.ffn_dim_multiplier) == (256, 1.5 if width == 7168 else None)


def test_the_config_says_what_layers_cannot() -> None:
    """diffusers hands fields on that it does not know, so a network trained here keeps its convention there."""
    network = build()
    network.register_to_config(time_convention="blip3o", sigma_min=0.1, _condition_dropout=0.0)
    config = BLIP3oDiT.from_stock(network).config
    assert (config.time_convention, config.sigma_min, config.condition_dropout) == ("blip3o", 0.1, 0.0)


# ---- what is given and what is refused -------------------------------------------------------------------------------


class NextDiTCrossAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build()
        self.freqs_cis = get_2d_rotary_pos_embed_lumina(16, 384, 384)


def hooked(part: str) -> Any:
    network = build()
    network.get_submodule(part).register_forward_hook(lambda *args: None)
    return network


def replaced() -> Any:
    network = build()
    network.forward = lambda *args: None
    return network


def other_table() -> Any:
    wrapper = NextDiTCrossAttn()
    wrapper.freqs_cis = get_2d_rotary_pos_embed_lumina(16, 384, 384, linear_factor=2.0)
    return wrapper


def other_processor() -> Any:
    network = build()
    network.layers[1].attn2.processor = type("Mine", (), {})()
    return network


REFUSED: dict[str, tuple[Any, str]] = {
    "a Linear": (lambda: nn.Linear(2, 2), "x must be diffusers' LuminaNextDiT2DModel, .* got Linear"),
    "compiled": (lambda: torch.compile(build()), "cannot be read: it is compiled"),
    "replaced": (replaced, "cannot be read: it has a forward of its own"),
    "hooked": (lambda: hooked(""), "cannot be read: it has a hook as a whole"),
    "hooked block": (lambda: hooked("layers.1"), "cannot be read: layers.1: it has a hook"),
    "hooked norm": (lambda: hooked("layers.0.norm2"), "cannot be read: layers.0: a norm is hooked"),
    "hooked time": (lambda: hooked("time_caption_embed.timestep_embedder"), "time_caption_embed is hooked"),
    "hooked head": (lambda: hooked("norm_out"), "norm_out is hooked"),
    "hooked patches": (lambda: hooked("patch_embedder"), "patch_embedder has a hook"),
    "processor": (other_processor, "cannot be read: layers.1: its attention processors are .* and Mine"),
    "another table": (other_table, r"cannot be read: the rotary table around it \(freqs_cis\)"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLIP3oDiT.from_stock(make())


def test_what_the_sampler_takes_for_one() -> None:
    network, pipeline = build(), types.SimpleNamespace(transformer=build())
    for given, inner in ((network, network), (pipeline, pipeline.transformer)):
        assert as_ours(given).patch_embedder.proj is inner.patch_embedder.proj
    wrapper = NextDiTCrossAttn()
    assert as_ours(wrapper).layers[0].gate is wrapper.model.layers[0].gate
    for other in (as_ours(network), nn.Sequential(network), nn.Linear(2, 2), types.SimpleNamespace(config=1)):
        assert as_ours(other) is other, "a module around one may do anything with it"
