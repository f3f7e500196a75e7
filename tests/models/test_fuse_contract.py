"""What diffusers promises of its models, of a fused one: folders, dtypes, determinism, compiling, layers replaced."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.attention_processor import LuminaAttnProcessor2_0
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from blip3o_fast import fuse, unfuse
from blip3o_fast.models.fuse import FusedNetwork, obstacles
from blip3o_fast.models.layout import adjacent, projection_groups


def off(out: Any, expected: Any) -> float:
    return (out.sample - expected.sample).abs().max().item()


# ---- loading and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fp16", "bf16", None])
def test_variants_and_the_dtype_on_load(
    variant: str | None, build_lumina: Any, lumina_call: Any, tmp_path: Path
) -> None:
    """Written by a fused model in half precision, read by stock and fused again, in another dtype too."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, None: torch.float32}[variant]
    model = fuse(build_lumina()).to(dtype)
    model.save_pretrained(tmp_path, variant=variant)
    name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else "diffusion_pytorch_model.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", name]
    for wanted in (dtype, torch.float32):
        stock = LuminaNextDiT2DModel.from_pretrained(tmp_path, variant=variant, torch_dtype=wanted)
        assert type(stock) is LuminaNextDiT2DModel and stock.dtype == wanted and not stock.training
        for key, tensor in model.state_dict().items():
            assert torch.equal(stock.state_dict()[key], tensor.to(wanted)), key
    call = lumina_call(stock)
    expected = stock(*call)
    assert off(fuse(stock)(*call), expected) <= 1e-5


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_sharded_folders_hold_every_weight_once(safe: bool, build_lumina: Any, tmp_path: Path) -> None:
    model = build_lumina(num_layers=3)
    model.save_pretrained(tmp_path / "stock", max_shard_size="200KB", safe_serialization=safe)
    fuse(model).save_pretrained(tmp_path / "fused", max_shard_size="200KB", safe_serialization=safe)
    names = [sorted(p.name for p in (tmp_path / kind).iterdir()) for kind in ("stock", "fused")]
    assert names[0] == names[1] and len(names[0]) > 3
    stock_bytes, fused_bytes = (sum(p.stat().st_size for p in (tmp_path / k).iterdir()) for k in ("stock", "fused"))
    assert fused_bytes <= 1.01 * stock_bytes, "a shard holds more than its weights"
    loaded = LuminaNextDiT2DModel.from_pretrained(tmp_path / "fused", use_safetensors=safe)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_the_fused_class_loads_and_builds(build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    """`type(model).from_pretrained` and `from_config`, as EMA and pipelines call them."""
    model = fuse(build_lumina())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    call = lumina_call(model)
    assert isinstance(loaded, FusedNetwork) and off(loaded(*call), model(*call)) <= 1e-5
    with_info, info = type(model).from_pretrained(tmp_path, output_loading_info=True, low_cpu_mem_usage=False)
    assert info["missing_keys"] == [] and off(with_info(*call), model(*call)) <= 1e-5
    built, unused = type(model).from_config(dict(model.config) | {"strange": 1}, return_unused_kwargs=True)
    assert list(built.state_dict()) == list(model.state_dict())
    for network in (loaded, with_info, built):
        groups = [group for block in network.layers for group in projection_groups(block)]
        assert all(adjacent([linear.weight for linear in group]) for group in groups), "not side by side"
    for cls in (type(model), LuminaNextDiT2DModel):
        built = cls.from_config(model.config)
        assert dict(built.config) == dict(model.config) and list(built.state_dict()) == list(model.state_dict())
    assert LuminaNextDiT2DModel.load_config(tmp_path)["hidden_size"] == 64
    assert model.num_parameters() == unfuse(model).num_parameters()


def test_determinism_and_modes(build_lumina: Any, lumina_call: Any) -> None:
    stock = build_lumina()
    call = lumina_call(stock)
    model = fuse(copy.deepcopy(stock))
    first = model.eval()(*call).sample
    assert torch.equal(model(*call).sample, first) and torch.equal(model.train()(*call).sample, first)
    assert all(m.training for m in model.modules()) and not any(m.training for m in model.eval().modules())
    one = model(call[0][1:], call[1][1:], call[2][1:], call[3][1:], *call[4:]).sample
    assert (one - first[1:]).abs().max() <= 1e-5, "a sample depends on its batch"
    assert off(model(*call), stock.eval()(*call)) <= 1e-5


def test_a_rotary_table_that_changes_during_a_run(build_lumina: Any, lumina_call: Any) -> None:
    """As `LuminaPipeline` makes them: linear before the watershed, NTK after it, every time a new tensor."""
    stock = build_lumina(num_attention_heads=4, num_kv_heads=1, patch_size=2)
    model, x = fuse(copy.deepcopy(stock)), lumina_call(stock, rows=6, columns=3)
    seen = []
    for factors in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0), (2.0, 1.0)):
        x[4] = lumina_call(stock, linear_factor=factors[0], ntk_factor=factors[1])[4]
        out = model(*x)
        assert off(out, stock(*x)) <= 1e-5
        seen.append(out.sample)
    assert torch.equal(seen[0], seen[3]) and all(
        (a - b).abs().max() > 1e-4 for a, b in zip(seen, seen[1:], strict=False)
    )


