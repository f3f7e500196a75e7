"""The drop-in: diffusers' and BLIP3-o's networks, fused in place, give stock's numbers and stay stock to others."""

import copy
import io
import logging
import pickle
import types
from typing import Any

import pytest
import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import LuminaAttnProcessor2_0
from diffusers.models.embeddings import (
    LuminaCombinedTimestepCaptionEmbedding,
    LuminaPatchEmbed,
    PixArtAlphaTextProjection,
    get_2d_rotary_pos_embed_lumina,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock
from torch import Tensor, nn

from blip3o_fast import fuse, unfuse
from blip3o_fast.models import forward as fused
from blip3o_fast.models.fuse import FusedNetwork, networks, obstacles
from blip3o_fast.models.layout import adjacent, projection_groups
from blip3o_fast.testing import assert_contract

TINY: dict[str, Any] = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 6,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "multiple_of": 32,
    "learn_sigma": False,
    "cross_attention_dim": 24,
}


def randomise(model: nn.Module) -> nn.Module:
    """No gate zero, no norm one: those would hide most mistakes. pad_token is uninitialised memory in stock."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("pad_token"):
                p.normal_()
            elif p.dim() == 1:
                p.add_(torch.randn_like(p) * (1.0 if name.endswith("gate") else 0.2))
    return model


def build(**overrides: Any) -> Any:
    return randomise(LuminaNextDiT2DModel(**{**TINY, **overrides}))


def call_of(model: Any, batch: int = 2, context: int = 5, rows: int = 4, columns: int = 4, **given: Any) -> list[Any]:
    """Stock's positional arguments. masked, base: a random context mask, proportional attention."""
    config = model.config
    patch = config.patch_size
    hidden_states = torch.randn(batch, config.in_channels, rows * patch, columns * patch)
    mask = torch.ones(batch, context, dtype=torch.int64)
    if given.get("masked"):
        mask = (torch.rand(batch, context) < 0.5).long()
        mask[:, 0] = 1
    rope = get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384, **given.get("rope", {}))
    extra = {"base_sequence_length": given["base"]} if "base" in given else {}
    states = torch.randn(batch, context, config.cross_attention_dim)
    return [hidden_states, torch.rand(batch) * 1000, states, mask, rope, extra]


def in_double(call: list[Any]) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in call]


