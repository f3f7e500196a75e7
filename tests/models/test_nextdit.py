"""What `BLIP3oDiT` promises beside equality with diffusers: forms, masks, errors, initialisation, copies, tracing."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.models.forward import Grid
from blip3o_fast.models.layout import adjacent, projection_groups
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.rope import kept_rope_table
from blip3o_fast.ops import use_backend

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


def assert_gradients_close(grads: Any, expected: Any) -> None:
    largest = max(grad.norm().item() for grad in expected)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert (grad - expected_grad).norm().item() <= 1e-4 * expected_grad.norm().item() + 1e-6 * largest


# ---- forms, masks, edges -------------------------------------------------------------------------------------------


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
def test_refuses(change: dict[int, Tensor], message: str, model: BLIP3oDiT) -> None:
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


class _Launches(TorchDispatchMode):
    """What computes, views and profiler ranges left out; an op of ours counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func is not torch.ops.aten._unsafe_view.default and func.namespace != "profiler":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_launches_of_a_block() -> None:
    """13 forward, at most 44 with backward, where stock has 107 and 278; between blocks, as in training."""
    with torch.device("meta"):
        net = BLIP3oDiT(BLIP3oConfig(num_layers=2))
        h, normed = (torch.empty(2, 64, 1792, requires_grad=True) for _ in range(2))
        conditioning = torch.empty(2, 1024, requires_grad=True)
        context = torch.empty(2, 64, 1792, requires_grad=True)
        modulation = torch.empty(2, 4 * 1792, requires_grad=True).chunk(4, dim=1)
        upstream = torch.empty(2, 64, 1792), torch.empty(2, 64, 1792)
        grid = Grid(kept_rope_table(8, 8, 64, torch.device("meta")))
    # "auto" may choose PyTorch's attention on a CPU, of which several operations are seen
    with use_backend("reference"), _Launches() as launches:
        out = net.layers[0](h, conditioning, context, grid, conditioning, normed, modulation, following=net.layers[1])
        assert len(launches.names) == 13, launches.names
        torch.autograd.backward(out[:2], upstream)
    assert len(launches.names) <= 44, launches.names


# ---- initial weights -----------------------------------------------------------------------------------------------


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


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


class _Saved:
    """Bytes of the tensors that autograd keeps, each storage once."""

    def __init__(self, net: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@pytest.mark.parametrize(
    "enable, disable",
    [
        ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
        ("activation_checkpointing_enable", "activation_checkpointing_disable"),
        ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
    ],
)
def test_checkpointing_saves_memory_and_changes_nothing(enable: str, disable: str) -> None:
    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", num_layers=4))
    call = arguments()
    upstream = torch.randn(2, 64, 16)

    def run() -> tuple[int, Tensor, list[Tensor]]:
        saved = _Saved(net)
        with saved.hooks:
            out = net(*call)
        return saved.total, out.detach(), list(torch.autograd.grad(out, list(net.parameters()), upstream))

    all_bytes, expected, expected_grads = run()
    getattr(net, enable)()
    assert net.is_gradient_checkpointing
    few_bytes, out, grads = run()
    assert few_bytes < all_bytes / 3
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert_gradients_close(grads, expected_grads)
    net.eval()
    assert run()[0] == all_bytes, "in training mode only"
    net.train()
    getattr(net, disable)()
    assert run()[0] == all_bytes


def test_checkpointing_arguments(model: BLIP3oDiT) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert torch.isfinite(model(*arguments())).all()
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers must be 1"):
        model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="offload must be False"):
        model.activation_checkpointing_enable(offload=True)


# ---- hooks and freezing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["layers.0", "layers.1", "layers.0.attn1.to_q", "layers.1.feed_forward.linear_3", "layers.1.norm1.linear"]
    + [
        "layers.0.norm2",
        "layers.1.attn1.norm_q",
        "layers.1.norm1.norm",
        "layers.0.attn2.to_out.0",
        "norm_out.linear_2",
    ],
)
def test_hooks_see_what_stock_would_show(name: str, stock_pair: Any, inputs: Any) -> None:
    stock, ours = stock_pair(TINY)
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: Any, out: Any) -> None:
        seen.append(out)

    call = inputs(TINY)
    stock.backbone.get_submodule(name).register_forward_hook(hook)
    ours.get_submodule(name).register_forward_hook(hook)
    error = (ours(*call) - stock(*call)).abs().max().item()
    assert error <= 1e-5
    mine, theirs = seen
    assert (mine - theirs).abs().max().item() <= 2e-5