@pytest.mark.slow
def test_the_class_as_it_is_by_default(build_lumina: Any, lumina_call: Any) -> None:
    """2304 wide, 32 heads of 72, 8 of keys and values, patch 2, learned sigma: one block of it."""
    sizes = {"hidden_size": 2304, "num_attention_heads": 32, "num_kv_heads": 8, "cross_attention_dim": 2048}
    stock = build_lumina(patch_size=2, in_channels=4, learn_sigma=True, num_layers=1, multiple_of=256, **sizes)
    call = lumina_call(stock, rows=8, columns=8)
    with torch.no_grad():
        expected = stock(*call)
        assert off(fuse(stock)(*call), expected) <= 1e-5


# ---- weights are not held twice --------------------------------------------------------------------------------------


def held(model: nn.Module) -> int:
    """Bytes of all storages behind the parameters."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() <= 1.3 * sum(p.nbytes for p in model.parameters()), "the file holds weights twice"
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def assigned(model: Any) -> Any:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


HANDLED: dict[str, Callable[[Any], Any]] = {
    "fused": lambda m: m,
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
    "assign": assigned,
    "unfuse": unfuse,
}


@pytest.mark.parametrize("how", HANDLED)
def test_weights_are_held_once(how: str, build_lumina: Any) -> None:
    model = fuse(build_lumina())
    other = HANDLED[how](model)
    groups = [g for layer in other.layers for g in projection_groups(layer)]
    assert all(adjacent([linear.weight for linear in group]) for group in groups)
    assert held(other) == sum(p.nbytes for p in other.parameters())
    if other is not model:
        ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert ours.isdisjoint(p.untyped_storage().data_ptr() for p in other.parameters())


# ---- tied weights ----------------------------------------------------------------------------------------------------


def one_parameter(model: Any) -> None:
    model.layers[1].attn1.to_q.weight = model.layers[0].attn1.to_q.weight


def one_memory(model: Any) -> None:
    """Two parameters over the same numbers, as a flattened buffer makes them."""
    model.layers[1].feed_forward.linear_1.weight = nn.Parameter(model.layers[0].feed_forward.linear_1.weight.data)


def one_memory_in_a_group(model: Any) -> None:
    model.layers[1].attn1.to_k.weight = nn.Parameter(model.layers[1].attn1.to_v.weight.data)


def one_block(model: Any) -> None:
    model.layers[1] = model.layers[0]


@pytest.mark.parametrize("tie", [one_parameter, one_memory, one_memory_in_a_group, one_block])
def test_tied_weights_stay_tied(tie: Any, build_lumina: Any, lumina_call: Any) -> None:
    stock = build_lumina()
    fast = copy.deepcopy(stock)
    tie(stock)
    tie(fast)
    fuse(fast)
    assert held(fast) == held(stock)
    call = lumina_call(stock)
    for model in (stock, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(*call).sample.square().mean().backward()
        optimizer.step()
    assert off(fast(*call), stock(*call)) <= 1e-5
    for (name, ours), theirs in zip(fast.named_parameters(), stock.parameters(), strict=True):
        if name != "pad_token":
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model_is_unwrapped(build_lumina: Any, lumina_call: Any) -> None:
    """What was compiled is fused in place; the next call compiles the fused forward, the wrapper stays."""
    torch._dynamo.reset()
    stock, counter = build_lumina(num_layers=1), CompileCounter()
    call = lumina_call(stock)
    expected = stock(*call)
    model = torch.compile(stock, backend=counter)
    assert off(model(*call), expected) <= 1e-5 and counter.frame_count == 1
    operations = counter.op_count
    assert fuse(model) is model and isinstance(stock, FusedNetwork) and obstacles(model) == {}
    out = model(*call)
    assert off(out, expected) <= 1e-5 and not torch.equal(out.sample, expected.sample)
    assert counter.frame_count == 2 and counter.op_count > operations, "the fused forward was not compiled"
    assert unfuse(model) is model and torch.equal(model(*call).sample, expected.sample)


def test_a_model_compiled_in_place_is_fused(build_lumina: Any, lumina_call: Any) -> None:
    """`model.compile()` puts a compiled call beside the model's own; here it only counts."""
    model, calls = build_lumina(num_layers=1), []
    call = lumina_call(model)
    expected = model(*call)
    model._compiled_call_impl = lambda *args: calls.append(1) or model._call_impl(*args)
    out = fuse(model)(*call)
    assert off(out, expected) <= 1e-5 and not torch.equal(out.sample, expected.sample) and calls == [1]
    assert obstacles(model) == {}


