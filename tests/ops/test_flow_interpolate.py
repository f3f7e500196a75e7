"""flow_interpolate against flow_matching's and diffusers' noisy samples, in fp64 and by the numerics contract."""

import importlib
import itertools
import math
import re

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import _philox, flow_interpolate, flow_interpolate_ref, use_backend
from blip3o_fast.ops._philox import normal_noise
from blip3o_fast.testing import assert_contract

OP = importlib.import_module("blip3o_fast.ops.flow_interpolate")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of data and noise; sigma is always fp32
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16)]
SHAPES = [(2, 64, 48), (3, 5, 7), (1, 1, 3), (0, 4, 8), (2, 6, 4, 4)]
SETTINGS = [
    {},
    {"sigma_min": 1e-4},
    {"schedule": "cosine"},
    {"schedule": "cosine", "sigma_min": 0.01, "sigma_max": 0.9},
]


def inputs(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)) -> dict[str, Tensor]:
    return {
        "data": (0.5 + torch.randn(shape)).to(dtypes[0]),
        "sigma": torch.rand(shape[0]),
        "noise": torch.randn(shape).to(dtypes[1]),
    }


def eager(
    data: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor,
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    schedule: str = "linear",
) -> Tensor:
    """BLIP3-o's sequence: sigma in the latents' dtype, then elementwise operations in that dtype."""
    sigma = sigma.to(data.dtype).reshape(-1, *(1,) * (data.dim() - 1))
    if schedule == "linear":
        alpha, scale = 1.0 - sigma, sigma_min + (sigma_max - sigma_min) * sigma
    else:
        alpha = (1 + torch.cos(math.pi * sigma)) / 2
        scale = sigma_min + (sigma_max - sigma_min) * torch.sin(math.pi * sigma / 2)
    return (alpha * data + scale * noise).to(data.dtype)


def run(function, args: dict[str, Tensor], dy: Tensor, **settings) -> dict[str, Tensor]:
    leaves = [args[name].detach().clone().requires_grad_() for name in ("data", "noise")]
    y = function(leaves[0], args["sigma"], noise=leaves[1], **settings)
    ddata, dnoise = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {"y": y.detach(), "ddata": ddata, "dnoise": dnoise}


