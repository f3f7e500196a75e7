"""`sample` and `Sampler` of a network that is not ours: the samples of diffusers' scheduler driven by hand."""

import types
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from blip3o_fast import fuse, sample
from blip3o_fast.sampling import Sampler
from blip3o_fast.sampling.prepared import PreparedModel

STEPS, SIDE, CHANNELS, SCALE = 10, 4, 6, 3.0
SIZES: dict[str, Any] = {
    "sample_size": SIDE,
    "patch_size": 1,
    "in_channels": CHANNELS,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "multiple_of": 32,
    "learn_sigma": False,
}


class BLIP3oNetwork(LuminaNextDiT2DModel):
    """BLIP3-o's edited copy: a projection of the context first, no pad_token."""

    def __init__(self, context: int) -> None:
        super().__init__(**SIZES, cross_attention_dim=SIZES["hidden_size"])
        del self.pad_token
        self.caption_projection = PixArtAlphaTextProjection(context, SIZES["hidden_size"])

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        image_rotary_emb: Tensor,
        cross_attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> Any:
        context = self.caption_projection(encoder_hidden_states)
        return super().forward(
            hidden_states, timestep, context, encoder_mask, image_rotary_emb, cross_attention_kwargs, return_dict
        )


BLIP3oNetwork.__name__ = "LuminaNextDiT2DModel"


class NextDiTCrossAttn(nn.Module):
    """BLIP3-o's wrapper: raw features as the context, an all-ones mask and the whole rotary table in every call."""

    def __init__(self, context: int = 24) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(
            model_type="nextdit-crossattn", input_size=SIDE, dim=64, n_heads=2, latent_embedding_size=context
        )
        self.model = BLIP3oNetwork(context)
        self.freqs_cis = get_2d_rotary_pos_embed_lumina(32, 384, 384)

    def forward(self, x: Tensor, timestep: Tensor, z_latents: Tensor, **kwargs: Any) -> Tensor:
        mask = torch.ones(z_latents.shape[:2], device=z_latents.device)
        return self.model(x, timestep, z_latents, mask, self.freqs_cis, {}).sample


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("pad_token"):
                p.normal_()
            elif p.dim() == 1:
                p.add_(torch.randn_like(p) * (1.0 if name.endswith("gate") else 0.2))
    return model.eval()


def lumina(learn_sigma: bool = False) -> Any:
    sizes = SIZES | {"learn_sigma": learn_sigma, "cross_attention_dim": 24}
    return randomised(LuminaNextDiT2DModel(**sizes))


