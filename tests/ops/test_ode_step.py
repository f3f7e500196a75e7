"""ode_step against diffusers' Euler scheduler, in fp64 and by the numerics contract."""

import importlib
import itertools
import re

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import ode_step, ode_step_ref, use_backend
from blip3o_fast.testing import assert_contract

OP = importlib.import_module("blip3o_fast.ops.ode_step")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of x, v_cond, v_uncond
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, BF16), (BF16, F32, F16)]
# 2100 elements end in the middle of a kernel's block, and of its units of 4
SHAPES = [(2, 64, 48), (3, 5, 7), (1, 1, 1), (0, 4, 8), (2, 3, 4, 4), (5,), (3, 700), (1, 64, 28)]
NAMES = ("x", "v_cond", "v_uncond")
W, H = torch.tensor(3.0), torch.tensor(-1 / 30)


def inputs(shape: tuple[int, ...], dtypes=(F32, F32, F32), guided: bool = True) -> list[Tensor | None]:
    x, v_cond, v_uncond = (torch.randn(shape).to(dtype) for dtype in dtypes)
    return [x, v_cond, v_uncond if guided else None]


def eager(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor, dsigma: Tensor) -> Tensor:
    """BLIP3-o's sequence: guidance in the network's dtype, the scheduler's step in fp32, its result cast back."""
    v = v_cond if v_uncond is None else v_uncond + guidance.to(v_cond.dtype) * (v_cond - v_uncond)
    return (x.to(dsigma.dtype) + dsigma * v).to(x.dtype)


def run(function, args: list[Tensor | None], dy: Tensor, guidance: Tensor = W, dsigma: Tensor = H) -> dict[str, Tensor]:
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in args]
    y = function(*leaves, guidance, dsigma)
    given = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    grads = torch.autograd.grad(y, list(given.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(given, grads, strict=True)}}


def gold_of(args: list[Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    wide = [None if a is None else a.double() for a in args]
    return run(ode_step_ref, wide, dy.double(), W.double(), H.double())


def test_reference_is_the_scheduler_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    x, v_cond, v_uncond = inputs((2, 5, 6))
    for step, timestep in enumerate(scheduler.timesteps):
        v = v_uncond + 3.0 * (v_cond - v_uncond)
        theirs = scheduler.step(v, timestep, x).prev_sample
        dsigma = scheduler.sigmas[step + 1] - scheduler.sigmas[step]
        ours = ode_step_ref(x, v_cond, v_uncond, W, dsigma)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        x = theirs


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, guided):
    args, dy = inputs(shape, dtypes, guided), torch.randn(shape).to(dtypes[0])
    with use_backend(backend):
        ours = run(ode_step, args, dy)
    stock, gold = run(eager, args, dy), gold_of(args, dy)
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], f"{name} on {backend}")
    for name, value in zip(NAMES, args, strict=True):
        assert value is None or ours[f"d{name}"].dtype == value.dtype
    assert ours["y"].dtype == dtypes[0]


@pytest.mark.parametrize("guided", [True, False])
def test_cpu_kernels_are_called(cpu_calls, guided):
    run(ode_step, inputs((2, 3, 8), guided=guided), torch.randn(2, 3, 8))
    assert cpu_calls == ["ode_step_fwd", "ode_step_bwd"]


@pytest.mark.parametrize("rank", [0, 6, 7])
def test_any_number_of_dimensions(rank, cpu_calls):
    """The C++ kernels take six; more of them run on the reference."""
    shape = (2,) * rank
    args, dy = inputs(shape), torch.randn(shape)
    ours = run(ode_step, args, dy)
    assert len(cpu_calls) == (2 if rank <= 6 else 0)
    stock, gold = run(eager, args, dy), gold_of(args, dy)
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], name)


def test_threads_change_no_bit(threads_agree):
    named = dict(zip(NAMES, inputs((3, 700, 5)), strict=True))
    threads_agree(lambda x, v_cond, v_uncond: ode_step(x, v_cond, v_uncond, W, H), named, torch.randn(3, 700, 5))