def test_a_hook_may_replace_a_projection(model: BLIP3oDiT) -> None:
    call = arguments()
    for name in ("layers.0.attn1.to_v", "layers.0.attn2.to_v"):
        model.get_submodule(name).register_forward_hook(lambda _module, _given, out: torch.zeros_like(out))
    torch.testing.assert_close(model(*call), eager_forward(model, *call), atol=1e-5, rtol=0)


def test_freezing_by_name(model: BLIP3oDiT) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn1.to_k" in name or name.endswith("gate"))
    out = model(*arguments())
    out.backward(torch.randn_like(out))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.num_parameters(only_trainable=True) == 2 * (64 * 64 + 2)


# ---- copies --------------------------------------------------------------------------------------------------------


def _lies_side_by_side(net: BLIP3oDiT) -> bool:
    return all(adjacent([l.weight for l in group]) for block in net.layers for group in projection_groups(block))


def test_deepcopy(model: BLIP3oDiT) -> None:
    other = copy.deepcopy(model)
    call = arguments()
    assert torch.equal(other(*call), model(*call))
    assert _lies_side_by_side(other)
    before = model(*call)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(*call), before)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickle(way: str, model: BLIP3oDiT) -> None:
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    call = arguments()
    assert torch.equal(other(*call), model(*call))
    assert other.config == model.config and _lies_side_by_side(other)


# ---- tracing -------------------------------------------------------------------------------------------------------


def test_compiles_whole(model: BLIP3oDiT) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        call = arguments(batch)
        upstream = torch.randn(batch, 64, 16)
        expected = model(*call)
        expected_grads = torch.autograd.grad(expected, list(model.parameters()), upstream)
        out = compiled(*call)
        grads = torch.autograd.grad(out, list(model.parameters()), upstream)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        assert_gradients_close(grads, expected_grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "no compilation per batch size"
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool, model: BLIP3oDiT) -> None:
    call = arguments()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.eval(), call, strict=strict)
        out = program.module()(*call)
    torch.testing.assert_close(out, model(*call), atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_inference_mode_leaves_nothing_behind(model: BLIP3oDiT) -> None:
    grid = torch.randn(1, 16, 5, 7), torch.rand(1), torch.randn(1, 5, 24)  # a grid whose table is not kept yet
    with torch.inference_mode():
        model(*grid)
    model(*grid).sum().backward()


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_memory_is_what_autograd_keeps(projection: bool, checkpointing: bool) -> None:
    config = BLIP3oConfig.preset("tiny", hidden_size=128, num_layers=6, context_projection=projection)
    net = BLIP3oDiT(config)
    saved = _Saved(net)
    with saved.hooks:
        net(*arguments(batch=4, context=64))
    if checkpointing:
        net.gradient_checkpointing_enable()
    trainable = net.num_parameters(only_trainable=True)
    activations = net.memory(4, training=True) - 4 * (net.num_parameters() + 3 * trainable)
    if checkpointing:
        assert activations < saved.total / 3
    else:
        assert 0.9 * saved.total <= activations <= 1.15 * saved.total


def test_memory_of_other_dtypes_and_batches(model: BLIP3oDiT) -> None:
    assert model.memory(0) == 4 * model.num_parameters()
    assert model.memory(8, dtype=torch.bfloat16) == model.memory(8) // 2 == model.memory(8, dtype="float16")
    assert model.memory(8, training=True) > model.memory(8) > model.memory(4)
    with pytest.raises(ValueError, match="batch must be a whole number of samples, got -1"):
        model.memory(-1)
    with pytest.raises(ValueError, match="torch_dtype must be a floating dtype or its name, got 'bf17'"):
        model.memory(1, dtype="bf17")
