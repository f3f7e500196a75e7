"""One call of an op, described once: its tensors, its stock sequence, ours and its specification.

`benchmarks/ops/<op>.py` has a function `case(batch, dtype, device, ...)` that makes a `Case`. The benchmarks (`work`),
the parity tests on a GPU (`tests/gpu`) and the tuner (`scripts/tune.py`) all take it from there.
"""

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.work import Absent, Inputs, Values, Verdict, Work, compiled, error_bound, gold_by, judge_by_contract
from blip3o_fast.ops import use_backend
from blip3o_fast.testing import assert_contract, assert_op_contract, contract_violation, in_double, with_gradients

OPS = (
    "rms_norm_modulate",
    "gated_residual",
    "gated_residual_modulate",
    "layer_norm_modulate",
    "qk_norm_rope",
    "flash_attention",
    "dual_attention",
    "swiglu",
    "flow_interpolate",
    "flow_matching_loss",
    "ode_step",
    "merged_linear",
)
# The vendor's GEMM under every backend: there is no kernel of ours.
WITHOUT_KERNELS = ("merged_linear",)
TOKENS, WIDTH = 64, 1792
# A sum of fp32 terms is one number, of which the stock sequence may be exact by luck. It keeps the contract or, else,
# the bound of blocked fp32 sums (Higham 2002, section 4.2).
SUM_BOUND = 16 * torch.finfo(torch.float32).eps

FULL = [(batch, dtype) for dtype in (torch.float32, torch.bfloat16) for batch in (1, 8, 32, 128, 256)]
SIZES = pytest.mark.parametrize(
    ("batch", "dtype"), [FULL[0], *(pytest.param(*size, marks=pytest.mark.full) for size in FULL[1:])], ids=str
)