@torch.no_grad()
def by_hand(network: Any, condition: Tensor, noise: Tensor) -> Tensor:
    """The loop of BLIP3-o's `sample_images` over diffusers' scheduler and the network's own forward."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / STEPS, STEPS))
    context = torch.cat([torch.zeros_like(condition), condition])
    rope = get_2d_rotary_pos_embed_lumina(32, 384, 384)
    latents = noise.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    for timestep in scheduler.timesteps:
        both, time = torch.cat([latents, latents]), timestep.expand(2 * len(latents))
        if isinstance(network, NextDiTCrossAttn):
            velocity = network(both, time, context)
        else:  # 1 - sigma, and from noise to data: as LuminaPipeline has it
            mask = torch.ones(context.shape[:2], dtype=torch.int64)
            velocity = -network(both, 1 - time / 1000, context, mask, rope, {}).sample[:, :CHANNELS]
        null, conditional = velocity.chunk(2)
        latents = scheduler.step(null + SCALE * (conditional - null), timestep, latents).prev_sample
    return latents.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("kind", ["lumina", "learn_sigma", "blip3o"])
def test_the_samples_are_those_of_the_scheduler(kind: str, fused: bool) -> None:
    network = randomised(NextDiTCrossAttn()) if kind == "blip3o" else lumina(kind == "learn_sigma")
    condition, noise = torch.randn(2, 5, 24), torch.randn(2, SIDE**2, CHANNELS)
    expected = by_hand(network, condition, noise)
    given = fuse(network) if fused else network
    before = {name: (id(p), p.clone()) for name, p in network.named_parameters()}
    sampler = Sampler(given)
    for draw in (sampler, lambda *args, **kwargs: sample(given, *args, **kwargs)):
        found = draw(condition, num_steps=STEPS, guidance_scale=SCALE, noise=noise)
        assert expected.abs().max() > 1 and (found - expected).abs().max() <= 1e-4
    assert all((id(p), True) == (before[n][0], torch.equal(p, before[n][1])) for n, p in network.named_parameters())
    assert {id(p) for p in sampler._network.parameters()} == {id(p) for p in network.parameters()}, "held once"


def test_it_is_driven_as_our_own_model_is() -> None:
    """Packed weights, the condition made once, modulations before their steps; a pipeline's transformer too."""
    pipeline = types.SimpleNamespace(transformer=lumina())
    sampler, condition, noise = Sampler(pipeline), torch.randn(2, 5, 24), torch.randn(2, SIDE**2, CHANNELS)
    network = sampler._network
    assert isinstance(network, PreparedModel) and sampler.memory(2) > 0
    if network.storage is not None:  # where the C++ extension is built
        assert network.packed_bytes > 0 and all(network._packed)
    calls = []
    hook = pipeline.transformer.layers[0].attn2.to_k.register_forward_hook(lambda *args: calls.append(args))
    found = sampler(condition, num_steps=STEPS, guidance_scale=SCALE, noise=noise)
    assert len(calls) == 1, "keys of the context are made once, by the hooked layer itself"
    hook.remove()
    assert (found - by_hand(pipeline.transformer, condition, noise)).abs().max() <= 1e-4


def test_a_changed_weight_of_the_network_is_noticed() -> None:
    network = lumina()
    sampler, condition, noise = Sampler(network), torch.randn(1, 5, 24), torch.randn(1, SIDE**2, CHANNELS)
    call: dict[str, Any] = {"num_steps": STEPS, "guidance_scale": SCALE, "noise": noise}
    before = sampler(condition, **call)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    after = sampler(condition, **call)
    assert (after - before).abs().max() > 1e-2
    assert (after - by_hand(network, condition, noise)).abs().max() <= 1e-4


class Twice(nn.Module):
    """An adapter around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_a_layer_that_takes_the_place_of_another_is_noticed() -> None:
    network = lumina()
    sampler, condition, noise = Sampler(network), torch.randn(2, 5, 24), torch.randn(2, SIDE**2, CHANNELS)
    before = sampler(condition, noise=noise, num_steps=2)
    network.layers[0].attn1.to_v = Twice(network.layers[0].attn1.to_v)
    after = sampler(condition, noise=noise, num_steps=2)
    fresh = Sampler(network)(condition, noise=noise, num_steps=2)
    assert torch.equal(after, fresh) and (after - before).abs().max() > 0.01
    hook = network.layers[0].register_forward_hook(lambda module, args, result: result * 0)
    with pytest.raises(ValueError, match=r"cannot be read any more: layers\.0: it has a hook"):
        sampler(condition, noise=noise, num_steps=2)
    hook.remove()
    assert torch.equal(sampler(condition, noise=noise, num_steps=2), after)


def test_the_mode_of_a_part_is_its_own() -> None:
    network = lumina()
    network.layers[0].attn1.to_q.train()
    Sampler(network)
    assert network.layers[0].attn1.to_q.training and not network.layers[0].attn1.to_k.training


def test_what_cannot_be_read_is_refused_at_the_door() -> None:
    network = lumina()
    network.layers[1].register_forward_hook(lambda *args: None)
    for door in (Sampler, lambda model: sample(model, torch.zeros(1, 5, 24))):
        with pytest.raises(ValueError, match="cannot be read: layers.1: it has a hook"):
            door(network)
