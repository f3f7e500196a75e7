"""flow_matching_loss against torch.nn.functional and autograd, in fp64 and by the numerics contract."""

import importlib
import math
import re

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import flow_interpolate, flow_matching_loss, flow_matching_loss_ref, use_backend
from blip3o_fast.ops._philox import normal_noise
from blip3o_fast.testing import assert_contract

OP = importlib.import_module("blip3o_fast.ops.flow_matching_loss")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of pred, data, noise; sigma is always fp32
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F32), (F32, BF16, F16)]
SHAPES = [(2, 8, 48), (3, 5, 7), (1, 1, 3), (2, 1, 1792)]
SETTINGS = [
    {},
    {"regularization_weight": 0.3},
    {"schedule": "cosine", "sigma_min": 0.01, "sigma_max": 0.9, "regularization_weight": 0.1},
    {"prediction_type": "epsilon"},
]
METRICS = {"mse", "cosine_similarity", "l2_distance", "pred_norm", "target_norm", "snr_db", "regularization"}


def inputs(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)) -> dict[str, Tensor]:
    return {
        "pred": torch.randn(shape).to(dtypes[0]),
        "data": (0.5 + torch.randn(shape)).to(dtypes[1]),
        "sigma": torch.rand(shape[0]),
        "noise": torch.randn(shape).to(dtypes[2]),
    }


def target_of(args: dict[str, Tensor], settings: dict) -> Tensor:
    """The stock way: elementwise operations in the dtype of data and noise."""
    data, noise = args["data"], args["noise"]
    if settings.get("prediction_type") == "epsilon":
        return noise
    sigma = args["sigma"].to(data.dtype)[:, None, None]
    span = settings.get("sigma_max", 1.0) - settings.get("sigma_min", 0.0)
    if settings.get("schedule", "linear") == "linear":
        return span * noise - data
    d_alpha = -math.pi / 2 * torch.sin(math.pi * sigma)
    return d_alpha * data + span * math.pi / 2 * torch.cos(math.pi * sigma / 2) * noise


