"""One block at BLIP3-o's size (64 tokens, width 1792): stock's op sequence, its torch.compile, and ours."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.work import (
    Absent,
    Inputs,
    Values,
    Verdict,
    Work,
    compiled,
    error_bound,
    judge_by_contract,
    saved_bytes,
    values,
)
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.eager import eager_block
from blip3o_fast.models.forward import Grid
from blip3o_fast.ops import use_backend
from blip3o_fast.ops.rope_table import rope_table

CONTEXT_TOKENS = 64
GRADIENTS_BY_CONTRACT = ("x", "context", "temb")
FEW = 32  # numbers, of which two roundings' errors may differ by more than twice: as many as a block has gates


def make_block(config: BLIP3oConfig, generator: torch.Generator) -> nn.Module:
    """A block as training leaves it: the gates and the modulation, zero at initialisation, are not."""
    return as_trained(BLIP3oDiT(config, generator=generator).layers[0], generator)


def as_trained(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights, none of them zero; on the generator's device."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
            if parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                gate = name.split(".")[-1] == "gate"
                parameter.copy_(noise if gate else 0.1 * noise + ("norm" in name and "weight" in name))
    return module


def make_grid(config: BLIP3oConfig, device: str) -> Grid:
    return Grid(rope_table(config.sample_size, config.sample_size, config.head_dim, device="cpu").to(device))


def eager_provider(block: nn.Module, config: BLIP3oConfig, batch: int, device: str) -> Callable[..., Tensor]:
    rope = make_grid(config, device).complex_rope()
    mask = torch.ones(batch, config.num_tokens, dtype=torch.int32, device=device)
    encoder_mask = torch.ones(batch, CONTEXT_TOKENS, dtype=torch.bool, device=device)

    def run(x: Tensor, context: Tensor, temb: Tensor) -> Tensor:
        return eager_block(block, x, mask, rope, context, encoder_mask, temb)

    return run


class Doubled(TorchFunctionMode):
    """fp64 all the way: stock's sequence goes to float32 where half precision needs it, which would round fp64 too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        casts = func in (Tensor.float, Tensor.to) and args[0].dtype == torch.float64
        return args[0] if casts and out.dtype == torch.float32 else out


def exact(block: nn.Module, config: BLIP3oConfig, given: Inputs, device: str, gradients: bool = True) -> Values:
    """The gold: stock's sequence in fp64, which shares no code with the fused forward that it judges."""
    double = copy.deepcopy(block).double()
    args = tuple(arg.detach().double().requires_grad_() for arg in given.args)
    wrt = {**dict(zip(GRADIENTS_BY_CONTRACT, args, strict=True)), **dict(double.named_parameters())}
    run = eager_provider(double, config, len(args[0]), device)
    with Doubled():
        return values(run, Inputs(args, wrt, given.upstream.double()), gradients)


def our_provider(block: nn.Module, config: BLIP3oConfig, device: str) -> Callable[..., Tensor]:
    grid = make_grid(config, device)

    def run(x: Tensor, context: Tensor, temb: Tensor) -> Tensor:
        return block(x, temb, context, grid)

    return run


def bytes_moved(block: nn.Module, inputs: Inputs) -> dict[str, int]:
    """forward: weights and inputs read, the output written. The backward reads them and dy, and writes gradients."""
    weights = sum(p.numel() * p.element_size() for p in block.parameters())
    output = inputs.upstream.numel() * inputs.upstream.element_size()
    forward = weights + inputs.bytes() + output
    return {"forward": forward, "both": forward + weights + inputs.bytes() + output + weights + inputs.bytes()}


def flops(config: BLIP3oConfig, batch: int) -> dict[str, int]:
    """GEMMs and attention, two FLOPs per multiply-add; the backward does each of them twice (to inputs and weights)."""
    dim, tokens, context = config.hidden_size, config.num_tokens, CONTEXT_TOKENS
    per_token = 5 * dim * dim + 3 * dim * config.ffn_dim  # q1, k1, q2, v1, out; w1, w3, w2
    per_sample = 2 * context * dim * config.context_dim + 4 * dim * config.conditioning_dim  # k2, v2; modulation
    attention = 2 * tokens * dim * (tokens + context)
    forward = 2 * batch * (tokens * per_token + per_sample + attention)
    return {"forward": forward, "both": 3 * forward}