def test_a_compiled_block_runs_as_it_was_compiled(build_lumina: Any, lumina_call: Any) -> None:
    torch._dynamo.reset()
    stock, counter = build_lumina(), CompileCounter()
    call = lumina_call(stock)
    with torch.no_grad():
        expected = stock(*call)
        stock.layers[1] = torch.compile(stock.layers[1], backend=counter)
        fuse(stock)
        assert list(obstacles(stock)) == ["layers.1"]
        assert off(stock(*call), expected) <= 1e-5 and counter.frame_count == 1


def test_compile_repeated_blocks(build_lumina: Any, lumina_call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock names none and refuses. Where a class names them, they are compiled and run by themselves."""
    torch._dynamo.reset()
    stock, counter = build_lumina(), CompileCounter()
    with pytest.raises(ValueError, match="_repeated_blocks"):
        stock.compile_repeated_blocks()
    call = lumina_call(stock)
    expected = stock(*call)
    model = fuse(stock)
    with pytest.raises(ValueError, match=r"^compile_repeated_blocks: .* compile the whole network instead"):
        model.compile_repeated_blocks()
    monkeypatch.setattr(LuminaNextDiT2DModel, "_repeated_blocks", ["LuminaNextDiTBlock"], raising=False)
    model.compile_repeated_blocks(backend=counter)
    assert list(obstacles(model)) == ["layers.0", "layers.1"]
    assert off(model(*call), expected) <= 1e-5 and counter.frame_count >= 1


# ---- attention backends and processors -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(backend: str, build_lumina: Any, lumina_call: Any) -> None:
    """diffusers' Lumina processor asks for no backend: the setting is taken and changes nothing, stock or fused."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()[0]
    model = build_lumina()
    call = lumina_call(model)
    expected = model(*call)
    fuse(model)
    try:
        model.set_attention_backend(backend)
        assert off(model(*call), expected) <= 1e-5 and obstacles(model) == {}
        with pytest.raises(ValueError, match=r"backend='nonesuch'. must be one of"):
            model.set_attention_backend("nonesuch")
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(before)


def test_attention_processors(build_lumina: Any, lumina_call: Any) -> None:
    """The class has no `set_attn_processor`; each attention has `set_processor`, and another one is called."""
    stock = build_lumina()
    assert not hasattr(stock, "set_attn_processor") and not hasattr(fuse(copy.deepcopy(stock)), "set_attn_processor")
    calls: list[int] = []

    class Counting(LuminaAttnProcessor2_0):
        @functools.wraps(LuminaAttnProcessor2_0.__call__)  # diffusers reads which arguments it takes
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(attn.heads)
            return super().__call__(attn, *args, **kwargs)

    call = lumina_call(stock)
    expected = stock(*call)
    fuse(stock).layers[0].attn2.set_processor(Counting())
    assert off(stock(*call), expected) <= 1e-5 and calls == [2]
    stock.layers[0].attn2.set_processor(LuminaAttnProcessor2_0())
    assert obstacles(stock) == {}


# ---- a forward changed on the class ----------------------------------------------------------------------------------


def scaled(plain: Any) -> Any:
    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return out * torch.linspace(0.5, 2, out.shape[-1])

    return forward


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("cls", "method"),
    [(LuminaNextDiTBlock, "forward"), (LuminaAttnProcessor2_0, "__call__")],
    ids=["block", "processor"],
)
def test_a_patched_class_is_called(
    cls: type, method: str, when: str, build_lumina: Any, lumina_call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = build_lumina()
    call, fast = lumina_call(stock), copy.deepcopy(stock)
    plain = stock(*call)
    if when == "after":
        fuse(fast)
    monkeypatch.setattr(cls, method, scaled(getattr(cls, method)))
    fuse(fast)
    expected = stock(*call)
    assert off(fast(*call), expected) <= 1e-5 and off(plain, expected) > 1e-3
    assert [reason.split("was")[-1] for reason in obstacles(fast).values()] == [" replaced"] * 2
    monkeypatch.undo()
    assert off(fuse(fast)(*call), plain) <= 1e-5 and obstacles(fast) == {}, "it was put back"


def test_a_patched_network_class_is_refused(build_lumina: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_lumina()
    monkeypatch.setattr(LuminaNextDiT2DModel, "forward", scaled(LuminaNextDiT2DModel.forward))
    with pytest.raises(ValueError, match="put into the class LuminaNextDiT2DModel from outside"):
        fuse(model)
    assert type(model) is LuminaNextDiT2DModel


# ---- hooks on the whole network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_the_network(when: str, build_lumina: Any, lumina_call: Any) -> None:
    model = build_lumina()
    call = lumina_call(model)
    expected = model(*call)
    seen: list[str] = []

    def doubled(module: Any, args: Any, out: Any) -> Any:
        seen.append("forward")
        return (2 * out[0],)

    if when == "after":
        fuse(model)
    model.register_forward_hook(doubled)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    model.register_full_backward_hook(lambda module, given, upstream: seen.append("backward"))
    call[0].requires_grad_()
    fuse(model)
    (out,) = model(*call, return_dict=False)
    assert (out - 2 * expected.sample).abs().max() <= 2e-5
    out.sum().backward()
    assert seen == ["before", "forward", "backward"] and obstacles(model) == {}


# ---- quantised weights -----------------------------------------------------------------------------------------------


class Packed(nn.Parameter):
    """As GGUFParameter and bitsandbytes' Params4bit: a parameter of another class, in bytes of another shape."""


class Quantised(nn.Linear):
    """As Linear4bit, Linear8bitLt and GGUFLinear: a Linear whose weight only its own forward can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.Tensor._make_subclass(Packed, codes.flatten(), False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.as_subclass(Tensor).view(self.out_features, self.in_features).to(x.dtype) * self.scale
        return nn.functional.linear(x, weight, self.bias)


class Int8Tensor(Tensor):
    """As torchao's: a tensor subclass in a plain `nn.Linear`, with its own arithmetic for `linear`."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.codes.to(x.dtype) * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise AssertionError(f"{function} read a quantised weight")


def quantise_modules(model: Any) -> None:
    for module in list(model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Quantised(child))


def quantise_tensors(model: Any) -> None:
    for module in model.layers.modules():
        if type(module) is nn.Linear:
            scale = module.weight.detach().abs().max() / 127
            codes = (module.weight.detach() / scale).round()
            module.weight = nn.Parameter(Int8Tensor(codes, scale), requires_grad=False)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("quantise", [quantise_modules, quantise_tensors], ids=["bitsandbytes-gguf", "torchao"])
def test_quantised_layers_are_called(quantise: Any, when: str, build_lumina: Any, lumina_call: Any) -> None:
    stock = build_lumina()
    fast, call = copy.deepcopy(stock), lumina_call(stock)
    with torch.no_grad():
        plain = stock(*call)
        if when == "after":
            fuse(fast)
        for model in (stock, fast):
            quantise(model)
        out, expected = fuse(fast)(*call), stock(*call)
    assert off(out, expected) <= 1e-5 and off(expected, plain) > 1e-4 and obstacles(fast) == {}
    kinds = [{type(p) for p in model.layers.parameters()} for model in (stock, fast)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 2


# ---- near relatives --------------------------------------------------------------------------------------------------


def lumina_2() -> Any:
    from diffusers import Lumina2Transformer2DModel

    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": (4, 4, 4), "axes_lens": (8, 8, 8)}
    sizes = {"sample_size": 4, "patch_size": 1, "in_channels": 4, "hidden_size": 24, "multiple_of": 8}
    return Lumina2Transformer2DModel(**sizes, **heads, num_layers=1, num_refiner_layers=1, cap_feat_dim=8)


def sana() -> Any:
    from diffusers import SanaTransformer2DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2}
    sizes = {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 4}
    return SanaTransformer2DModel(**sizes, **heads, in_channels=4, out_channels=4, num_layers=1)


@pytest.mark.parametrize("make", [lumina_2, sana])
def test_near_relatives_are_refused(make: Any) -> None:
    model = make()
    name = type(model).__name__
    for x in (model, nn.ModuleDict({"inside": model})):
        with pytest.raises(ValueError, match=rf"^{name} is another network.*LuminaNextDiT2DModel.*NextDiTCrossAttn"):
            fuse(x)
    assert type(model).__name__ == name and not isinstance(model, FusedNetwork)