def eager(pred: Tensor, data: Tensor, sigma: Tensor, *, noise: Tensor, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    """BLIP3-o's sequence, with torch.nn.functional for everything it has."""
    target = target_of({"data": data, "sigma": sigma, "noise": noise}, settings)
    wide = torch.float64 if pred.dtype == torch.float64 else F32
    pred, target = pred.to(wide), target.to(wide)
    mse = F.mse_loss(pred, target)
    regularization = settings.get("regularization_weight", 0.0) * pred.norm(dim=-1).mean()
    metrics = {
        "mse": mse,
        "cosine_similarity": F.cosine_similarity(pred, target, dim=-1).mean(),
        "l2_distance": (pred - target).norm(dim=-1).mean(),
        "pred_norm": pred.norm(dim=-1).mean(),
        "target_norm": target.norm(dim=-1).mean(),
        "snr_db": 10 * torch.log10(target.square().mean() / (pred - target).square().mean()),
        "regularization": regularization,
    }
    return mse + regularization, metrics


def run(function, args: dict[str, Tensor], dloss: float, **settings) -> dict[str, Tensor]:
    pred = args["pred"].detach().clone().requires_grad_()
    rest = {"noise": args["noise"]} if "noise" in args else {"seed": args["seed"]}
    loss, metrics = function(pred, args["data"], args["sigma"], **rest, **settings)
    (dpred,) = torch.autograd.grad(loss, pred, torch.tensor(dloss, dtype=loss.dtype))
    return {"loss": loss.detach(), "dpred": dpred, **{name: value.detach() for name, value in metrics.items()}}


def doubled(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in args.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_reference_is_functional(settings):
    args = doubled(inputs((3, 5, 7)))
    ours, theirs = (run(f, args, 0.7, **settings) for f in (flow_matching_loss_ref, eager))
    assert set(ours) == METRICS | {"loss", "dpred"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, settings):
    args = inputs(shape, dtypes)
    with use_backend(backend):
        ours = run(flow_matching_loss, args, 1.7, **settings)
    stock, gold = run(eager, args, 1.7, **settings), run(flow_matching_loss_ref, doubled(args), 1.7, **settings)
    assert ours["dpred"].dtype == dtypes[0]
    assert_contract(ours["dpred"], stock["dpred"], gold["dpred"], "dpred")
    for name in ("loss", *METRICS):
        assert ours[name].dtype == F32 and ours[name].shape == ()
        # Each is one number, of which the stock sequence may be exact by luck; the bound of fp32 sums of this length
        # (Higham 2002, section 4.2, blocked summation) is what both are held to.
        scale = max(1.0, abs(float(gold[name])))
        assert not abs(float(ours[name]) - float(gold[name])) > 16 * torch.finfo(F32).eps * scale, name


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 7), (2, 2, 12)], ids=str)
def test_seeded_noise_is_the_noise_of_the_interpolation(backend, shape, dtype, settings):
    args, seed = inputs(shape, (dtype, dtype, F32)), torch.tensor([5, 17])
    args["noise"] = normal_noise(seed, shape)
    seeded = {name: value for name, value in args.items() if name != "noise"} | {"seed": seed}
    with use_backend(backend):
        given, made = run(flow_matching_loss, args, 1.7, **settings), run(flow_matching_loss, seeded, 1.7, **settings)
    for name, value in made.items():
        torch.testing.assert_close(value, given[name], rtol=1e-6 if dtype == F32 else 0.01, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channels", [2, 8])
def test_the_noise_is_the_one_inside_x_t(backend, channels, dtype):
    """Element by element: of a zero prediction and a power of two of elements, the gradient is -noise exactly."""
    shape, seed = (2, 4, channels), torch.tensor([-5, 2**40])
    data, sigma = torch.zeros(shape, dtype=dtype), torch.ones(2)
    pred = torch.zeros(shape, requires_grad=True)
    # flow_interpolate has no CUDA C++ kernel; triton's noise is as close to the formula as that of the loss must be
    with use_backend("triton" if backend == "cuda" else backend):
        noise = flow_interpolate(data.float(), sigma, seed=seed)
    with use_backend(backend):
        loss, _ = flow_matching_loss(pred, data, sigma, seed=seed, prediction_type="epsilon")
        (dpred,) = torch.autograd.grad(loss, pred, torch.tensor(pred.numel() / 2))
    torch.testing.assert_close(dpred, -noise, rtol=3e-7, atol=0)


def test_fp16_gradients_do_not_vanish(backend):
    """2 / N * error is below fp16's smallest number here; the gradient scaler's factor must arrive before rounding."""
    shape = (2, 24, 4096)
    args = inputs(shape, (F16, F32, F32))
    args["pred"] = (target_of(args, {}) + 5e-3 * torch.randn(shape)).half()
    with use_backend(backend):
        scaled = run(flow_matching_loss, args, 65536.0)["dpred"]
    gold = run(flow_matching_loss_ref, doubled(args), 65536.0)["dpred"]
    assert 2 / args["pred"].numel() * 5e-3 < torch.finfo(F16).smallest_normal * 2**-10
    assert not (scaled.double() - gold).norm() > 2e-3 * gold.norm()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings):
    args = doubled(inputs((2, 3, 4)))

    def loss(pred: Tensor) -> Tensor:
        return flow_matching_loss(pred, args["data"], args["sigma"], noise=args["noise"], **settings)[0]

    assert torch.autograd.gradcheck(loss, (args["pred"].requires_grad_(),))


def test_a_zero_prediction(backend):
    """The regularisation's gradient is 0 where |pred| is, and the metrics are those of saying nothing."""
    args = inputs((2, 3, 8))
    args["pred"].zero_()
    with use_backend(backend):
        ours = run(flow_matching_loss, args, 1.0, regularization_weight=0.5)
        without = run(flow_matching_loss, args, 1.0)
    assert torch.equal(ours["dpred"], without["dpred"]) and ours["dpred"].isfinite().all()
    assert ours["cosine_similarity"] == 0 and ours["pred_norm"] == 0 and ours["regularization"] == 0
    assert ours["snr_db"] == pytest.approx(0.0, abs=1e-5)


