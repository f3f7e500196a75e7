"""What `BLIP3oDiT` promises beside equality with diffusers: forms, masks, errors, precision, initial weights."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import adjacent, projection_groups
from blip3o_fast.models.nextdit import BLIP3oDiT

TINY = BLIP3oConfig.preset("tiny")


@pytest.fixture
def model() -> BLIP3oDiT:
    net = BLIP3oDiT(TINY)
    with torch.no_grad():
        for block in net.layers:
            block.gate.normal_()
    return net


def arguments(batch: int = 2, context: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, 64, 16, dtype=dtype),
        torch.rand(batch) * 1000,
        torch.randn(batch, context, 24, dtype=dtype),
    )


# ---- forms, masks, edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [1, 2])
def test_tokens_and_images_are_the_same_thing(patch_size: int) -> None:
    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", patch_size=patch_size, learn_sigma=True))
    tokens, timestep, context = arguments()
    image = tokens.transpose(1, 2).reshape(2, 16, 8, 8)
    out = net(tokens, timestep, context)
    assert out.shape == (2, 64, 32)
    assert torch.equal(out.transpose(1, 2).reshape(2, 32, 8, 8), net(image, timestep, context))


def test_one_time_for_all_samples(model: BLIP3oDiT) -> None:
    tokens, _, context = arguments()
    expected = model(tokens, torch.tensor([500.0, 500.0]), context)
    for timestep in (torch.tensor(500.0), torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])):
        assert torch.equal(model(tokens, timestep, context), expected)


def test_a_full_mask_is_no_mask(model: BLIP3oDiT) -> None:
    call = arguments()
    ones = torch.ones(2, 5)
    torch.testing.assert_close(model(*call, ones.bool()), model(*call), atol=1e-6, rtol=0)
    assert torch.equal(model(*call, ones.bool()), model(*call, ones.int()))


def test_masked_tokens_do_not_matter(model: BLIP3oDiT) -> None:
    tokens, timestep, context = arguments()
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    expected = model(tokens, timestep, context, mask)
    context[0, 2], context[0, 4] = 1e4, -7.0
    assert torch.equal(model(tokens, timestep, context, mask), expected)


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "unfused"])
@pytest.mark.parametrize("projection", [True, False])
def test_a_mask_without_any_token_is_no_context(projection: bool, hooked: bool) -> None:
    """Cross-attention adds zero and the pooled context is zero; the other samples are as ever."""
    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", context_projection=projection))
    with torch.no_grad():
        for block in net.layers:
            block.gate.normal_()
    if hooked:
        for block in net.layers:
            block.norm2.register_forward_hook(lambda *_: None)
    call = arguments()
    mask = torch.tensor([[False] * 5, [True, True, False, False, True]])
    out = net(*call, mask)
    alone = net(*(value[1:] for value in call), mask[1:])
    torch.testing.assert_close(out[1:], alone, atol=1e-6, rtol=0)

    # no cross-attention at all is what a closed gate gives; pooling is the embedder's answer to zeros
    without = copy.deepcopy(net)
    embedder = net.time_caption_embed.caption_embedder
    pooled = embedder(torch.zeros(1, net.config.context_dim))
    without.time_caption_embed.caption_embedder.register_forward_hook(lambda *_: pooled)
    with torch.no_grad():
        for block in without.layers:
            block.gate.zero_()
    expected = without(*(value[:1] for value in call))
    torch.testing.assert_close(out[:1], expected, atol=1e-6, rtol=0)

    grads = torch.autograd.grad(out, [p for p in net.parameters() if p.requires_grad], torch.randn_like(out))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_no_samples(model: BLIP3oDiT) -> None:
    out = model(*arguments(batch=0))
    assert out.shape == (0, 64, 16)
    out.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {0: torch.zeros(2, 63, 16)},
            r"hidden_states must have shape \(B, N, C\) = \(B, 64, 16\), .* got \(2, 63, 16\)",
        ),
        ({0: torch.zeros(2, 64, 17)}, r"got \(2, 64, 17\)"),
        ({0: torch.zeros(2, 17, 8, 8)}, r"with C = 16 .* got \(2, 17, 8, 8\)"),
        ({0: torch.zeros(64, 16)}, r"got \(64, 16\)"),
        ({1: 0.5}, "timestep must be a tensor, got float"),
        ({2: None}, "encoder_hidden_states must be a tensor, got NoneType"),
        ({3: [True]}, "encoder_mask must be a tensor, got list"),
        ({1: torch.zeros(3)}, r"timestep must have shape \(B,\) = \(2,\) or \(\), got \(3,\)"),
        ({1: torch.zeros(2, 1)}, r"timestep must have shape .* got \(2, 1\)"),
        ({2: torch.zeros(2, 5, 25)}, r"encoder_hidden_states .* = \(2, L >= 1, 24\), got \(2, 5, 25\)"),
        ({2: torch.zeros(2, 0, 24)}, r"encoder_hidden_states .* got \(2, 0, 24\)"),
        ({2: torch.zeros(1, 5, 24)}, r"encoder_hidden_states .* got \(1, 5, 24\)"),
        ({3: torch.ones(2, 6)}, r"encoder_mask must have shape \(B, L\) = \(2, 5\), got \(2, 6\)"),
        ({0: torch.zeros(2, 64, 16).bfloat16()}, "hidden_states must have the weights' dtype torch.float32, got"),
        ({2: torch.zeros(2, 5, 24).double()}, "encoder_hidden_states must have the weights' dtype"),
    ],
)
def test_refuses(change: dict[int, Any], message: str, model: BLIP3oDiT) -> None:
    call: list[Any] = [*arguments(), None]
    for position, value in change.items():
        call[position] = value
    with pytest.raises(ValueError, match=message):
        model(*call)


def test_refuses_bad_options(model: BLIP3oDiT) -> None:
    with pytest.raises(ValueError, match="base_sequence_length must be at least 2, got 1"):
        model(*arguments(), base_sequence_length=1)
    with pytest.raises(ValueError, match="image_rotary_emb must be complex of shape"):
        model(*arguments(), image_rotary_emb=torch.zeros(4, 4, 16, dtype=torch.complex64))
    with pytest.raises(ValueError, match="config must be a BLIP3oConfig or a dict"):
        BLIP3oDiT(64)  # type: ignore[arg-type]
    patched = BLIP3oDiT(BLIP3oConfig.preset("tiny", patch_size=2, in_channels=4))
    with pytest.raises(ValueError, match="multiples of patch_size 2"):
        patched(torch.zeros(1, 4, 8, 7), torch.zeros(1), torch.zeros(1, 5, 24))


def test_autocast_is_that_of_stock(stock_pair: Any, inputs: Any) -> None:
    stock, ours = stock_pair(TINY)
    call = inputs(TINY)
    gold = stock.double()(*(value.double() if value.dim() > 1 else value for value in call))
    stock = stock.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(*call), stock(*call)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out - gold).norm() <= 2 * (expected - gold).norm() + torch.finfo(torch.bfloat16).eps / 4 * gold.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_stock(dtype: torch.dtype, stock_pair: Any, inputs: Any) -> None:
    stock, ours = stock_pair(TINY)
    call = inputs(TINY)
    gold = stock.double()(*(value.double() if value.dim() > 1 else value for value in call))
    half = [value.to(dtype) if value.dim() > 1 else value for value in call]
    expected, out = stock.to(dtype)(*half), ours.to(dtype)(*half)
    assert out.dtype == dtype
    error, allowed = (out - gold).norm(), 2 * (expected - gold).norm() + torch.finfo(dtype).eps / 4 * gold.norm()
    assert error <= allowed


def test_same_inputs_same_bits(model: BLIP3oDiT) -> None:
    call = arguments()
    results = []
    for _ in range(2):
        out = model(*call)
        grads = torch.autograd.grad(out, list(model.parameters()), torch.ones_like(out))
        results.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- initial weights ------------------------------------------------------------------------------------------------


def test_weights_of_a_seed_are_those_of_stock() -> None:
    from diffusers import LuminaNextDiT2DModel

    config = BLIP3oConfig.preset(
        "tiny", context_projection=False, num_attention_heads=4, num_kv_heads=2, time_convention="lumina"
    )
    fields = {k: v for k, v in config.to_stock_dict().items() if not k.startswith("_")}
    torch.manual_seed(7)
    stock = LuminaNextDiT2DModel(**fields)
    torch.manual_seed(7)
    ours = BLIP3oDiT(config)
    assert list(ours.state_dict()) == list(stock.state_dict()), "names and their order"
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for name, value in ours.state_dict().items():
        if name != "pad_token":
            assert torch.equal(value, stock.state_dict()[name]), name


def test_a_generator_draws_the_weights() -> None:
    before = torch.get_rng_state()
    first = BLIP3oDiT(TINY, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    again = BLIP3oDiT(TINY, generator=torch.Generator().manual_seed(1))
    other = BLIP3oDiT(TINY, generator=torch.Generator().manual_seed(2))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.dim() == 2:
            assert not torch.equal(a, c), name
    torch.manual_seed(1)
    assert torch.equal(BLIP3oDiT(TINY).patch_embedder.proj.weight, first.patch_embedder.proj.weight)


def test_from_meta_to_weights() -> None:
    with torch.device("meta"):
        net = BLIP3oDiT(TINY)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    net.reset_parameters(torch.Generator().manual_seed(3))
    expected = BLIP3oDiT(TINY, generator=torch.Generator().manual_seed(3))
    call = arguments()
    assert torch.equal(net(*call), expected(*call))
    assert all(adjacent([linear.weight for linear in group]) for group in projection_groups(net.layers[0]))
    with torch.device("meta"):
        shapes = net.to("meta")(*(torch.empty(value.shape) for value in call))
    assert shapes.shape == (2, 64, 16) and shapes.is_meta


def test_default_dtype_is_respected() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        net = BLIP3oDiT(TINY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