def exact_noise(monkeypatch, seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The normals of a seed with everything after the words and their uniforms in fp64."""
    uniform = _philox.uniform
    with monkeypatch.context() as patch:
        patch.setattr(_philox, "uniform", lambda word: uniform(word).double())
        return normal_noise(seed, shape)


def doubled(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in args.items()}


def test_reference_is_the_conditional_optimal_transport_path():
    """flow_matching's t runs the other way: t = 1 - sigma, t = 0 is noise."""
    from flow_matching.path import CondOTProbPath

    args = doubled(inputs((4, 5, 6)))
    theirs = CondOTProbPath().sample(x_0=args["noise"], x_1=args["data"], t=1 - args["sigma"])
    ours = flow_interpolate_ref(args["data"], args["sigma"], noise=args["noise"])
    torch.testing.assert_close(ours, theirs.x_t, rtol=1e-14, atol=1e-14)


def test_reference_is_the_scheduler_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    args = inputs((4, 5, 6))
    chosen = scheduler.timesteps[torch.tensor([0, 10, 500, 999])]
    theirs = scheduler.scale_noise(args["data"], chosen, args["noise"])
    ours = flow_interpolate_ref(args["data"], chosen / 1000, noise=args["noise"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, settings):
    args, dy = inputs(shape, dtypes), torch.randn(shape).to(dtypes[0])
    with use_backend(backend):
        ours = run(flow_interpolate, args, dy, **settings)
    stock, gold = run(eager, args, dy, **settings), run(flow_interpolate_ref, doubled(args), dy.double(), **settings)
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], f"{name} on {backend}")
    assert ours["ddata"].dtype == args["data"].dtype and ours["dnoise"].dtype == args["noise"].dtype
    assert ours["y"].dtype == dtypes[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_contract_of_seeded_noise(backend, dtype, settings, monkeypatch):
    """Eager gets the reference's fp32 normals, the gold the exact ones."""
    args, dy = inputs((3, 5, 7), (dtype, F32)), torch.randn(3, 5, 7).to(dtype)
    seed = torch.tensor([5, 17])
    args["noise"] = normal_noise(seed, (3, 5, 7))
    exact = doubled(args) | {"noise": exact_noise(monkeypatch, seed, (3, 5, 7))}
    assert exact["noise"].dtype == torch.float64
    data = args["data"].clone().requires_grad_()
    with use_backend(backend):
        y = flow_interpolate(data, args["sigma"], seed=seed, **settings)
        (ddata,) = torch.autograd.grad(y, data, dy)
    stock, gold = run(eager, args, dy, **settings), run(flow_interpolate_ref, exact, dy.double(), **settings)
    for name, value in (("y", y.detach()), ("ddata", ddata)):
        assert_contract(value, stock[name], gold[name], f"{name} on {backend}")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_seeded_noise_does_not_depend_on_the_block(backend, dtype):
    """Samples of more than one block whose last one is not full, with the tail of a quadruple cut off."""
    data, seed = torch.zeros(2, 3, 701, dtype=dtype), torch.tensor([-3, 2**33 + 5])
    with use_backend(backend):
        x_t = flow_interpolate(data, torch.ones(2), seed=seed)
    expected = normal_noise(seed, (2, 3, 701))
    # the reference rounds its angle to fp32, whose spacing below 2 pi is 5e-7
    tolerance = 3e-6 if dtype == F32 else 2e-2
    torch.testing.assert_close(x_t.float(), expected, rtol=tolerance, atol=tolerance)


def test_seeded_noise_of_strided_data(backend):
    """Rows that begin in the middle of a quadruple: the noise is counted in the order of the shape, not of memory."""
    data, sigma, seed = torch.randn(2, 6, 13)[:, ::2, 2:].requires_grad_(), torch.rand(2), torch.tensor([3, 2**32 - 1])
    with use_backend(backend):
        strided, plain = (flow_interpolate(d, sigma, seed=seed) for d in (data, data.detach().contiguous()))
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-6)


def test_a_batch_may_be_cut_anywhere(backend):
    args = inputs((5, 3, 7))
    with use_backend(backend):
        whole = flow_interpolate(args["data"], args["sigma"], seed=torch.tensor([5, 17]))
        parts = [
            flow_interpolate(args["data"][a:b], args["sigma"][a:b], seed=torch.tensor([5, 17 + a]))
            for a, b in ((0, 1), (1, 4), (4, 5))
        ]
        other = flow_interpolate(args["data"], args["sigma"], seed=torch.tensor([6, 17]))
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(other, whole)


def test_cpu_kernels_are_called(cpu_calls):
    args, dy = inputs((2, 3, 8)), torch.randn(2, 3, 8)
    run(flow_interpolate, args, dy)
    data = args["data"].requires_grad_()
    flow_interpolate(data, args["sigma"], seed=torch.tensor([1, 2])).backward(dy)
    assert cpu_calls == ["flow_interpolate_fwd", "flow_interpolate_bwd"] * 2


@pytest.mark.parametrize("seeded", [True, False])
def test_threads_change_no_bit(threads_agree, seeded):
    args = inputs((3, 700, 5))

    def op(data: Tensor, noise: Tensor | None) -> Tensor:
        seed = torch.tensor([1, 2]) if noise is None else None
        return flow_interpolate(data, args["sigma"], noise=noise, seed=seed)

    named = {"data": args["data"], "noise": None if seeded else args["noise"]}
    threads_agree(op, named, torch.randn(3, 700, 5))


def test_triton_kernels_are_launched():
    args, dy = inputs((2, 3, 8)), torch.randn(2, 3, 8)
    with use_backend("triton"), recording() as launches:
        run(flow_interpolate, args, dy)
        data = args["data"].requires_grad_()
        flow_interpolate(data, args["sigma"], seed=torch.tensor([1, 2])).backward(dy)
    names = [launch.name for launch in launches]
    assert names == ["flow_interpolate_fwd", "flow_interpolate_bwd"] * 2