def test_an_exact_prediction(backend):
    args = inputs((2, 3, 8))
    args["pred"] = args["noise"] - args["data"]
    with use_backend(backend):
        ours = run(flow_matching_loss, args, 1.0)
    assert ours["loss"] == 0 and ours["l2_distance"] == 0 and not ours["dpred"].any()
    assert ours["cosine_similarity"] == pytest.approx(1.0, abs=1e-6)
    assert ours["snr_db"].isfinite() and ours["snr_db"] > 150


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_an_empty_batch_has_loss_zero(backend, shape):
    with use_backend(backend):
        ours = run(flow_matching_loss, inputs(shape), 1.0, regularization_weight=0.1)
    assert all(ours[name] == 0 for name in ("loss", *METRICS)) and ours["dpred"].shape == shape


def test_nan_reaches_the_loss(backend):
    args = inputs((2, 3, 8))
    args["pred"][1, 2, 3] = math.nan
    with use_backend(backend):
        assert run(flow_matching_loss, args, 1.0)["loss"].isnan()


def test_strided_inputs(backend):
    args = {
        "pred": torch.randn(2, 16, 3).transpose(1, 2),
        "data": torch.randn(2, 6, 40)[:, ::2, 4:20],
        "sigma": torch.rand(4)[::2],
        "noise": torch.randn(16, 3, 2).permute(2, 1, 0),
    }
    with use_backend(backend):
        ours = run(flow_matching_loss, args, 1.3, regularization_weight=0.1)
        plain = run(flow_matching_loss, {n: a.contiguous() for n, a in args.items()}, 1.3, regularization_weight=0.1)
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-7)


def test_without_a_gradient_the_numbers_are_the_same(backend):
    args = inputs((3, 5, 7))
    rest = {"noise": args["noise"], "regularization_weight": 0.2}
    with use_backend(backend):
        loss, metrics = flow_matching_loss(args["pred"], args["data"], args["sigma"], **rest)
        with_gradient = run(flow_matching_loss, args, 1.0, regularization_weight=0.2)
    assert not loss.requires_grad
    assert torch.equal(loss, with_gradient["loss"])
    assert all(torch.equal(value, with_gradient[name]) for name, value in metrics.items())


def test_metrics_carry_no_gradient(backend):
    args = inputs((3, 5, 7))
    with use_backend(backend):
        loss, metrics = flow_matching_loss(
            args["pred"].requires_grad_(), args["data"], args["sigma"], noise=args["noise"]
        )
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_nothing_waits_for_the_device(backend):
    """A meta tensor has no values, so reading one (a host synchronisation on a GPU) raises."""
    args = {name: value.to("meta") for name, value in inputs((3, 5, 7)).items()}
    loss, metrics = flow_matching_loss(args["pred"], args["data"], args["sigma"], noise=args["noise"])
    assert loss.is_meta and all(value.is_meta and value.dtype == F32 for value in metrics.values())


def test_cpu_kernels_are_called(cpu_calls):
    args = inputs((2, 3, 8))
    run(flow_matching_loss, args, 1.0)
    flow_matching_loss(args["pred"], args["data"], args["sigma"], seed=torch.tensor([1, 2]))
    assert cpu_calls == ["flow_matching_loss_fwd", "flow_matching_loss_bwd", "flow_matching_loss_fwd"]


@pytest.mark.parametrize("seeded", [True, False])
def test_threads_change_no_bit(threads_agree, seeded):
    args = inputs((3, 37, 301))
    noise = {"seed": torch.tensor([1, 2])} if seeded else {"noise": args["noise"]}

    def op(pred: Tensor) -> Tensor:
        loss, metrics = flow_matching_loss(pred, args["data"], args["sigma"], **noise, regularization_weight=0.1)
        return torch.stack([loss, *metrics.values()])

    threads_agree(op, {"pred": args["pred"]}, torch.ones(1 + len(METRICS)))