def gradients(model: Any, call: list[Any], upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of all parameters, of hidden_states and of encoder_hidden_states."""
    hidden_states, context = (call[i].clone().requires_grad_() for i in (0, 2))
    out = model(hidden_states, call[1], context, *call[3:]).sample
    trained = {name: p for name, p in model.named_parameters() if not name.endswith("pad_token") and p.requires_grad}
    wanted = [*trained.values(), hidden_states, context]
    grads = torch.autograd.grad(out, wanted, upstream.to(out.dtype))
    return out.detach(), dict(zip([*trained, "hidden_states", "encoder_hidden_states"], grads, strict=True))


def assert_fused(model: Any) -> None:
    assert isinstance(model, FusedNetwork) and obstacles(model) == {}


def assert_parity(stock: Any, fast: Any, call: list[Any]) -> None:
    """Outputs to 1e-5, gradients as the numerics contract has them for whole models, and against fp64."""
    out_shape = stock(*call).sample.shape
    upstream = torch.randn(out_shape)
    expected, expected_grads = gradients(stock, call, upstream)
    out, grads = gradients(fast, call, upstream)
    assert type(out) is Tensor and (out - expected).abs().max().item() <= 1e-5
    gold, gold_grads = gradients(copy.deepcopy(stock).double(), in_double(call), upstream)
    assert_contract(out, expected, gold)
    assert set(grads) == set(expected_grads)
    largest = max(g.norm().item() for g in expected_grads.values())
    for name, grad in grads.items():
        wanted, exact = expected_grads[name], gold_grads[name]
        error = (grad - wanted).norm().item()
        assert error <= 1e-4 * wanted.norm().item() + 1e-6 * largest, f"gradient of {name}: {error:.2e}"
        ours, stocks = (grad - exact).norm().item(), (wanted - exact).norm().item()
        assert ours <= 2 * stocks + 1e-7 * largest, f"gradient of {name}: {ours:.2e} from fp64, stock {stocks:.2e}"


# ---- the numbers -----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "masked": ({}, {"masked": True, "context": 9}),
    "one-context-token": ({}, {"context": 1}),
    "patch-2-sigma": ({"patch_size": 2, "learn_sigma": True}, {"masked": True}),
    "gqa": ({"num_attention_heads": 4, "num_kv_heads": 2}, {"masked": True}),
    "no-qk-norm": ({"qk_norm": False, "num_kv_heads": None}, {}),
    "no-qk-norm-gqa": ({"qk_norm": False, "num_attention_heads": 4, "num_kv_heads": 1}, {"masked": True}),
    "rectangle": ({"patch_size": 2}, {"rows": 3, "columns": 7}),
    "proportional": ({}, {"base": 4, "masked": True, "rows": 6}),
    "other-rope": ({}, {"rope": {"linear_factor": 1.5, "ntk_factor": 2.0}}),
    "head-72": ({"hidden_size": 144}, {}),
    "64-tokens": ({"hidden_size": 128}, {"rows": 8, "columns": 8, "context": 64}),
    "gqa-8-of-32": ({"hidden_size": 256, "num_attention_heads": 32, "num_kv_heads": 8, "num_layers": 1}, {}),
    "head-72-gqa-patch-2-sigma": (
        {"hidden_size": 288, "num_attention_heads": 4, "num_kv_heads": 1, "patch_size": 2, "learn_sigma": True},
        {"masked": True, "context": 16, "rope": {"linear_factor": 1.0, "ntk_factor": 1.7}},
    ),
    "row-of-384": ({"num_layers": 1}, {"batch": 1, "rows": 1, "columns": 384}),
    "column-of-384": ({"num_layers": 1, "patch_size": 2}, {"batch": 1, "rows": 384, "columns": 1, "base": 64}),
    "context-512": ({"num_layers": 1}, {"context": 512}),
    "context-512-masked": ({"num_layers": 1}, {"context": 512, "masked": True, "rope": {"linear_factor": 2.0}}),
    "ffn-and-eps": ({"ffn_dim_multiplier": 1.5, "norm_eps": 1e-3, "num_layers": 3}, {"batch": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case: str) -> None:
    overrides, shapes = CASES[case]
    stock = build(**overrides)
    fast = fuse(copy.deepcopy(stock))
    assert_fused(fast)
    assert_parity(stock, fast, call_of(stock, **shapes))


def test_both_kinds_of_output() -> None:
    stock = build()
    call = call_of(stock)
    expected = stock(*call, return_dict=False)
    fast = fuse(copy.deepcopy(stock))
    out, whole = fast(*call, return_dict=False), fast(*call)
    assert type(out) is tuple and len(out) == len(expected) == 1
    assert type(whole) is Transformer2DModelOutput and torch.equal(whole.sample, out[0])
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_mask", "image_rotary_emb")
    named = dict(zip((*names, "cross_attention_kwargs"), call, strict=True))
    assert torch.equal(fast(**named, return_dict=True)[0], out[0])


def test_no_block_runs_the_stock_way() -> None:
    """Hooks for all modules of the process see what is called."""
    stock = build()
    call, fast = call_of(stock), fuse(copy.deepcopy(stock))
    called: set[type] = set()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.add(type(module)))
    read = {LuminaNextDiTBlock, LuminaCombinedTimestepCaptionEmbedding, LuminaLayerNormContinuous}
    try:
        assert fast(*call).sample.isfinite().all() and not called & read
        stock(*call)
        assert read <= called
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_fp64_than_stock(dtype: torch.dtype) -> None:
    stock = build(num_attention_heads=4).to(dtype)
    fast = fuse(copy.deepcopy(stock))
    call = [v.to(dtype) if i in (0, 2) else v for i, v in enumerate(call_of(stock, masked=True))]
    with torch.no_grad():
        out, expected = fast(*call).sample, stock(*call).sample
        gold = copy.deepcopy(stock).double()(*in_double(call)).sample
    assert out.dtype == expected.dtype == dtype
    assert_contract(out, expected, gold)


def test_autocast() -> None:
    stock = build()
    fast, call = fuse(copy.deepcopy(stock)), call_of(stock)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = fast(*call).sample, stock(*call).sample
    with torch.no_grad():
        gold = copy.deepcopy(stock).double()(*in_double(call)).sample
    assert out.dtype == expected.dtype
    assert_contract(out, expected, gold)


def test_more_than_stock_takes() -> None:
    stock = build()
    call = call_of(stock)
    fast = fuse(copy.deepcopy(stock))
    expected = stock(*call).sample
    with pytest.raises(TypeError):
        stock(*call[:5])
    assert torch.equal(fast(*call[:5]).sample, fast(*call).sample), "cross_attention_kwargs=None"
    without_mask = fast(*call[:3], None, call[4]).sample
    assert (without_mask - expected).abs().max() <= 1e-5
    call[3] = call[3].clone()
    call[3][1] = 0  # no context at all: NaN in stock
    assert stock(*call).sample.isnan().any()
    out = fast(*call).sample
    assert out.isfinite().all() and (out[0] - expected[0]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__(0, c[0][0]), "hidden_states must have shape"),
        (lambda c: c.__setitem__(0, None), "hidden_states must be a tensor"),
        (lambda c: c.__setitem__(4, c[4][:3]), "image_rotary_emb must be complex"),
        (lambda c: c.__setitem__(4, c[4].real), "image_rotary_emb must be complex"),
        (lambda c: c.__setitem__(5, {"base_sequence_length": 1}), "base_sequence_length must be at least 2, got 1"),
    ],
)
def test_bad_input_is_named(change: Any, message: str) -> None:
    model = fuse(build())
    call = call_of(model)
    change(call)
    with pytest.raises(ValueError, match=message):
        model(*call)


# ---- stock to everyone else ------------------------------------------------------------------------------------------


def test_only_the_class_changes() -> None:
    model = build()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    modules, config = dict(model.named_modules()), dict(model.config)
    assert fuse(model) is model
    cls = type(model)
    assert cls is not LuminaNextDiT2DModel and isinstance(model, LuminaNextDiT2DModel)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(cls, attribute) == getattr(LuminaNextDiT2DModel, attribute)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: key for name, (key, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert dict(model.named_modules()) == modules and dict(model.config) == config
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert fuse(model) is model and type(model) is cls, "twice"
    assert unfuse(model) is model and type(model) is LuminaNextDiT2DModel
    assert unfuse(model) is model and type(model) is LuminaNextDiT2DModel, "twice"
    assert model.__dict__.keys() == build().__dict__.keys()


def test_unfused_it_runs_stock_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    call = call_of(model)
    expected = model(*call).sample
    unfuse(fuse(model))
    monkeypatch.setattr(fused, "block_forward", None)
    assert torch.equal(model(*call).sample, expected)


def side_by_side(model: Any) -> bool:
    return all(adjacent([l.weight for l in g]) for layer in model.layers for g in projection_groups(layer))


def test_weights_lie_side_by_side_and_once() -> None:
    model = build()
    assert not side_by_side(model)
    fuse(model)
    assert side_by_side(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_fused_too(how: str) -> None:
    model = fuse(build())
    call = call_of(model)
    other = COPIES[how](model)
    assert type(other) is type(model) and side_by_side(other)
    assert torch.equal(other(*call).sample, model(*call).sample)
    with torch.no_grad():
        other.layers[0].attn1.to_q.weight.zero_()
    assert model.layers[0].attn1.to_q.weight.abs().min() >= 0 and model.layers[0].attn1.to_q.weight.any()
    assert type(unfuse(other)) is LuminaNextDiT2DModel
    assert_fused(model)


@pytest.mark.parametrize("how", ["half", "bfloat16", "double", "to"])
def test_other_dtypes_keep_the_layout(how: str) -> None:
    model = fuse(build())
    dtypes = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "to": torch.bfloat16}
    moved = model.to(torch.bfloat16) if how == "to" else getattr(model, how)()
    assert moved is model and model.dtype == dtypes[how]
    assert_fused(model)
    assert side_by_side(model)


def test_loading_into_it() -> None:
    stock, model = build(), fuse(build())
    assert list(stock.state_dict()) == list(model.state_dict())
    call = call_of(stock)
    model.load_state_dict({name: t.clone() for name, t in stock.state_dict().items()}, assign=True)
    assert side_by_side(model)
    assert (model(*call).sample - stock(*call).sample).abs().max() <= 1e-5
    model.eval()
    assert not model.layers[0].training
    model.train()
    assert model.layers[0].training


@pytest.mark.parametrize("shards", [False, True])
def test_saved_folders_are_stocks(shards: bool, tmp_path: Any) -> None:
    stock = build(num_layers=4)
    stock.save_pretrained(tmp_path / "stock", **({"max_shard_size": "200KB"} if shards else {}))
    fuse(stock).save_pretrained(tmp_path / "fused", **({"max_shard_size": "200KB"} if shards else {}))
    assert (tmp_path / "fused/config.json").read_text() == (tmp_path / "stock/config.json").read_text()
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) > (1 if shards else 0)
    for folder in ("stock", "fused"):
        loaded = LuminaNextDiT2DModel.from_pretrained(tmp_path / folder)
        assert type(loaded) is LuminaNextDiT2DModel
        for name, tensor in stock.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


# ---- blocks that cannot be read, and layers that are called ----------------------------------------------------------


class Scaled(LuminaAttnProcessor2_0):
    """An attention processor of the user's own, with an argument of its own."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
        factor: float = 2.0,
    ) -> Tensor:
        args = (encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb, base_sequence_length)
        return factor * super().__call__(attn, hidden_states, *args)