def test_spread_samples_are_read_where_they_lie():
    wide = torch.randn(6, 3, 8)
    noise, sigma = torch.randn(3, 3, 8), torch.rand(3)
    with use_backend("triton"), recording() as launches:
        flow_interpolate(wide[::2], sigma, noise=noise)
    assert launches[0].args[0].data_ptr() == wide.data_ptr()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ends(backend, schedule):
    """sigma = 0 is the data and sigma = 1 the noise, to the last bit."""
    args = inputs((2, 3, 4))
    with use_backend(backend):
        clean, noisy = (
            flow_interpolate(args["data"], torch.full((2,), value), noise=args["noise"], schedule=schedule)
            for value in (0.0, 1.0)
        )
    assert torch.equal(clean, args["data"]) and torch.equal(noisy, args["noise"])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings):
    args = doubled(inputs((2, 3, 4)))
    data, noise = args["data"].requires_grad_(), args["noise"].requires_grad_()

    def with_noise(data: Tensor, noise: Tensor) -> Tensor:
        return flow_interpolate(data, args["sigma"], noise=noise, **settings)

    def with_seed(data: Tensor) -> Tensor:
        return flow_interpolate(data, args["sigma"], seed=torch.tensor([1, 2]), **settings)

    assert torch.autograd.gradcheck(with_noise, (data, noise))
    assert torch.autograd.gradcheck(with_seed, (data,))


def test_strided_inputs(backend):
    args = {
        "data": torch.randn(2, 6, 40)[:, ::2, 4:20],
        "sigma": torch.rand(4)[::2],
        "noise": torch.randn(16, 3, 2).permute(2, 1, 0),
    }
    dy = torch.randn(2, 16, 3).transpose(1, 2)
    data, noise = args["data"].detach().requires_grad_(), args["noise"].detach().requires_grad_()
    with use_backend(backend):
        y = flow_interpolate(data, args["sigma"], noise=noise)
        grads = torch.autograd.grad(y, (data, noise), dy)
    ours = dict(zip(("y", "ddata", "dnoise"), (y.detach(), *grads), strict=True))
    stock, gold = run(eager, args, dy), run(flow_interpolate_ref, doubled(args), dy.double())
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], name)


def test_deterministic(backend):
    args, dy, seed = inputs((3, 16, 20)), torch.randn(3, 16, 20), torch.tensor([9, 1])
    with use_backend(backend):
        first, second = run(flow_interpolate, args, dy), run(flow_interpolate, args, dy)
        seeded = [flow_interpolate(args["data"], args["sigma"], seed=seed) for _ in range(2)]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert torch.equal(*seeded)


@pytest.mark.parametrize("seeded", [True, False])
def test_opcheck(backend, seeded):
    args = inputs((2, 3, 8), (BF16, F32))
    noise, seed = (None, torch.tensor([1, 2])) if seeded else (args["noise"], None)
    settings = (0.0, 1.0, "linear", backend)
    torch.library.opcheck(OP._flow_interpolate_fwd, (args["data"], args["sigma"], noise, seed, *settings))
    dy, noise_dtype = torch.randn(2, 3, 8).bfloat16(), None if seeded else F32
    torch.library.opcheck(OP._flow_interpolate_bwd, (dy, args["sigma"], noise_dtype, *settings))


def test_compile_does_not_recompile_per_batch(backend):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(flow_interpolate, fullgraph=True, backend=counter)
    with use_backend(backend):
        for batch in (2, 3, 4, 5, 6):
            args, dy = inputs((batch, 4, 8)), torch.randn(batch, 4, 8)
            ours, plain = run(compiled, args, dy), run(flow_interpolate, args, dy)
            for name, value in ours.items():
                assert torch.equal(value, plain[name]), name
        assert counter.frame_count <= 2, "one static and one dynamic graph"
        args, seed = inputs((3, 4, 8)), torch.tensor([4, 5])
        seeded = compiled(args["data"], args["sigma"], seed=seed)
        assert torch.equal(seeded, flow_interpolate(args["data"], args["sigma"], seed=seed))


