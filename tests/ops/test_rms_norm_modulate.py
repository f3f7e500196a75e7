"""rms_norm_modulate against diffusers' RMSNorm * (1 + scale), in fp64 and by the numerics contract."""

import importlib
import itertools
import re

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from blip3o_fast.ops import rms_norm_modulate, rms_norm_modulate_ref, use_backend
from blip3o_fast.testing import assert_contract

OP = importlib.import_module("blip3o_fast.ops.rms_norm_modulate")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: fp32 residual and weights, half-precision modulation from the GEMM
MIXED = (torch.float32, torch.float32, torch.bfloat16)
SHAPES = [(2, 64, 1792), (3, 5, 1790), (1, 1, 257), (0, 64, 32)]


def inputs(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], scaled: bool = True) -> list[Tensor | None]:
    batch, _, dim = shape
    x = torch.randn(shape).to(dtypes[0])
    weight = (1 + 0.1 * torch.randn(dim)).to(dtypes[1])
    scale = (0.3 * torch.randn(batch, 4 * dim)).to(dtypes[2])[:, dim : 2 * dim] if scaled else None
    return [x, weight, scale]


def eager(x: Tensor, weight: Tensor, scale: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    norm = RMSNorm(x.shape[-1], eps=eps)
    del norm.weight
    norm.weight = weight
    y = norm(x)
    return y if scale is None else y * (1 + scale[:, None])


def run(function, args: list[Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """Output and the gradient of each input for the upstream gradient dy."""
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in args]
    y = function(*leaves)
    named = dict(zip(("dx", "dweight", "dscale"), leaves, strict=True))
    wanted = {name: leaf for name, leaf in named.items() if leaf is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("scaled", [True, False])
def test_reference_is_diffusers(scaled):
    args = [None if a is None else a.double() for a in inputs((2, 5, 48), (torch.float32,) * 3, scaled)]
    # diffusers takes the variance in fp32 also for fp64 inputs, so fp32 resolution is what can be asked
    torch.testing.assert_close(rms_norm_modulate_ref(*args), eager(*args), rtol=1e-6, atol=1e-6)
    plain = torch.nn.functional.rms_norm(args[0], (48,), args[1], 1e-5)
    expected = plain if args[2] is None else plain * (1 + args[2][:, None])
    torch.testing.assert_close(rms_norm_modulate_ref(*args), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, scaled):
    args = inputs(shape, dtypes, scaled)
    if backend == "cpu" and {a.dtype for a in args if a is not None} != {torch.float32}:
        with use_backend("cpu"), pytest.raises(RuntimeError, match="its cpu kernel is float32 only"):
            rms_norm_modulate(*args)
        return
    dy = torch.randn(shape)
    with use_backend(backend):
        ours = run(rms_norm_modulate, args, dy.to(dtypes[0]))
    stock = run(eager, args, dy.to(dtypes[0]))
    gold = run(
        rms_norm_modulate_ref,
        [None if a is None else a.double() for a in args],
        dy.to(dtypes[0]).double(),
    )
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], f"{name} on {backend}")
    for name, leaf in zip(("dx", "dweight", "dscale"), args, strict=True):
        assert leaf is None or ours[name].dtype == leaf.dtype
    assert ours["y"].dtype == args[0].dtype


@pytest.mark.parametrize("scaled", [True, False])
def test_gradcheck(scaled):
    args = [None if a is None else a.double().requires_grad_() for a in inputs((2, 3, 7), (torch.float32,) * 3, scaled)]
    assert torch.autograd.gradcheck(lambda *a: rms_norm_modulate(*a, eps=1e-3), args)


def test_cpu_kernel_is_launched(monkeypatch):
    if OP._ext.C is None:
        pytest.skip(OP._ext.ERROR)
    calls = []
    real = OP._ext.C

    class Spy:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(OP._ext, "C", Spy())
    args = inputs((2, 3, 16), (torch.float32,) * 3)
    run(rms_norm_modulate, args, torch.randn(2, 3, 16))
    assert calls == ["rms_norm_modulate_fwd", "rms_norm_modulate_bwd"]


def test_strided_inputs(backend):
    """Slices, every other row, transposed upstream gradients: read where they lie, by the same contract."""
    wide = torch.randn(2, 6, 100)
    args = [wide[:, ::2, 4:52], torch.randn(96)[::2], torch.randn(2, 96)[:, ::2]]
    dy = torch.randn(2, 48, 3).transpose(1, 2)

    leaves = [a.detach().requires_grad_() for a in args]
    with use_backend(backend):
        y = rms_norm_modulate(*leaves)
        ours = dict(zip(("y", "dx", "dweight", "dscale"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))
    stock, gold = run(eager, args, dy), run(rms_norm_modulate_ref, [a.double() for a in args], dy.double())
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], name)


