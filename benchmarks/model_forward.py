"""The network at named sizes, whole: stock diffusers, eager and compiled; the same modules after `fuse`; BLIP3oDiT.

`blip3o` is the released network (64 tokens, width 1792); `lumina` is `LuminaNextDiT2DModel()` by its own defaults (4096
tokens of 2 x 2 latents, width 2304, 32 heads of 72) with 8 key heads and 256 text tokens, half of them masked. The
rotary table differs from call to call, as Lumina's pipeline changes it during a run. Few layers stand for all.

All share their parameters, and the gold is stock itself in fp64. Mode "both" is the work of a training step. Stock is
compiled in each way that a user would try: by default, "max-autotune", on a CPU with Inductor's freezing (which packs
the weights, and is for inference alone), on a GPU with CUDA graphs ("reduce-overhead").
"""

import copy
import functools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.model_block import Doubled, as_trained, judge_half
from benchmarks.work import Absent, Inputs, Values, Work, compiled, values
from blip3o_fast import fuse
from blip3o_fast.demo.stock import StockBLIP3o
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.sampling import prepare

SIZES: dict[str, dict[str, Any]] = {
    "blip3o": {"in_channels": 1792, "cross_attention_dim": 2048, "context": 64},
    "lumina": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 2304,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "learn_sigma": True,
        "cross_attention_dim": 2048,
        "context_projection": False,
        "context": 256,
    },
}
UNREAD = "pad_token"  # a parameter of stock's that no forward reads


class Stock(nn.Module):
    """diffusers' network with its arguments, behind BLIP3-o's projection of the context where there is one."""

    def __init__(self, parts: StockBLIP3o) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        if hasattr(self.parts, "caption_projection"):
            context = self.parts.caption_projection(context)
        out: Tensor = self.parts.dit(x, time, context, mask, table, cross_attention_kwargs={}, return_dict=False)[0]
        return out


def providers_of(model: BLIP3oDiT) -> dict[str, nn.Module]:
    """Over the very parameters of `model`, so that memory is that of one network."""
    parts = StockBLIP3o.with_weights(model.config, model.state_dict())
    ours = dict(model.named_parameters())
    for name, _ in list(parts.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if leaf != UNREAD:
            setattr(parts.get_submodule(owner), leaf, ours[name.removeprefix("dit.")])
    stock = Stock(parts)
    fused = fuse(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))
    return {"eager": stock, "fused": fused, "ours": model}


COMPILED = {
    "compile": {},
    "compile, max-autotune": {"mode": "max-autotune"},
    "compile, frozen": {"options": {"freezing": True}},
    "compile, CUDA graphs": {"mode": "reduce-overhead"},
}


def compiled_stock(stock: nn.Module, names: Collection[str], device: str, training: bool) -> dict[str, Any]:
    """Stock under torch.compile in every way of `COMPILED`; absent where it is not among names, or not for here."""
    found: dict[str, Any] = {}
    for name, options in COMPILED.items():
        if name not in names:
            found[name] = Absent("left out of this case: compiling takes minutes (--set full)")
        elif name == "compile, CUDA graphs" and device == "cpu":
            found[name] = Absent("CUDA graphs are for a GPU")
        elif name == "compile, frozen" and (training or device != "cpu"):
            found[name] = Absent("freezing is for inference on a CPU")
        else:
            # a module of its own: a compiled one keeps what it compiled
            network = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})
            found[name] = compiled(network, device, whole=False, **options)
    return found


def flops(config: BLIP3oConfig, batch: int, tokens: int, context: int) -> int:
    """Of the blocks' products, two per multiply-add."""
    dim, heads = config.hidden_size, config.num_attention_heads
    keys = dim * (config.num_kv_heads or heads) // heads
    per_token = 3 * dim * dim + 2 * dim * keys + 3 * dim * config.ffn_dim  # q1, q2, out; k1, v1; the feed-forward
    per_sample = 2 * context * config.context_dim * keys + 4 * dim * config.conditioning_dim
    attention = 2 * tokens * dim * (tokens + context)
    return 2 * batch * config.num_layers * (tokens * per_token + per_sample + attention)


