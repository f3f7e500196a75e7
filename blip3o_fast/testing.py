"""The numerics contract as one function, and what every op must keep, shared by tests and benchmarks.

A fused kernel rounds once where the eager sequence rounds several times, so the two must differ. Both are judged by
their distance to an fp64 gold result: `err(ours, gold) <= 2 * err(eager, gold) + floor`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def max_abs(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in fp64; 0 for empty tensors, nan where there is one."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def relative_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64 (b is the gold); the plain norm of the difference where b is zero."""
    norm = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / (norm if norm > 0 else 1.0)


def contract_violation(ours: Tensor, eager: Tensor, gold: Tensor) -> str | None:
    """None where `ours` keeps the contract, else a sentence that says by how much it fails.

    gold is fp64; the dtype of `ours` sets the floor: eps * max|gold| for the max error, eps / 4 for the relative L2.
    """
    if ours.shape != gold.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(gold.shape)}"
    eps = torch.finfo(ours.dtype).eps
    peak = gold.abs().max().item() if gold.numel() else 0.0
    for name, error, floor in (
        ("max abs", max_abs, eps * peak),
        ("relative L2", relative_l2, eps / 4),
    ):
        ours_error, eager_error = error(ours, gold), error(eager, gold)
        if not ours_error <= 2 * eager_error + floor:
            return f"{name} error {ours_error:.3e} > 2 * eager's {eager_error:.3e} + floor {floor:.3e}"
    return None


def assert_contract(ours: Tensor, eager: Tensor, gold: Tensor, name: str = "output") -> None:
    """Raise AssertionError where `ours` breaks the contract (see `contract_violation`)."""
    violation = contract_violation(ours, eager, gold)
    assert violation is None, f"{name}: {violation}"


def assert_rounded_once(ours: Tensor, gold: Tensor, name: str = "output") -> None:
    """Each element is the exact result rounded once to ours' half-precision dtype, give or take fp32 arithmetic.

    Stricter than the contract, which allows what an eager sequence does: to round between its steps.
    """
    half_ulp = torch.finfo(ours.dtype).eps / 2
    subnormal = torch.finfo(ours.dtype).smallest_normal * half_ulp
    gold = gold.double()
    bound = 1.001 * half_ulp * gold.abs() + subnormal + 1e-6 * gold.abs().amax()
    excess = ((ours.double() - gold).abs() / bound).max().item()
    assert excess <= 1, f"{name}: an element is {excess:.2f} times as far from the exact value as one rounding allows"


# ---- one op against its eager sequence and its reference -------------------------------------------------------------


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Mapping[str, Tensor | None], *upstream: Tensor
) -> dict[str, Tensor]:
    """Run `function(**inputs)` and differentiate it: `{"y": output, "dx": gradient of inputs["x"], ...}`.

    Several outputs are called y0, y1, ...; there is one upstream gradient per output, cast to the output's dtype.
    Inputs keep their strides; None stays None and has no gradient.
    """
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}
    result = function(**leaves)
    outputs = {"y": result} if isinstance(result, Tensor) else {f"y{i}": y for i, y in enumerate(result)}
    assert len(upstream) == len(outputs), f"{len(outputs)} outputs, {len(upstream)} upstream gradients"
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    cast = [gradient.to(y.dtype) for gradient, y in zip(upstream, outputs.values(), strict=True)]
    with torch.autocast(cast[0].device.type, enabled=False):  # backward belongs outside of autocast
        gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), cast)
    values = {name: y.detach() for name, y in outputs.items()}
    return values | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def in_double(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double() for name, value in inputs.items()}