def judge(given: Values, baseline: Values, gold: Values) -> Verdict:
    """Output and input gradients by the contract, parameter gradients by the rule for whole models.

    That rule, |g - gold| <= 1e-4 |gold| + 1e-6 G with G the largest gradient's norm, is there because some exact
    gradients are zero (attn2.norm_k.bias: softmax ignores a constant), and nothing is twice as exact as luck.
    """
    names = {"y", *(f"d{name}" for name in GRADIENTS_BY_CONTRACT)} & set(given)
    verdict = judge_by_contract(*({name: v[name] for name in names} for v in (given, baseline, gold)))
    parameters = sorted(set(given) - names)
    largest = max((gold[name].norm().item() for name in parameters), default=0.0)
    wrong, errors = verdict.wrong, dict(verdict.errors)
    for name in parameters:
        norm, distance = gold[name].norm().item(), (given[name].double() - gold[name]).norm().item()
        if norm > 1e-6 * largest:
            errors[name] = distance / norm
        if not distance <= 1e-4 * norm + 1e-6 * largest:
            wrong = wrong or f"{name}: |g - gold| = {distance:.3e} where |gold| = {norm:.3e}"
    return Verdict(wrong, verdict.inexact, errors)


def judge_half(given: Values, baseline: Values, gold: Values, dtype: torch.dtype = torch.bfloat16) -> Verdict:
    """In half precision: every value by its distance to the gold, at most twice the first provider's.

    dtype: what was computed in (the gradients under autocast are fp32). The floor has the rule's last term, for exact
    gradients that are zero. Of a few numbers (the gradient of the gates) the first provider may be exact by luck: they
    may have the error of honest arithmetic. Wrong is only a baseline that is far off.
    """
    largest = max(value.norm().item() for value in gold.values())
    wrong, inexact, errors = None, None, {}
    for name, value in given.items():
        norm = gold[name].norm().item()
        ours, theirs = ((v.double() - gold[name]).norm().item() for v in (value, baseline[name]))
        if norm > 1e-6 * largest:
            errors[name] = ours / norm
            if not theirs <= 0.25 * norm:
                wrong = wrong or f"{name}: the first provider itself is off by relative L2 {theirs / norm:.3e}"
        allowed = 2 * theirs + torch.finfo(value.dtype).eps / 4 * norm + 1e-6 * largest
        if value.numel() <= FEW:
            allowed = max(allowed, error_bound(dtype) * norm)
        if not ours <= allowed:
            inexact = inexact or f"{name}: |value - gold| = {ours:.3e} > {allowed:.3e} where |gold| = {norm:.3e}"
    return Verdict(wrong, inexact, errors)


def on_triton(run: Callable[..., Any], triton: bool) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with use_backend("triton"):
            return run(*args)

    return call if triton else run


def work(
    batch: int,
    dtype: torch.dtype,
    device: str,
    config: BLIP3oConfig | None = None,
    *,
    triton: bool | None = None,
    compile: bool = True,
    modes: tuple[str, ...] = ("forward", "both"),
) -> Work:
    """One block, forward and backward. triton: our ops on the triton backend; default: on a GPU."""
    config = BLIP3oConfig(num_layers=1) if config is None else config
    generator = torch.Generator().manual_seed(0)
    block = make_block(config, generator).to(device, dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def inputs() -> Inputs:
        x = draw(batch, config.num_tokens, config.hidden_size).requires_grad_()
        context = draw(batch, CONTEXT_TOKENS, config.context_dim).requires_grad_()
        temb = draw(batch, config.conditioning_dim).requires_grad_()
        wrt = {"x": x, "context": context, "temb": temb, **dict(block.named_parameters())}
        return Inputs((x, context, temb), wrt, draw(*x.shape))

    eager = eager_provider(block, config, batch, device)
    ours = on_triton(our_provider(block, config, device), device == "cuda" if triton is None else triton)
    sample = inputs()
    saved = {name: saved_bytes(run, sample) for name, run in (("eager", eager), ("ours", ours))}
    return Work(
        suite="model_block",
        case={
            "batch": batch,
            "tokens": config.num_tokens,
            "context": CONTEXT_TOKENS,
            "width": config.hidden_size,
            "dtype": str(dtype).removeprefix("torch."),
        },
        inputs=inputs,
        providers={
            "eager": eager,
            "compile": compiled(eager, device) if compile else Absent("left out of this run"),
            "ours": ours,
        },
        gold=lambda given: exact(block, config, given, device, modes != ("forward",)),
        judge=judge if dtype == torch.float32 else functools.partial(judge_half, dtype=dtype),
        bytes_moved=bytes_moved(block, sample),
        flops=flops(config, batch),
        modes=modes,
        details={name: f"saves {count / 1e6:.1f} MB" for name, count in saved.items()},
        rotate=False,  # the weights alone are several times the caches
    )


@pytest.mark.parametrize("batch", [1, 4, pytest.param(16, marks=pytest.mark.full)])
def bench_model_block(compare: Callable[[Work], None], bench_device: str, batch: int) -> None:
    compare(work(batch, torch.float32, bench_device))