def own_processor(model: Any, seen: list[str]) -> None:
    model.layers[1].attn1.processor = Scaled()


def hook_on(path: str) -> Any:
    def change(model: Any, seen: list[str]) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            seen.append(path)
            outs = [o * torch.linspace(0.5, 2, o.shape[-1]) for o in (out if isinstance(out, tuple) else (out,))]
            return tuple(outs) if isinstance(out, tuple) else outs[0]

        model.get_submodule(path).register_forward_hook(hook)

    return change


def own_forward(model: Any, seen: list[str]) -> None:
    block = model.layers[0]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 1.25


def own_norm(model: Any, seen: list[str]) -> None:
    model.layers[0].ffn_norm1 = nn.LayerNorm(64)


def other_eps(model: Any, seen: list[str]) -> None:
    model.layers[1].ffn_norm1.eps = 0.5


def other_eps_in_one_block(model: Any, seen: list[str]) -> None:
    block = model.layers[1]
    for norm in (block.norm1.norm, block.norm2, block.ffn_norm1, block.ffn_norm2, block.norm1_context):
        norm.eps = 0.5


def norm_without_weight(model: Any, seen: list[str]) -> None:
    model.layers[1].attn1.norm_k = nn.LayerNorm(64, elementwise_affine=False)


def other_scale(model: Any, seen: list[str]) -> None:
    model.layers[1].attn1.scale = 0.01


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def parametrized_gate(model: Any, seen: list[str]) -> None:
    nn.utils.parametrize.register_parametrization(model.layers[0], "gate", Negated())


