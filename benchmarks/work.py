"""What a benchmark file describes: the inputs of a computation, who provides it, and what a right answer is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from blip3o_fast.testing import contract_violation, relative_l2

OP_MODES = ("forward", "backward", "both")
# whole: the provider does all of it in one call, gradients where it needs them: a training step, a sampling run.
MODES = (*OP_MODES, "whole")
WITH_GRADIENTS = ("backward", "both")  # those in which the harness asks for the gradients
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, the tensors among them (or behind them) that get a gradient, and the upstream gradient.

    upstream: of the output; a tuple, one of each, where the providers return several outputs.
    """

    args: tuple[Any, ...]
    wrt: Mapping[str, Tensor]
    upstream: Tensor | tuple[Tensor, ...]

    def bytes(self) -> int:
        """Of the arguments alone: what a forward reads decides how many sets it takes to exceed the caches."""
        return sum(a.numel() * a.element_size() for a in self.args if isinstance(a, Tensor))


@dataclass(frozen=True)
class Absent:
    """Stands for a provider that cannot run here."""

    reason: str


@dataclass(frozen=True)
class Verdict:
    """wrong: why the values are not what was asked for. inexact: why they break the numerics contract.

    errors: relative L2 distance of each value to the gold.
    """

    wrong: str | None
    inexact: str | None
    errors: dict[str, float]


Judge = Callable[[Values, Values, Values], Verdict]


def error_bound(dtype: torch.dtype) -> float:
    """Relative L2 error that honest arithmetic may have: 4 roundings to the dtype, 64 of fp32 sums in any order."""
    if dtype == torch.float64:
        return 64 * torch.finfo(dtype).eps
    return 4 * torch.finfo(dtype).eps * (dtype != torch.float32) + 64 * torch.finfo(torch.float32).eps


def judge_by_contract(given: Values, baseline: Values, gold: Values) -> Verdict:
    """Wrong: a value, or the baseline that it is compared with, beyond `error_bound`. Inexact: beyond the contract."""
    errors = {name: relative_l2(value, gold[name]) for name, value in given.items() if value.shape == gold[name].shape}
    wrong = inexact = None
    for name, value in given.items():
        bound = error_bound(value.dtype)
        theirs = relative_l2(baseline[name], gold[name])
        if name not in errors:
            wrong = wrong or f"{name}: shape {tuple(value.shape)} instead of {tuple(gold[name].shape)}"
        elif not errors[name] <= bound:
            wrong = wrong or f"{name}: relative L2 error {errors[name]:.3e} > {bound:.3e}"
        elif not theirs <= bound:
            wrong = wrong or f"{name}: the first provider itself is off by relative L2 {theirs:.3e}"
        else:
            violation = contract_violation(value, baseline[name], gold[name])
            inexact = inexact or (violation and f"{name}: {violation}")
    return Verdict(wrong, inexact, errors)


@dataclass(frozen=True)
class Work:
    """The same computation by several providers. The first provider is the baseline: its eager form, never ours.

    A provider that is wrong fails. One that is right but breaks the numerics contract (at most twice the first
    provider's error) fails too, unless it is among `peers`: what others made is timed, and its row says how inexact
    it is.

    suite: name in the table; case: what varies (batch, tokens, ...). inputs: makes a fresh set at each call, requiring
    grad where `wrt` says. gold: the values {"y": ..., "d<name>": ...} of one set in fp64 ("y0", "y1", ... where there
    are several outputs, returned as a tuple). bytes_moved, flops: the least that each mode must do. rotate: time over
    as many input sets as exceed the caches; False where the weights alone do.
    details: a word per provider for the row (which backend ran).
    items: how many of what a call gets done, as (64, "images"): the row says how many a second.
    """

    suite: str
    case: dict[str, Any]
    inputs: Callable[[], Inputs]
    providers: Mapping[str, Callable[..., Any] | Absent]
    gold: Callable[[Inputs], Values]
    bytes_moved: Mapping[str, int]
    flops: Mapping[str, int]
    modes: tuple[str, ...] = OP_MODES
    rotate: bool = True
    judge: Judge = judge_by_contract
    peers: frozenset[str] = frozenset({"compile"})
    details: Mapping[str, str] = field(default_factory=dict)
    items: tuple[int, str] | None = None

    @property
    def label(self) -> str:
        return f"{self.suite} {' '.join(f'{k}={v}' for k, v in self.case.items())}"


def named_outputs(result: Tensor | tuple[Tensor, ...]) -> Values:
    """`{"y": output}`, or `{"y0": first, "y1": second, ...}` of several; detached."""
    if isinstance(result, Tensor):
        return {"y": result.detach()}
    return {f"y{i}": y.detach() for i, y in enumerate(result)}


def gradients_of(result: Any, inputs: Inputs, retain_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradient of each tensor of `inputs.wrt`, for the upstream gradients of `inputs`."""
    return torch.autograd.grad(result, list(inputs.wrt.values()), inputs.upstream, retain_graph=retain_graph)


def values(function: Callable[..., Any], inputs: Inputs, gradients: bool) -> Values:
    """What one call gives: y, and with `gradients` the gradient d<name> of each tensor of `inputs.wrt`."""
    if not gradients:
        with torch.no_grad():
            return named_outputs(function(*inputs.args))
    result = function(*inputs.args)
    grads = gradients_of(result, inputs)
    return {**named_outputs(result), **{f"d{name}": grad for name, grad in zip(inputs.wrt, grads, strict=True)}}


def gold_by(function: Callable[..., Any]) -> Callable[[Inputs], Values]:
    """The gold of a function whose `wrt` are all among its arguments: the same function on fp64 copies."""

    def gold(inputs: Inputs) -> Values:
        names = {id(tensor): name for name, tensor in inputs.wrt.items()}
        args, wrt = [], {}
        for arg in inputs.args:
            copy = arg.detach().double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
            if id(arg) in names:
                wrt[names[id(arg)]] = copy.requires_grad_()
            args.append(copy)
        ordered = {name: wrt[name] for name in inputs.wrt}
        upstream = inputs.upstream
        doubled = upstream.double() if isinstance(upstream, Tensor) else tuple(u.double() for u in upstream)
        return values(function, Inputs(tuple(args), ordered, doubled), gradients=True)

    return gold


def saved_bytes(function: Callable[..., Any], inputs: Inputs) -> int:
    """What a forward keeps for its backward: bytes of the saved tensors' storages, weights and inputs left out."""
    leaves = {tensor.untyped_storage()._cdata for tensor in (*inputs.wrt.values(), *inputs.args)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in leaves:
            kept[storage] = tensor  # holds it, so that no later storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs.args)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def compiled(
    function: Callable[..., Any], device: str = "cpu", *, whole: bool = True, **options: Any
) -> Callable[..., Any] | Absent:
    """torch.compile of the function for static shapes, or the reason why there is none here.

    whole: a graph break is an error. options: of torch.compile (`mode`).
    """
    if device == "cpu" and machine.compiler() is None:
        return Absent("no C++ compiler: torch.compile needs g++ or clang++ on a CPU")
    # Each case compiles afresh: past dynamo's limit of variants per function it would quietly run eager.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=whole, **options)