def assert_op_contract(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Tensor | None],
    *upstream: Tensor,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """The numerics contract for every output and every gradient; the gold is `reference` on the inputs in fp64.

    dtypes: what ours' outputs must have (default: all the first input's). Gradients must have their input's dtype.
    eager may compute in a wider dtype than ours returns (under autocast it does): its results are rounded to ours'.
    """
    if dtypes is None:
        dtypes = [next(value.dtype for value in inputs.values() if value is not None)] * len(upstream)
    # Every side must see the same upstream numbers, so they are rounded to the dtype that ours will be given.
    upstream = tuple(gradient.to(dtype) for gradient, dtype in zip(upstream, dtypes, strict=True))
    results = with_gradients(ours, inputs, *upstream)
    stock = with_gradients(eager, inputs, *upstream)
    with torch.autocast(upstream[0].device.type, enabled=False):
        gold = with_gradients(reference, in_double(inputs), *upstream)
    expected = dict(zip(results, dtypes, strict=False))
    for name, value in results.items():
        wanted = expected[name] if name in expected else _dtype_of(inputs[name[1:]])
        assert value.dtype == wanted, f"{name} is {value.dtype} instead of {wanted}"
        assert_contract(value, stock[name].to(value.dtype), gold[name], name)


def _dtype_of(tensor: Tensor | None) -> torch.dtype:
    assert tensor is not None
    return tensor.dtype


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Bitwise equal, name by name; NaN fails."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def assert_deterministic(function: Callable[..., Any], inputs: Mapping[str, Tensor | None], *upstream: Tensor) -> None:
    """The same bits in every run, whether or not PyTorch is told to use deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        first = with_gradients(function, inputs, *upstream)
        for deterministic in (True, False, True):
            torch.use_deterministic_algorithms(deterministic)
            assert_same(first, with_gradients(function, inputs, *upstream))
    finally:
        torch.use_deterministic_algorithms(before)


def assert_needed_gradients(
    function: Callable[..., Any], inputs: Mapping[str, Tensor | None], *upstream: Tensor
) -> None:
    """Whichever inputs require a gradient, exactly those get it, and it is the one of the full run, bit for bit."""
    full = with_gradients(function, inputs, *upstream)
    names = [name for name, value in inputs.items() if value is not None]
    for wanted in itertools.product([False, True], repeat=len(names)):
        leaves = {name: None if value is None else value.detach() for name, value in inputs.items()}
        for name, needed in zip(names, wanted, strict=True):
            leaves[name].requires_grad_(needed)  # type: ignore[union-attr]
        result = function(**leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not any(wanted):
            assert not any(y.requires_grad for y in outputs), "no input requires a gradient, yet an output does"
            continue
        pairs = [(y, u.to(y.dtype)) for y, u in zip(outputs, upstream, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [u for _, u in pairs])
        for name, needed in zip(names, wanted, strict=True):
            gradient = leaves[name].grad  # type: ignore[union-attr]
            if not needed:
                assert gradient is None, f"d{name} appears although {name} does not require it"
            else:
                assert gradient is not None, f"d{name} is missing"
                assert torch.equal(gradient, full[f"d{name}"]), f"d{name} depends on which others are needed"


def assert_compiles_once(
    function: Callable[..., Any], make: Callable[[int], tuple[Mapping[str, Tensor | None], Sequence[Tensor]]]
) -> None:
    """`torch.compile(fullgraph=True)`: eager's bits forward and backward, and no recompilation per batch size.

    make: batch size -> (inputs, upstream gradients).
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5, 6):
        inputs, upstream = make(batch)
        assert_same(with_gradients(compiled, inputs, *upstream), with_gradients(function, inputs, *upstream))
    # The first batch size is compiled as a constant; the second shows that it varies.
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs instead of one static and one dynamic"


def assert_transforms_refused(function: Callable[..., Any], inputs: Mapping[str, Tensor | None]) -> None:
    """Second derivatives, vmap and jvp each raise the RuntimeError that names what is not supported."""
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}
    first = next(name for name, value in leaves.items() if value is not None)
    result = function(**leaves)
    y = result if isinstance(result, Tensor) else result[0]

    def second() -> None:
        torch.autograd.grad(y, leaves[first], torch.randn_like(y), create_graph=True)  # type: ignore[arg-type]

    def batched() -> None:
        torch.func.vmap(lambda value: function(**(leaves | {first: value[0]})))(leaves[first][None, None])  # type: ignore[index]

    def dual() -> None:
        with torch.autograd.forward_ad.dual_level():
            function(**leaves)

    for call, message in ((second, "second derivatives"), (batched, "vmap"), (dual, "jvp")):
        try:
            call()
        except RuntimeError as error:
            assert message in str(error), f"{message} is refused with another message: {error}"
        else:
            raise AssertionError(f"{message} is not refused")