def parametrized_weight(model: Any, seen: list[str]) -> None:
    nn.utils.parametrize.register_parametrization(model.layers[0].attn1.to_v, "weight", Negated())


def lora(model: Any, seen: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["to_q", "to_v", "linear_1", "linear_3", "linear", "to_out.0"]
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model)
    torch.random.set_rng_state(state)


CHANGES: dict[str, tuple[Any, int]] = {
    # what is changed, and how many blocks then run by themselves
    "processor": (own_processor, 1),
    "hooked-block": (hook_on("layers.0"), 1),
    "hooked-norm": (hook_on("layers.1.norm2"), 1),
    "hooked-adaptive-norm": (hook_on("layers.1.norm1"), 1),
    "hooked-attention": (hook_on("layers.0.attn2"), 1),
    "hooked-silu": (hook_on("layers.0.feed_forward.silu"), 1),
    "hooked-projection": (hook_on("layers.0.attn1.to_q"), 0),
    "hooked-modulation": (hook_on("layers.1.norm1.linear"), 0),
    "hooked-time": (hook_on("time_caption_embed.timestep_embedder.act"), 0),
    "hooked-head": (hook_on("norm_out.norm"), 0),
    "hooked-patches": (hook_on("patch_embedder.proj"), 0),
    "own-forward": (own_forward, 1),
    "own-norm": (own_norm, 1),
    "other-eps": (other_eps, 1),
    "other-eps-in-one-block": (other_eps_in_one_block, 0),
    "norm-without-weight": (norm_without_weight, 1),
    "other-scale": (other_scale, 1),
    "parametrized-gate": (parametrized_gate, 1),
    "parametrized-weight": (parametrized_weight, 0),
    "lora": (lora, 0),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_dropped_in_silence(change: str, when: str) -> None:
    """Whatever is put on a part of the network acts as in stock, put there before or after."""
    apply, by_themselves = CHANGES[change]
    stock = build()
    call, fast = call_of(stock, masked=True), copy.deepcopy(stock)
    plain = stock(*call).sample
    stocks, seen = [], []
    apply(stock, stocks)
    if when == "before":
        apply(fast, seen)
        fuse(fast)
    else:
        apply(fuse(fast), seen)
    upstream = torch.randn_like(plain)
    out, grads = gradients(fast, call, upstream)
    expected, expected_grads = gradients(stock, call, upstream)
    assert (out - expected).abs().max() <= 1e-5
    assert (expected - plain).abs().max() > 1e-3, "the change has no effect"
    assert seen == stocks
    assert len(obstacles(fast)) == by_themselves, obstacles(fast)
    largest = max(g.norm().item() for g in expected_grads.values())
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).norm().item()
        assert error <= 1e-4 * expected_grads[name].norm().item() + 1e-6 * largest, name