@pytest.mark.parametrize("guided", [True, False])
def test_triton_kernels_are_launched(guided):
    with use_backend("triton"), recording() as launches:
        run(ode_step, inputs((2, 3, 8), guided=guided), torch.randn(2, 3, 8))
    assert [launch.name for launch in launches] == ["ode_step_fwd", "ode_step_bwd"]


def test_triton_reads_the_settings_from_memory():
    """What a CUDA graph replays: the same launch after guidance and dsigma were written anew."""
    args, guidance, dsigma = inputs((2, 3, 8)), W.clone(), H.clone()
    with use_backend("triton"), recording() as launches:
        ode_step(*args, guidance, dsigma)
        (launch,) = launches
        y = launch.args[5]
        guidance.fill_(1.5)
        dsigma.fill_(-0.25)
        launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)
    torch.testing.assert_close(y, ode_step_ref(*args, torch.tensor(1.5), torch.tensor(-0.25)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guided", [True, False])
def test_gradcheck(guided):
    args = [None if a is None else a.double().requires_grad_() for a in inputs((2, 3, 4), guided=guided)]
    assert torch.autograd.gradcheck(lambda *a: ode_step(*a, W.double(), H.double()), args)


def test_guidance_of_one_is_the_condition_alone(backend):
    x, v_cond, v_uncond = inputs((2, 3, 8))
    with use_backend(backend):
        alone = ode_step(x, v_cond, None, None, H)
        assert torch.equal(ode_step(x, v_cond, None, W, H), alone), "guidance is not read without v_uncond"
        torch.testing.assert_close(ode_step(x, v_cond, v_uncond, torch.tensor(1.0), H), alone, rtol=1e-6, atol=1e-7)
        null = ode_step(x, v_cond, v_uncond, torch.tensor(0.0), H)
        assert torch.equal(null, ode_step(x, v_uncond, None, None, H))


def test_halves_of_one_batch(backend):
    """The sampler runs both halves as one batch and hands over views of the result."""
    both, x = torch.randn(4, 3, 8), torch.randn(2, 3, 8)
    null, cond = both.chunk(2)
    with use_backend(backend):
        assert torch.equal(ode_step(x, cond, null, W, H), ode_step(x, cond.clone(), null.clone(), W, H))


def test_strided_inputs(backend):
    args = [torch.randn(2, 6, 40)[:, ::2, 4:20], torch.randn(2, 16, 3).transpose(1, 2), torch.randn(2, 3, 32)[..., ::2]]
    dy = torch.randn(16, 3, 2).permute(2, 1, 0)
    leaves = [a.detach().requires_grad_() for a in args]
    with use_backend(backend):
        y = ode_step(*leaves, W, H)
        grads = torch.autograd.grad(y, leaves, dy)
    stock, gold = run(eager, args, dy), gold_of(args, dy)
    for name, value in zip(("y", "dx", "dv_cond", "dv_uncond"), (y.detach(), *grads), strict=True):
        assert_contract(value, stock[name], gold[name], name)


def test_inputs_are_left_alone(backend):
    args = inputs((2, 3, 8))
    before = [a.clone() for a in args]
    with use_backend(backend):
        y = ode_step(*args, W, torch.tensor(0.0))
    y.add_(1)  # the result is the caller's, also for a step of zero
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_deterministic(backend):
    args, dy = inputs((3, 16, 20)), torch.randn(3, 16, 20)
    with use_backend(backend):
        first, second = run(ode_step, args, dy), run(ode_step, args, dy)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("guided", [True, False])
def test_opcheck(backend, guided):
    args, guidance = inputs((2, 3, 8), (F32, BF16, BF16), guided), W if guided else None
    torch.library.opcheck(OP._ode_step_fwd, (*args, guidance, H, backend))
    torch.library.opcheck(OP._ode_step_bwd, (torch.randn(2, 3, 8), guidance, H, BF16, F16, backend))


def test_compile_does_not_recompile_per_batch_or_step(backend):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(ode_step, fullgraph=True, backend=counter)
    with use_backend(backend):
        for batch in (2, 3, 4, 5, 6):
            args, dy = inputs((batch, 4, 8)), torch.randn(batch, 4, 8)
            settings = (torch.tensor(float(batch)), torch.tensor(-1 / batch))
            ours, plain = run(compiled, args, dy, *settings), run(ode_step, args, dy, *settings)
            for name, value in ours.items():
                assert torch.equal(value, plain[name]), name
    assert counter.frame_count <= 2, "one static and one dynamic graph"


def test_autocast_changes_nothing(backend):
    args, dy = inputs((2, 3, 8), (F32, BF16, BF16)), torch.randn(2, 3, 8)
    with use_backend(backend):
        plain = run(ode_step, args, dy)
        with torch.autocast("cpu", BF16):
            cast = run(ode_step, args, dy)
    for name, value in plain.items():
        assert torch.equal(value, cast[name]), name


def test_every_combination_of_needed_gradients(backend):
    args, dy = inputs((2, 3, 8)), torch.randn(2, 3, 8)
    with use_backend(backend):
        full = run(ode_step, args, dy)
        for wanted in itertools.product([False, True], repeat=3):
            leaves = [t.detach().clone().requires_grad_(w) for t, w in zip(args, wanted, strict=True)]
            y = ode_step(*leaves, W, H)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(dy)
            for leaf, name in zip(leaves, NAMES, strict=True):
                assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full[f"d{name}"])


def test_second_derivatives_and_transforms_are_refused():
    x, v_cond, v_uncond = inputs((1, 2, 8))
    y = ode_step(x.requires_grad_(), v_cond, v_uncond, W, H)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: ode_step(a, v_cond[0], None, None, H))(x.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        ode_step(x, v_cond, v_uncond, W, H)


def test_names_what_cannot_run():
    args = inputs((1, 2, 8))
    message = "backend 'triton' cannot run ode_step: its triton kernel takes float32, bfloat16 and float16"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        ode_step(*(a.double() for a in args), W, H)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="it has no cuda kernel yet"):
        ode_step(*args, W, H)