def test_triton_kernels_are_launched():
    args = inputs((2, 3, 8))
    with use_backend("triton"), recording() as launches:
        run(flow_matching_loss, args, 1.0)
        flow_matching_loss(args["pred"], args["data"], args["sigma"], seed=torch.tensor([1, 2]))
    forward = ["flow_matching_loss_fwd", "flow_matching_loss_sums"]
    assert [launch.name for launch in launches] == [*forward, "flow_matching_loss_bwd", *forward]


@pytest.mark.parametrize(("tokens", "programs", "seeded"), [(64, 8, False), (21, 4, False), (21, 4, True)])
def test_a_program_of_many_tokens(monkeypatch, tokens, programs, seeded):
    """As on large batches: 16 tokens per program, the last program of a sample may be short of some."""
    from blip3o_fast.kernels import flow_matching_loss as kernels

    args, seed = inputs((2, tokens, 8)), torch.tensor([3, 4])
    if seeded:
        args["noise"] = normal_noise(seed, (2, tokens, 8))
    call = {name: a for name, a in args.items() if name != "noise"} | {"seed": seed} if seeded else args
    monkeypatch.setattr(kernels, "_BUSY_WARPS", 1)
    with use_backend("triton"), recording() as launches:
        ours = run(flow_matching_loss, call, 1.7, regularization_weight=0.3)
    assert [launch.grid for launch in launches[:2]] == [(programs,), (1,)]
    gold = run(flow_matching_loss_ref, doubled(args), 1.7, regularization_weight=0.3)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), gold[name], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("tokens", "channels"), [(700, 24), (9000, 3)])
@pytest.mark.parametrize("seeded", [True, False])
def test_cuda_blocks_of_many_tokens(tokens, channels, seeded):
    """As on large batches: a warp walks over several tokens, the blocks of a launch are not all full."""
    args, seed, settings = inputs((2, tokens, channels)), torch.tensor([3, -4]), {"regularization_weight": 0.3}
    if seeded:
        args["noise"] = normal_noise(seed, (2, tokens, channels))
    call = {name: a for name, a in args.items() if name != "noise"} | {"seed": seed} if seeded else args
    with use_backend("cuda"):
        ours = run(flow_matching_loss, call, 1.7, **settings)
    gold = run(flow_matching_loss_ref, doubled(args), 1.7, **settings)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), gold[name], rtol=2e-6, atol=2e-7)


def test_only_one_tensor_is_saved(backend):
    """The gradient itself, in fp32: neither pred nor data nor noise is kept for backward."""
    args, packed = inputs((3, 5, 7), (BF16, BF16, BF16)), []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        flow_matching_loss(args["pred"].requires_grad_(), args["data"], args["sigma"], noise=args["noise"])
    assert [(t.dtype, tuple(t.shape)) for t in packed] == [(F32, (3, 5, 7))]


def test_deterministic(backend):
    args = inputs((2, 4, 20))
    seeded = {name: value for name, value in args.items() if name != "noise"} | {"seed": torch.tensor([1, 2])}
    with use_backend(backend):
        for call in (args, seeded):
            first, second = (run(flow_matching_loss, call, 1.7, regularization_weight=0.1) for _ in range(2))
            for name, value in first.items():
                assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("seeded", [True, False])
def test_opcheck(backend, seeded, with_gradient):
    args = inputs((2, 3, 8), (BF16, F32, F32))
    noise, seed = (None, torch.tensor([1, 2])) if seeded else (args["noise"], None)
    settings = ("v_prediction", 0.0, 1.0, "linear", 0.1, with_gradient, backend)
    torch.library.opcheck(
        OP._flow_matching_loss_fwd, (args["pred"], args["data"], args["sigma"], noise, seed, *settings)
    )
    torch.library.opcheck(OP._flow_matching_loss_bwd, (torch.tensor(1.5), torch.randn(2, 3, 8), BF16, backend))