def test_obstacles_say_why() -> None:
    model = fuse(build())
    own_processor(model, [])
    assert obstacles(model) == {"layers.1": "its attention processors are Scaled and LuminaAttnProcessor2_0"}


def test_other_attention_arguments_reach_the_processors(caplog: pytest.LogCaptureFixture) -> None:
    stock = build()
    own_processor(stock, [])
    call, fast = call_of(stock), fuse(copy.deepcopy(stock))
    without = fast(*call).sample
    call[5] = {"factor": 3.0}
    out = fast(*call).sample
    assert (out - stock(*call).sample).abs().max() <= 1e-5
    assert (out - without).abs().max() > 1e-3
    caplog.clear()
    fast(*call)
    # one of the four attentions knows the argument, the others say that they ignore it, as in stock
    assert caplog.text.count("['factor'] are not expected by LuminaAttnProcessor2_0") == 3


def test_a_block_by_itself_takes_an_empty_mask_row() -> None:
    """It is given zeros to attend to, since an attention over nothing may be NaN."""
    model = fuse(build())
    call = call_of(model)
    call[3][1] = 0
    expected = model(*call).sample
    given: list[Any] = []
    model.layers[1].register_forward_pre_hook(lambda module, args: given.append((args[3], args[4])))
    assert list(obstacles(model)) == ["layers.1"]
    assert (model(*call).sample - expected).abs().max() <= 1e-5
    context, mask = given[0]
    assert mask.all() and not context[1].any() and torch.equal(context[0], call[2][0])


# ---- gradient checkpointing and torch.compile ------------------------------------------------------------------------