def test_autocast_changes_nothing(backend):
    """x_t is an input of the network, not an activation: it keeps the data's dtype."""
    args, dy = inputs((2, 3, 8)), torch.randn(2, 3, 8)
    with use_backend(backend):
        plain = run(flow_interpolate, args, dy)
        with torch.autocast("cpu", BF16):
            cast = run(flow_interpolate, args, dy)
    for name, value in plain.items():
        assert torch.equal(value, cast[name]), name


def test_every_combination_of_needed_gradients(backend):
    args, dy = inputs((2, 3, 8)), torch.randn(2, 3, 8)
    with use_backend(backend):
        full = run(flow_interpolate, args, dy)
        for wanted in itertools.product([False, True], repeat=2):
            leaves = [args[name].clone().requires_grad_(w) for name, w in zip(("data", "noise"), wanted, strict=True)]
            y = flow_interpolate(leaves[0], args["sigma"], noise=leaves[1])
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(dy)
            for leaf, name in zip(leaves, ("data", "noise"), strict=True):
                assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full[f"d{name}"])


def test_second_derivatives_and_transforms_are_refused():
    args = inputs((1, 2, 8))
    data, sigma, noise = args["data"].requires_grad_(), args["sigma"], args["noise"]
    y = flow_interpolate(data, sigma, noise=noise)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y, data, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: flow_interpolate(a[None], sigma, noise=noise))(data.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        flow_interpolate(data, sigma, noise=noise)


def test_names_what_cannot_run():
    args = inputs((1, 2, 8))
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run flow_interpolate"):
        flow_interpolate(args["data"], args["sigma"], noise=args["noise"])
    wide, message = doubled(args), "its triton kernel takes float32, bfloat16 and float16, got torch.float64"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        flow_interpolate(wide["data"], wide["sigma"], noise=wide["noise"])


Z = torch.zeros
GOOD = {"data": Z(2, 3, 8), "sigma": Z(2), "noise": Z(2, 3, 8)}
BAD = [
    ({"data": 1.0}, "data must be a tensor of shape (B, ...), got float"),
    ({"data": Z(2)}, "data must have at least 2 dimensions (B, ...), got shape (2,)"),
    ({"data": Z(2, 3, 8).long()}, "data must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"sigma": 0.5}, "sigma must be a tensor of shape (B), got float"),
    ({"sigma": Z(3)}, "sigma must have shape (B) = (2), got (3,)"),
    ({"sigma": Z(2).bfloat16()}, "sigma must be float32 (float64 with float64 data), got torch.bfloat16"),
    ({"sigma": Z(2).double()}, "sigma is torch.float64 and data is torch.float32"),
    ({"sigma": Z(2, requires_grad=True)}, "sigma requires grad, but only data and noise are differentiable here"),
    ({"noise": None}, "exactly one of noise and seed must be given, got neither"),
    ({"seed": torch.tensor([1, 2])}, "exactly one of noise and seed must be given, got both"),
    ({"noise": Z(2, 3, 7)}, "noise must have shape (B, ...) = (2, 3, 8), got (2, 3, 7)"),
    ({"noise": Z(2, 3, 8, device="meta")}, "noise must be on cpu like data, got meta"),
    ({"noise": None, "seed": 3}, "seed must be a tensor of shape (2), got int"),
    ({"noise": None, "seed": torch.tensor([3])}, "seed must have shape (2) = (2), got (1,)"),
    ({"noise": None, "seed": torch.tensor([3.0, 0.0])}, "seed must be int64 (seed, offset), got torch.float32"),
    ({"noise": None, "seed": Z(2, device="meta").long()}, "seed must be on cpu like data, got meta"),
    ({"schedule": "quadratic"}, "schedule must be one of linear, cosine, got 'quadratic'"),
    ({"sigma_min": 0.5, "sigma_max": 0.5}, "got sigma_min=0.5, sigma_max=0.5"),
    ({"sigma_min": -0.1}, "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max < inf"),
    ({"sigma_max": float("nan")}, "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max < inf"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = GOOD | change
    with pytest.raises(ValueError, match=re.escape(message)):
        flow_interpolate(call.pop("data"), call.pop("sigma"), **call)