class Draw:
    """Random tensors of one call. dtypes: by name, for those that differ from `dtype` (autocast mixes them)."""

    def __init__(
        self, dtype: torch.dtype, device: str, seed: int, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        self.dtype, self.device, self.dtypes = dtype, device, dtypes or {}
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.mul_(scale).add_(shift).to(self.dtypes.get(name, self.dtype))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def mask(self, batch: int, context: int) -> Tensor:
        """Hides some tokens of every sample, never all."""
        mask = self.uniform(batch, context) < 0.7
        mask[:, context // 2] = True
        return mask


@dataclass(frozen=True)
class Case:
    """One call.

    inputs: the tensors that get a gradient (None: left out in this call); given: those that get none. eager (stock, in
    the same dtype), ours and reference take all of them, and `settings`, by name. upstream: one gradient per output.
    bytes_moved, flops: the least that each mode must do. sums: values that may also keep `SUM_BOUND`.
    chosen: what `auto` runs. peers: what others have made of it.
    """

    op: str
    sizes: dict[str, Any]
    inputs: dict[str, Tensor | None]
    upstream: tuple[Tensor, ...]
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    bytes_moved: dict[str, int]
    flops: dict[str, int]
    chosen: str
    given: dict[str, Tensor | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sums: frozenset[str] = frozenset()
    peers: dict[str, Callable[..., Any] | Absent] = field(default_factory=dict)

    def bound(self, function: Callable[..., Any], double: bool = False) -> Callable[..., Any]:
        """The function of the inputs alone, by name. double: with `given` in fp64, for the gold."""
        given = {
            n: t.double() if double and t is not None and t.is_floating_point() else t for n, t in self.given.items()
        }
        return lambda **inputs: function(**inputs, **given, **self.settings)

    def positional(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of all tensors in order: inputs, then given."""
        names, settings = (*self.inputs, *self.given), self.settings

        def call(*tensors: Tensor | None) -> Any:
            return function(**dict(zip(names, tensors, strict=True)), **settings)

        return call


def module_of(op: str) -> ModuleType:
    """The file that describes an op: `case(...)`, `MIXED`, `SMALL`."""
    return importlib.import_module(f"benchmarks.ops.{op}")


def has_kernels(op: str, backend: str) -> bool:
    """Whether the op has kernels of its own on the backend, wherever those may run."""
    backends = getattr(importlib.import_module(f"blip3o_fast.ops.{op}"), "BACKENDS", None)
    return backends is not None and backend in backends.refusals


def modes(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def sum_error(value: Tensor, gold: Tensor) -> float:
    """Distance of a sum to the gold, relative to 1 or to its size."""
    return (value.double() - gold).abs().max().item() / max(1.0, gold.abs().max().item())


def sum_violation(name: str, value: Tensor, gold: Tensor) -> str | None:
    """None where a sum is within `SUM_BOUND` of the gold, and one rounding to a half-precision dtype."""
    error, bound = sum_error(value, gold), SUM_BOUND
    if value.dtype in (torch.bfloat16, torch.float16):
        bound += torch.finfo(value.dtype).eps / 2
    return None if error <= bound else f"{name}: off by {error:.3e}, a sum in fp32 may be off by {bound:.3e}"


def assert_case(
    case: Case, ours: Callable[..., Any] | None = None, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """The numerics contract of a call, output and every gradient, against `eager` and the specification in fp64.

    ours: instead of `case.bound(case.ours)`. dtypes: of the outputs, default the first input's.
    """
    ours = case.bound(case.ours) if ours is None else ours
    eager, reference = case.bound(case.eager), case.bound(case.reference, double=True)
    if not case.sums:
        assert_op_contract(ours, eager, reference, case.inputs, *case.upstream, dtypes=dtypes)
        return
    first = next(tensor.dtype for tensor in case.inputs.values() if tensor is not None)
    dtypes = [first] * len(case.upstream) if dtypes is None else dtypes
    upstream = tuple(gradient.to(dtype) for gradient, dtype in zip(case.upstream, dtypes, strict=True))
    results = with_gradients(ours, case.inputs, *upstream)
    stock = with_gradients(eager, case.inputs, *upstream)
    with torch.autocast(upstream[0].device.type, enabled=False):
        gold = with_gradients(reference, in_double(case.inputs), *upstream)
    expected: dict[str, torch.dtype] = dict(zip(results, dtypes, strict=False))
    for name, value in results.items():
        wanted = expected[name] if name in expected else case.inputs[name[1:]].dtype  # type: ignore[union-attr]
        assert value.dtype == wanted, f"{name} is {value.dtype} instead of {wanted}"
        rounded = stock[name].to(value.dtype)
        if name not in case.sums or sum_violation(name, value, gold[name]) is not None:
            assert_contract(value, rounded, gold[name], name)


def _judge(sums: frozenset[str]) -> Callable[[Values, Values, Values], Verdict]:
    def judge(given: Values, baseline: Values, gold: Values) -> Verdict:
        rest = [{n: v for n, v in values.items() if n not in sums} for values in (given, baseline, gold)]
        verdict = judge_by_contract(*rest)
        wrong, inexact, errors = verdict.wrong, verdict.inexact, dict(verdict.errors)
        for name in sorted(sums & set(given)):
            errors[name] = sum_error(given[name], gold[name])
            # a sum is kept in fp32 also where its terms were rounded to half precision
            if not errors[name] <= error_bound(torch.bfloat16):
                wrong = wrong or f"{name}: off by {errors[name]:.3e}"
            elif sum_violation(name, given[name], gold[name]) is not None:
                violation = contract_violation(given[name], baseline[name], gold[name])
                inexact = inexact or (violation and f"{name}: {violation}")
        return Verdict(wrong, inexact, errors)

    return judge


def _on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Tensor | None) -> Any:
        with use_backend(backend):
            return function(*tensors)

    return call


def work(
    make: Callable[..., Case],
    batch: int,
    dtype: torch.dtype,
    device: str,
    *,
    triton: bool | None = None,
    cuda: bool = False,
    compile: bool = True,
    **sizes: Any,
) -> Work:
    """The case as providers of the same work. make: an op's `case`; sizes: passed to it.

    On a GPU ours is the triton backend; on a CPU it is what `auto` runs, unless `triton` asks for the interpreter.
    cuda: the CUDA C++ kernels are one provider more.
    """
    seeds = itertools.count()
    first = make(batch, dtype, device, seed=next(seeds), **sizes)
    waiting = [first]

    def inputs() -> Inputs:
        case = waiting.pop() if waiting else make(batch, dtype, device, seed=next(seeds), **sizes)
        wrt = {name: tensor.requires_grad_() for name, tensor in case.inputs.items() if tensor is not None}
        upstream = case.upstream if len(case.upstream) > 1 else case.upstream[0]
        return Inputs((*case.inputs.values(), *case.given.values()), wrt, upstream)

    eager, ours = first.positional(first.eager), first.positional(first.ours)
    on_triton = (device == "cuda" if triton is None else triton) and first.op not in WITHOUT_KERNELS
    peers = {n: p if isinstance(p, Absent) else first.positional(p) for n, p in first.peers.items()}
    return Work(
        suite=first.op,
        case={**first.sizes, "dtype": str(dtype).removeprefix("torch.")},
        inputs=inputs,
        providers={
            "eager": eager,
            "compile": compiled(eager, device) if compile else Absent("left out of this run"),
            "ours": _on("triton", ours) if on_triton else ours,
            **({"ours, cuda": _on("cuda", ours)} if cuda else {}),
            **peers,
        },
        gold=gold_by(first.positional(first.reference)),
        bytes_moved=first.bytes_moved,
        flops=first.flops,
        judge=_judge(first.sums) if first.sums else judge_by_contract,
        peers=frozenset({"compile", *peers}),
        details={"ours": "triton" if on_triton else first.chosen},
    )