def test_deterministic(backend):
    args, dy = inputs((3, 64, 96), (torch.float32,) * 3), torch.randn(3, 64, 96)
    with use_backend(backend):
        first, second = run(rms_norm_modulate, args, dy), run(rms_norm_modulate, args, dy)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("scaled", [True, False])
def test_opcheck(backend, scaled):
    x, weight, scale = inputs((2, 3, 16), (torch.float32,) * 3, scaled)
    torch.library.opcheck(OP._rms_norm_modulate_fwd, (x, weight, scale, 1e-5, torch.float32, backend))
    rstd = torch.rand(2, 3)
    torch.library.opcheck(OP._rms_norm_modulate_bwd, (torch.randn(2, 3, 16), x, weight, scale, rstd, backend))


def test_compile_does_not_recompile_per_batch(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rms_norm_modulate, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    with use_backend(backend):
        for batch in (2, 3, 4, 5, 6):
            args, dy = inputs((batch, 4, 16), (torch.float32,) * 3), torch.randn(batch, 4, 16)
            ours, plain = run(compiled, args, dy), run(rms_norm_modulate, args, dy)
            for name, value in ours.items():
                assert torch.equal(value, plain[name]), name
    assert counter.frame_count <= 2, "one static and one dynamic graph"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_its_dtype(dtype):
    args = inputs((2, 8, 64), (torch.float32,) * 3)
    dy = torch.randn(2, 8, 64).to(dtype)
    with torch.autocast("cpu", dtype):
        ours = run(rms_norm_modulate, args, dy)
        stock = run(eager, args, dy)
    gold = run(rms_norm_modulate_ref, [a.double() for a in args], dy.double())
    assert ours["y"].dtype == dtype
    assert_contract(ours["y"], stock["y"].to(dtype), gold["y"])
    for name in ("dx", "dweight", "dscale"):
        assert ours[name].dtype == torch.float32
        assert_contract(ours[name], stock[name], gold[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extremes_stay_finite(backend, dtype):
    backend = "auto" if dtype != torch.float32 else backend
    x = torch.zeros(1, 3, 64, dtype=dtype)
    x[0, 1], x[0, 2, 5] = 1e4, 6e4
    with use_backend(backend):
        y = rms_norm_modulate(x, torch.ones(64, dtype=dtype), torch.zeros(1, 64, dtype=dtype))
    gold = rms_norm_modulate_ref(x.double(), torch.ones(64).double(), torch.zeros(1, 64).double())
    assert y.isfinite().all()
    assert_contract(y, gold.to(dtype), gold)


def test_names_what_cannot_run():
    x, weight, scale = inputs((1, 2, 8), (torch.bfloat16,) * 3)
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="backend 'triton' cannot run rms_norm_modulate"),
    ):
        rms_norm_modulate(x, weight, scale)
    if OP._ext.C is not None:
        with (
            use_backend("cpu"),
            pytest.raises(RuntimeError, match="its cpu kernel is float32 only"),
        ):
            rms_norm_modulate(x, weight, scale)
    with pytest.raises(ValueError, match=re.escape("backend must be one of auto, reference, triton, cuda, cpu")):
        use_backend("fast")


def test_second_derivatives_and_transforms_are_refused():
    x, weight, scale = inputs((1, 2, 8), (torch.float32,) * 3)
    y = rms_norm_modulate(x.requires_grad_(), weight, scale)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: rms_norm_modulate(a[None], weight))(x.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        rms_norm_modulate(x, weight, scale)


GOOD = {"x": torch.zeros(2, 3, 8), "weight": torch.ones(8), "scale": torch.zeros(2, 8), "eps": 1e-5}
BAD = [
    ({"x": torch.zeros(3, 8)}, "x must have 3 dimensions (B, T, D), got shape (3, 8)"),
    ({"x": [1.0]}, "x must be a tensor of shape (B, T, D), got list"),
    ({"weight": torch.ones(7)}, "weight must have shape (D) = (8), got (7,)"),
    ({"scale": torch.zeros(2, 3, 8)}, "scale must have shape (B, D) = (2, 8), got (2, 3, 8)"),
    ({"weight": torch.ones(8).long()}, "weight must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"scale": torch.zeros(2, 8).double()}, "scale is torch.float64 and x is torch.float32"),
    ({"weight": torch.ones(8, device="meta")}, "weight must be on cpu like x, got meta"),
    ({"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = GOOD | change
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm_modulate(call["x"], call["weight"], call["scale"], eps=call["eps"])


def test_every_combination_of_needed_gradients():
    x, weight, scale = inputs((2, 3, 8), (torch.float32,) * 3)
    full = run(rms_norm_modulate, [x, weight, scale], dy := torch.randn(2, 3, 8))
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip((x, weight, scale), wanted, strict=True)]
        y = rms_norm_modulate(*leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for leaf, name in zip(leaves, ("dx", "dweight", "dscale"), strict=True):
            assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full[name])