Z = torch.zeros
GOOD = {"x": Z(2, 3, 8), "v_cond": Z(2, 3, 8), "v_uncond": Z(2, 3, 8), "guidance": W, "dsigma": H}
BAD = [
    ({"x": 1.0}, "x must be a tensor of shape (B, ...), got float"),
    ({"x": Z(2, 3, 8).int()}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    ({"v_cond": Z(2, 3, 7)}, "v_cond must have shape (B, ...) = (2, 3, 8), got (2, 3, 7)"),
    ({"v_uncond": Z(3, 8)}, "v_uncond must have shape (B, ...) = (2, 3, 8), got (3, 8)"),
    ({"v_cond": Z(2, 3, 8).double()}, "v_cond is torch.float64 and x is torch.float32"),
    ({"v_uncond": Z(2, 3, 8, device="meta")}, "v_uncond must be on cpu like x, got meta"),
    ({"guidance": None}, "guidance must be a 0-d float32 tensor where v_uncond is given, got None"),
    ({"guidance": 3.0}, "guidance must be a 0-d float32 tensor (a number would be frozen into a CUDA graph), got 3.0"),
    ({"guidance": Z(1)}, "guidance must be a 0-d float32 tensor (float64 with float64 x), got shape (1,)"),
    ({"dsigma": None}, "dsigma must be a 0-d float32 tensor"),
    ({"dsigma": -0.1}, "dsigma must be a 0-d float32 tensor"),
    ({"dsigma": H.double()}, "dsigma must be a 0-d float32 tensor (float64 with float64 x), got shape (), t"),
    ({"dsigma": Z((), device="meta")}, "dsigma must be on cpu like x, got meta"),
    ({"dsigma": Z((), requires_grad=True)}, "dsigma requires grad, but only x, v_cond and v_uncond are"),
    ({"guidance": Z((), requires_grad=True)}, "guidance requires grad, but only x, v_cond and v_uncond are"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ode_step(*(GOOD | change).values())