def test_compile_does_not_recompile_per_batch(backend):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(flow_matching_loss, fullgraph=True, backend=counter)
    with use_backend(backend):
        for batch in (2, 3, 4, 5, 6):
            args = inputs((batch, 4, 8))
            ours, plain = (run(f, args, 1.7, regularization_weight=0.1) for f in (compiled, flow_matching_loss))
            for name, value in ours.items():
                assert torch.equal(value, plain[name]), name
    assert counter.frame_count <= 2, "one static and one dynamic graph"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_changes_nothing(backend, dtype):
    """The loss is fp32 whatever the network's autocast is."""
    args = inputs((2, 3, 8), (dtype, F32, F32))
    with use_backend(backend):
        plain = run(flow_matching_loss, args, 1.7, regularization_weight=0.1)
        with torch.autocast("cpu", dtype):
            cast = run(flow_matching_loss, args, 1.7, regularization_weight=0.1)
    for name, value in plain.items():
        assert torch.equal(value, cast[name]), name


def test_second_derivatives_and_transforms_are_refused():
    args = inputs((1, 2, 8))
    pred, data, sigma, noise = (args[name] for name in ("pred", "data", "sigma", "noise"))
    loss, _ = flow_matching_loss(pred.requires_grad_(), data, sigma, noise=noise)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: flow_matching_loss(a[None], data, sigma, noise=noise)[0])(pred.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        flow_matching_loss(pred, data, sigma, noise=noise)


def test_names_what_cannot_run():
    args = inputs((1, 2, 8))
    wide = doubled(args)
    for name in ("triton", "cuda"):
        message = f"its {name} kernel takes float32, bfloat16 and float16, got torch.float64"
        with use_backend(name), pytest.raises(RuntimeError, match=message):
            flow_matching_loss(wide["pred"], wide["data"], wide["sigma"], noise=wide["noise"])


Z = torch.zeros
GOOD = {"pred": Z(2, 3, 8), "data": Z(2, 3, 8), "sigma": Z(2), "noise": Z(2, 3, 8)}
BAD = [
    ({"pred": 1.0}, "pred must be a tensor of shape (B, T, C), got float"),
    ({"pred": Z(2, 8)}, "pred must have 3 dimensions (B, T, C), got shape (2, 8)"),
    ({"pred": Z(2, 3, 8).long()}, "pred must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"pred": Z(2, 3, 8).double()}, "data is torch.float32 and pred is torch.float64"),
    ({"data": Z(2, 3, 7)}, "data must have shape (B, T, C) = (2, 3, 8), got (2, 3, 7)"),
    ({"sigma": Z(2, 1)}, "sigma must have shape (B) = (2), got (2, 1)"),
    ({"sigma": Z(2).half()}, "sigma must be float32 (float64 with float64 data), got torch.float16"),
    ({"noise": None}, "exactly one of noise and seed must be given, got neither"),
    ({"seed": torch.tensor([1, 2])}, "exactly one of noise and seed must be given, got both"),
    ({"noise": Z(3, 3, 8)}, "noise must have shape (B, T, C) = (2, 3, 8), got (3, 3, 8)"),
    ({"noise": None, "seed": torch.tensor(3)}, "seed must have shape (2) = (2), got ()"),
    ({"noise": None, "seed": torch.tensor([3.0, 0.0])}, "seed must be int64 (seed, offset), got torch.float32"),
    ({"data": Z(2, 3, 8, device="meta")}, "sigma must be on meta like data, got cpu"),
    ({"data": Z(2, 3, 8, requires_grad=True)}, "data requires grad, but only pred is differentiable here"),
    ({"sigma": Z(2, requires_grad=True)}, "sigma requires grad, but only pred is differentiable here"),
    ({"noise": Z(2, 3, 8, requires_grad=True)}, "noise requires grad, but only pred is differentiable here"),
    ({"prediction_type": "sample"}, "prediction_type must be one of v_prediction, epsilon, got 'sample'"),
    ({"schedule": "sine"}, "schedule must be one of linear, cosine, got 'sine'"),
    ({"sigma_min": 2.0}, "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max < inf"),
    ({"regularization_weight": -1.0}, "regularization_weight must be a finite number >= 0, got -1.0"),
    ({"regularization_weight": math.nan}, "regularization_weight must be a finite number >= 0, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = GOOD | change
    with pytest.raises(ValueError, match=re.escape(message)):
        flow_matching_loss(call.pop("pred"), call.pop("data"), call.pop("sigma"), **call)