def work(
    size: str,
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    training: bool = False,
    layers: int = 2,
    compile: Collection[str] = (),
    **changes: Any,
) -> Work:
    """compile: which of `COMPILED` run. changes: of the size's entries; `context` is the number of text tokens."""
    sizes = {**SIZES[size], **changes}
    context_tokens = sizes.pop("context")
    config = BLIP3oConfig(num_layers=layers, **sizes)
    generator = torch.Generator().manual_seed(0)
    model = as_trained(BLIP3oDiT(config, generator=generator), generator).to(device, dtype).train(training)
    model.requires_grad_(training)
    eager, *rest = providers_of(model).items()
    peers = compiled_stock(eager[1], compile, device, training)
    providers: dict[str, Any] = dict([eager, *peers.items(), *rest])
    if not training and device == "cpu":
        providers["ours, prepared"] = prepare(model)
    tokens = (config.sample_size // config.patch_size) ** 2
    tables = iter(range(10**6))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def inputs() -> Inputs:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        x = draw(batch, config.in_channels, config.sample_size, config.sample_size).requires_grad_(training)
        context = draw(batch, context_tokens, config.cross_attention_dim).requires_grad_(training)
        mask = torch.ones(batch, context_tokens, dtype=torch.bool, device=device)
        if size == "lumina":
            mask[:, (context_tokens + 1) // 2 :] = False
        factor = 1.0 + 0.5 * (next(tables) % 2)
        side = config.sample_size // config.patch_size
        table = get_2d_rotary_pos_embed_lumina(config.head_dim, side, side, linear_factor=factor).to(device)
        read = {name: p for name, p in model.named_parameters() if name != UNREAD}
        wrt = {"x": x, "context": context, **read} if training else {"x": x}
        out = config.in_channels * (2 if config.learn_sigma else 1)
        upstream = draw(batch, out, config.sample_size, config.sample_size)
        return Inputs((x, torch.full((batch,), 0.4, device=device), context, mask, table), wrt, upstream)

    def gold(given: Inputs) -> Values:
        # a copy of all parameters under their names in `model`, which `wrt` has
        double = copy.deepcopy(model).double()
        stock, named = providers_of(double)["eager"], dict(double.named_parameters())
        args = [a.detach().double() if a.is_floating_point() else a for a in given.args]
        wrt = {name: named[name] for name in given.wrt if name in named}
        wrt = {"x": args[0].requires_grad_(training), "context": args[2].requires_grad_(training), **wrt}
        with Doubled():
            return values(stock, Inputs(tuple(args), wrt, given.upstream.double()), gradients=training)

    def call(name: str, provider: Any) -> Any:
        if not name.startswith("ours"):
            return provider
        return lambda x, time, context, mask, table: provider(x, time, context, mask, image_rotary_emb=table)

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    products = flops(config, batch, tokens, context_tokens)
    return Work(
        suite="model_forward",
        case={
            "size": size,
            "batch": batch,
            "layers": layers,
            "tokens": tokens,
            "context": context_tokens,
            "dtype": str(dtype).removeprefix("torch."),
        },
        inputs=inputs,
        providers={name: call(name, provider) for name, provider in providers.items()},
        gold=gold,
        judge=functools.partial(judge_half, dtype=dtype),
        bytes_moved={"forward": weights, "both": 3 * weights},
        flops={"forward": products, "both": 3 * products},
        modes=("both",) if training else ("forward",),
        peers=frozenset(COMPILED),
    )


full = pytest.mark.full
LUMINA = {"size": "lumina", "layers": 1}
EVERY = {"compile": tuple(COMPILED)}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param({"size": "blip3o", "compile": ("compile",)}, torch.float32, id="blip3o, float32"),
        *(
            pytest.param({**case, **(EVERY if small else {})}, dtype, id=f"{name}, {dtype}", marks=full)
            for dtype in (torch.float32, torch.bfloat16)
            for name, small, case in (
                ("blip3o, every compile", True, {"size": "blip3o"}),
                ("lumina of 256 tokens", True, {**LUMINA, "sample_size": 32}),
                ("blip3o, 4", False, {"size": "blip3o", "batch": 4}),
                ("blip3o, 32", False, {"size": "blip3o", "batch": 32}),
                ("blip3o, 1 text token", False, {"size": "blip3o", "context": 1}),
                ("blip3o, 512 text tokens", False, {"size": "blip3o", "context": 512}),
                ("blip3o, training", False, {"size": "blip3o", "batch": 4, "training": True}),
                ("lumina, training", False, {**LUMINA, "sample_size": 32, "training": True}),
                ("lumina", False, LUMINA),
            )
        ),
    ],
)
def bench_model_forward(
    compare: Callable[[Work], None], bench_device: str, case: dict[str, Any], dtype: torch.dtype
) -> None:
    compare(work(**{"batch": 1, "device": bench_device, **case, "dtype": dtype}))