def test_gradient_checkpointing() -> None:
    stock = build(num_layers=3)
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        stock.enable_gradient_checkpointing()
    model = fuse(stock).train()
    own_processor(model, [])
    call = call_of(model)
    upstream = torch.randn_like(model(*call).sample)
    out, grads = gradients(model, call, upstream)
    runs: list[int] = []
    model.layers[0].attn1.to_q.register_forward_hook(lambda *_: runs.append(0))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    again, grads_again = gradients(model, call, upstream)
    assert len(runs) == 2, "the block did not run again"
    assert (again - out).abs().max() <= 1e-5
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        unfuse(model)
    model.eval()
    gradients(model, call, upstream)
    assert len(runs) == 3, "not in eval mode"
    model.disable_gradient_checkpointing()
    assert type(unfuse(model)) is LuminaNextDiT2DModel and "gradient_checkpointing" not in model.__dict__


def test_a_checkpointing_function_of_the_users() -> None:
    model = fuse(build()).train()
    asked: list[int] = []

    def own(module: Any, *args: Any) -> Any:
        asked.append(len(args))
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(own)
    model(*call_of(model)).sample.sum().backward()
    assert asked == [4, 4]


def test_it_compiles() -> None:
    """Fused through the compiled model that wraps it; `test_fuse_contract.py` has one that ran before."""
    model = build()
    call = call_of(model, masked=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert fuse(compiled) is compiled
    assert_fused(model)
    out = compiled(*call).sample
    assert (out - model(*call).sample).abs().max() <= 1e-5


# ---- what is found ---------------------------------------------------------------------------------------------------


class BLIP3oNetwork(ModelMixin, ConfigMixin):
    """BLIP3-o's edited copy of `LuminaNextDiT2DModel`: a context projection first, no pad_token, checkpointing."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, in_channels: int, dim: int, heads: int, depth: int, latent_embedding_size: int) -> None:
        super().__init__()
        self.patch_size, self.in_channels, self.out_channels = 1, in_channels, in_channels
        self.head_dim = dim // heads
        self.gradient_checkpointing = False
        self.caption_projection = PixArtAlphaTextProjection(latent_embedding_size, dim)
        self.patch_embedder = LuminaPatchEmbed(patch_size=1, in_channels=in_channels, embed_dim=dim, bias=True)
        self.time_caption_embed = LuminaCombinedTimestepCaptionEmbedding(min(dim, 1024), cross_attention_dim=dim)
        block = (dim, heads, heads, 32, None, 1e-5, True, dim)
        self.layers = nn.ModuleList([LuminaNextDiTBlock(*block) for _ in range(depth)])
        self.norm_out = LuminaLayerNormContinuous(
            dim, min(dim, 1024), elementwise_affine=False, eps=1e-6, bias=True, out_dim=in_channels
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        image_rotary_emb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        h, mask, sizes, rope = self.patch_embedder(hidden_states, image_rotary_emb)
        context = self.caption_projection(encoder_hidden_states)
        temb = self.time_caption_embed(timestep, context, encoder_mask)
        for layer in self.layers:
            args = (layer, h, mask, rope, context, encoder_mask.bool(), temb, cross_attention_kwargs)
            if self.training and self.gradient_checkpointing:
                h = torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
            else:
                h = layer(*args[1:])
        out = self.norm_out(h, temb).transpose(1, 2).unflatten(2, sizes[0])
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


BLIP3oNetwork.__name__ = "LuminaNextDiT2DModel"


class NextDiTCrossAttn(nn.Module):
    """BLIP3-o's wrapper: an all-ones mask and the whole rotary table in every call, {} for the attention."""

    def __init__(self, channels: int = 6, dim: int = 64, heads: int = 2, layers: int = 2, context: int = 24) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(in_channels=channels, cross_attention_dim=context, patch_size=1)
        self.model = BLIP3oNetwork(channels, dim, heads, layers, context)
        self.freqs_cis = get_2d_rotary_pos_embed_lumina(dim // heads, 384, 384)

    def forward(self, x: Tensor, timestep: Tensor, z_latents: Tensor, **kwargs: Any) -> Tensor:
        mask = torch.ones(z_latents.shape[:2], device=z_latents.device)
        return self.model(x, timestep, z_latents, mask, self.freqs_cis, {}).sample


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blip3o(checkpointing: bool) -> None:
    stock: Any = randomise(NextDiTCrossAttn()).train()
    fast = fuse(copy.deepcopy(stock))
    assert type(fast) is NextDiTCrossAttn and list(networks(fast)) == ["model"]
    assert_fused(fast.model)
    for model in (stock, fast):
        model.model.gradient_checkpointing = checkpointing
    x, time, context = torch.randn(2, 6, 8, 8), torch.tensor([1000.0, 33.0]), torch.randn(2, 64, 24)
    upstream = torch.randn(2, 6, 8, 8)
    results = []
    for model in (stock, fast):
        leaf = context.clone().requires_grad_()
        out = model(x, time, leaf)
        results.append((out, torch.autograd.grad(out, [*model.parameters(), leaf], upstream)))
    (expected, expected_grads), (out, grads) = results
    assert (out - expected).abs().max() <= 1e-5
    largest = max(g.norm().item() for g in expected_grads)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad - wanted).norm().item() <= 1e-4 * wanted.norm().item() + 1e-6 * largest
    assert type(unfuse(fast).model) is BLIP3oNetwork and fast.model.gradient_checkpointing is checkpointing


class Backbone(nn.Module):
    """A stand-in of BLIP3-o: a frozen backbone, learned queries, and the network that their states condition."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True).requires_grad_(False)
        self.queries = nn.Parameter(torch.randn(8, 24))
        self.dit = NextDiTCrossAttn()

    def forward(self, prompt: Tensor, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([prompt, self.queries.expand(prompt.shape[0], -1, -1)], dim=1)
        context = self.backbone(tokens)[:, -len(self.queries) :]
        context.retain_grad()
        return self.dit(x, timestep, context), context


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_inside_another_model(checkpointing: bool) -> None:
    """20 steps: loss and gradient of the context as stock; the frozen part stays."""
    stock: Any = randomise(Backbone()).train()
    fast = fuse(copy.deepcopy(stock))
    batches = [(torch.randn(2, 5, 24), torch.randn(2, 6, 4, 4), torch.rand(2) * 1000) for _ in range(20)]
    runs = []
    for model in (stock, fast):
        if checkpointing:
            model.dit.model.gradient_checkpointing = True
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        run = []
        for prompt, x, timestep in batches:
            optimizer.zero_grad()
            out, context = model(prompt, x, timestep)
            loss = (out - x).square().mean()
            loss.backward()
            optimizer.step()
            run.append((loss.item(), context.grad))
        runs.append(run)
        assert model.queries.grad is not None and model.backbone.linear1.weight.grad is None
    for (loss, grad), (wanted, wanted_grad) in zip(runs[1], runs[0], strict=True):
        assert abs(loss - wanted) <= 1e-5
        assert (grad - wanted_grad).norm() <= 1e-4 * wanted_grad.norm()


def test_every_network_of_a_module_is_found(caplog: pytest.LogCaptureFixture) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = build()
            self.more = nn.ModuleList([build(num_layers=1), NextDiTCrossAttn(), nn.Linear(2, 2)])
            self.same = self.one

    holder = Holder()
    with caplog.at_level(logging.INFO, "blip3o_fast.models.fuse"):
        assert fuse(holder) is holder
    assert list(networks(holder)) == ["one", "more.0", "more.1.model"]
    assert all(isinstance(network, FusedNetwork) for network in networks(holder).values())
    assert "fused 3 networks of 5 blocks in Holder" in caplog.text
    unfuse(holder)
    assert not any(isinstance(module, FusedNetwork) for module in holder.modules())


def test_a_pipeline() -> None:
    pipeline = types.SimpleNamespace(transformer=build(), scheduler=object())
    assert fuse(pipeline) is pipeline
    assert_fused(pipeline.transformer)
    assert type(unfuse(pipeline).transformer) is LuminaNextDiT2DModel


def relative(name: str) -> nn.Module:
    return type(name, (nn.Module,), {})()


def ours() -> nn.Module:
    from blip3o_fast import BLIP3oConfig, BLIP3oDiT

    return BLIP3oDiT(BLIP3oConfig.preset("tiny"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "nothing to fuse in Linear.*LuminaNextDiT2DModel"),
        (lambda: relative("LuminaNextDiT2DModel"), "nothing to fuse in LuminaNextDiT2DModel.*patch_embedder"),
        (
            lambda: relative("Lumina2Transformer2DModel"),
            "Lumina2Transformer2DModel is another network.*NextDiTCrossAttn",
        ),
        (
            lambda: types.SimpleNamespace(transformer=relative("SanaTransformer2DModel")),
            "SanaTransformer2DModel is ano",
        ),
        (ours, "a BLIP3oDiT runs on the fused ops already"),
        (lambda: "model", "got str, which is no module"),
        (lambda: types.SimpleNamespace(transformer=None), "has no transformer"),
    ],
)
def test_nothing_to_fuse_is_an_error(make: Any, message: str) -> None:
    x = make()
    for function in (fuse, unfuse):
        with pytest.raises(ValueError, match=message):
            function(x)


class OtherForward(LuminaNextDiT2DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class SameForward(LuminaNextDiT2DModel):
    """A subclass that leaves the forward alone."""


def with_own_forward() -> Any:
    model = build()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    return model


def with_accelerate_hook() -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(build(), ModelHook())


def sharded() -> Any:
    """As `fully_shard` leaves it."""
    from torch.distributed.fsdp import FSDPModule

    model = build()
    model.__class__ = type("FSDPLuminaNextDiT2DModel", (FSDPModule, LuminaNextDiT2DModel), {})
    return model


def parametrized() -> Any:
    model = build()
    nn.utils.parametrize.register_parametrization(model, "pad_token", Negated())
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OtherForward(**TINY), "is a OtherForward whose forward is not that of LuminaNextDiT2DModel"),
        (with_own_forward, r"has a forward of its own \(a replaced method\)"),
        (with_accelerate_hook, r"has a forward of its own \(accelerate's ModelHook.*remove_all_hooks"),
        (parametrized, "is parametrized"),
        (sharded, "is sharded"),
    ],
)
def test_a_network_that_cannot_be_fused_is_refused_by_name(make: Any, message: str) -> None:
    good = build()
    both = nn.ModuleDict({"good": good, "bad": make()})
    with pytest.raises(ValueError, match=f"^bad.* {message}"):
        fuse(both)
    assert type(good) is LuminaNextDiT2DModel, "nothing is changed"


def test_a_subclass_with_stocks_forward() -> None:
    model: Any = randomise(SameForward(**TINY))
    call = call_of(model)
    expected = model(*call).sample
    fuse(model)
    assert type(model).__name__ == "SameForward" and isinstance(model, SameForward)
    assert (model(*call).sample - expected).abs().max() <= 1e-5
    assert type(unfuse(model)) is SameForward


def test_hooks_put_on_later_keep_it_from_being_unfused() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = fuse(build())
    call = call_of(model)
    expected = model(*call).sample
    add_hook_to_module(model, ModelHook())
    assert torch.equal(model(*call).sample, expected)
    with pytest.raises(ValueError, match="hooked after it was fused"):
        unfuse(model)
    remove_hook_from_module(model)
    # accelerate leaves the fused forward behind, bound to the model
    assert "forward" in model.__dict__
    assert type(unfuse(model)) is LuminaNextDiT2DModel and "forward" not in model.__dict__


def test_offloading_after_fusing() -> None:
    from accelerate import cpu_offload

    model = fuse(build()).eval()
    call = call_of(model)
    with torch.no_grad():
        expected = model(*call).sample
        offloaded = cpu_offload(model, execution_device="cpu", offload_buffers=True)
        assert all(p.is_meta for p in offloaded.parameters()), "nothing was offloaded"
        assert (offloaded(*call).sample - expected).abs().max() <= 1e-5
