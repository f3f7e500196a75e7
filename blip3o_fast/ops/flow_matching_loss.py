"""The flow-matching loss, its gradient and its metrics, in one pass over the prediction.

    target = alpha'(sigma) * data + s'(sigma) * noise      v_prediction: the velocity d x_t / d sigma
           = noise                                         epsilon
    loss   = mean over all elements of (pred - target)^2
             + regularization_weight * mean over tokens of |pred token|_2

The noise is the one inside x_t: the same tensor, or the same (seed, offset) given to `flow_interpolate`. A loss that
draws anew cannot reach 0 (its best value is the variance of the noise). Source: Lipman et al. 2023,
https://arxiv.org/abs/2210.02747; the regularisation term is that of the BLIP3-o training script this package began as.

Backward: with N elements, M tokens and the upstream gradient g of the loss,

    dpred = g * [ 2 / N * (pred - target) + regularization_weight / M * pred / |pred token|_2 ]     (0 at |pred| = 0)

The bracket is computed in the forward pass and is the only tensor saved. It is kept in fp32: divided by N it would fall
below fp16's smallest number before a gradient scaler could lift it.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _checks, _cpu, _cuda, _triton
from blip3o_fast.ops._backend import Backends
from blip3o_fast.ops._flow_schedule import check_prediction_type, target_coefficients
from blip3o_fast.ops._library import (
    accumulation_dtype,
    define,
    needs_grad,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)
from blip3o_fast.ops.flow_interpolate import check_path_inputs, given_or_made_noise

METRICS = ("mse", "cosine_similarity", "l2_distance", "pred_norm", "target_norm", "snr_db", "regularization")

# torch.nn.functional.cosine_similarity's default: each norm is at least this.
_MIN_NORM = 1e-8
# Keeps snr_db finite for an exact prediction (it then reads about 200 dB).
_MIN_POWER = 1e-20


def flow_matching_loss_ref(
    pred: Tensor,
    data: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    prediction_type: str = "v_prediction",
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    schedule: str = "linear",
    regularization_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification: plain PyTorch, fp32 (fp64 for fp64 inputs), differentiable in pred by autograd."""
    target = _target(data, sigma, noise, seed, prediction_type, sigma_min, sigma_max, schedule)
    pred = pred.to(target.dtype)
    elements, tokens = max(pred.numel(), 1), max(pred.shape[0] * pred.shape[1], 1)  # an empty batch has loss 0
    mse = (pred - target).square().sum() / elements
    regularization = regularization_weight * torch.linalg.vector_norm(pred, dim=-1).sum() / tokens
    return mse + regularization, _named(_metrics(pred.detach(), target, regularization.detach()))


def _target(
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prediction_type: str,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
) -> Tensor:
    """What the network should have said, [B, T, C], fp32 (fp64 for fp64 data)."""
    acc = accumulation_dtype(data)
    of_data, of_noise = target_coefficients(
        sigma.to(acc)[:, None, None], prediction_type, schedule, sigma_min, sigma_max
    )
    return of_data * data.to(acc) + of_noise * given_or_made_noise(data, noise, seed)


def _metrics(pred: Tensor, target: Tensor, regularization: Tensor) -> Tensor:
    """The values of METRICS, [7]."""
    elements, tokens = max(pred.numel(), 1), max(pred.shape[0] * pred.shape[1], 1)
    error = pred - target
    pred_norm, target_norm = torch.linalg.vector_norm(pred, dim=-1), torch.linalg.vector_norm(target, dim=-1)
    cosine = (pred * target).sum(-1) / (pred_norm.clamp(min=_MIN_NORM) * target_norm.clamp(min=_MIN_NORM))
    mse, power = error.square().sum() / elements, target.square().sum() / elements
    return torch.stack([
        mse,
        cosine.sum() / tokens,
        torch.linalg.vector_norm(error, dim=-1).sum() / tokens,
        pred_norm.sum() / tokens,
        target_norm.sum() / tokens,
        10 * torch.log10((power + _MIN_POWER) / (mse + _MIN_POWER)),
        regularization,
    ])  # fmt: skip


def _named(metrics: Tensor) -> dict[str, Tensor]:
    return dict(zip(METRICS, metrics.unbind(), strict=True))


def _check(
    pred: Tensor,
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prediction_type: str,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
    regularization_weight: float,
) -> None:
    _checks.check_rank("pred", pred, "B, T, C")
    _checks.check_shape("data", data, "B, T, C", pred.shape)
    check_path_inputs(data, sigma, noise, seed, sigma_min, sigma_max, schedule, "B, T, C")
    _checks.check_floats(pred=pred, data=data)
    check_prediction_type(prediction_type)
    if not 0.0 <= regularization_weight < float("inf"):
        raise ValueError(f"regularization_weight must be a finite number >= 0, got {regularization_weight}")
    for name, tensor in (("data", data), ("sigma", sigma), ("noise", noise)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but only pred is differentiable here: detach it, or use flow_matching_loss_ref"
            )


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    pred: Tensor,
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prediction_type: str,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
    regularization_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    target = _target(data, sigma, noise, seed, prediction_type, sigma_min, sigma_max, schedule)
    pred = pred.to(target.dtype)
    tokens = max(pred.shape[0] * pred.shape[1], 1)
    norm = torch.linalg.vector_norm(pred, dim=-1, keepdim=True)
    regularization = regularization_weight * norm.sum() / tokens
    metrics = _metrics(pred, target, regularization)
    if not with_gradient:
        return metrics[0] + regularization, metrics, pred.new_empty(0)
    dpred = (pred - target) * (2 / max(pred.numel(), 1))
    if regularization_weight:
        dpred += pred * torch.where(norm > 0, regularization_weight / tokens / norm, 0.0)
    return metrics[0] + regularization, metrics, dpred


def _backward_reference(dloss: Tensor, dpred: Tensor, dtype: torch.dtype) -> Tensor:
    return (dpred * dloss.to(dpred.dtype)).to(dtype)


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, prediction_type, sigma_min, sigma_max, schedule, regularization_weight, with_gradient = arguments
    loss, metrics, dpred = _forward_fake(*[*arguments, "cpu"])
    outputs = (loss, metrics, dpred if with_gradient else None)
    settings = (prediction_type == "epsilon", sigma_min, sigma_max, schedule == "cosine", regularization_weight)
    _cpu.call("flow_matching_loss_fwd", *inputs, *outputs, *settings)
    return loss, metrics, dpred


def _backward_cpu(dloss: Tensor, dpred: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = _backward_fake(dloss, dpred, dtype, "cpu")
    _cpu.call("flow_matching_loss_bwd", dloss, dpred, scaled)
    return scaled


# ---- cuda (csrc) ---------------------------------------------------------------------------------------------------


def _forward_cuda(pred: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    data, sigma, noise, seed, prediction_type, sigma_min, sigma_max, schedule, weight, with_gradient = arguments
    loss, metrics, dpred = _forward_fake(*[pred, *arguments, "cuda"])
    tokens = pred.shape[0] * pred.shape[1] if pred.numel() else 0
    # a warp per token, eight of them in a block, and more tokens per warp where there are many
    partial = loss.new_empty((-(-tokens // (8 * min(max(tokens // 8192, 1), 16))), 8))
    rows = map(_cuda.with_unit_stride, (pred, data, sigma, noise))
    outputs = (loss, metrics, dpred if with_gradient else None, partial)
    settings = (prediction_type == "epsilon", sigma_min, sigma_max, schedule == "cosine", weight)
    _cuda.call("flow_matching_loss_fwd", *rows, seed, *outputs, *settings)
    return loss, metrics, dpred


def _backward_cuda(dloss: Tensor, dpred: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = _backward_fake(dloss, dpred, dtype, "cuda")
    _cuda.call("flow_matching_loss_bwd", dloss, dpred.contiguous(), scaled)
    return scaled


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(
    pred: Tensor,
    data: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prediction_type: str,
    sigma_min: float,
    sigma_max: float,
    schedule: str,
    regularization_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (
        pred, data, sigma, noise, seed, prediction_type, sigma_min, sigma_max, schedule, regularization_weight
    )  # fmt: skip
    loss, metrics, dpred = _forward_fake(*arguments, with_gradient, "triton")
    kernels = _triton.kernels("flow_matching_loss")
    kernels.forward(*arguments, loss, metrics, dpred if with_gradient else None)
    return loss, metrics, dpred


def _backward_triton(dloss: Tensor, dpred: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = _backward_fake(dloss, dpred, dtype, "triton")
    _triton.kernels("flow_matching_loss").backward(dloss, dpred, scaled)
    return scaled


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cuda": _forward_cuda, "cpu": _forward_cpu}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cuda": _backward_cuda, "cpu": _backward_cpu}
BACKENDS = Backends("flow_matching_loss", triton=_triton.refusal, cuda=_cuda.refusal, cpu=_cpu.refusal)


def _forward(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _FORWARD[args[-1]](pred, *args[:-1])


def _backward(dloss: Tensor, dpred: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return _BACKWARD[backend](dloss, dpred, dtype)


def _forward_fake(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_gradient, acc = args[-2], accumulation_dtype(pred)
    dpred = pred.new_empty(pred.shape if with_gradient else (0,), dtype=acc)
    return pred.new_empty((), dtype=acc), pred.new_empty(len(METRICS), dtype=acc), dpred


def _backward_fake(dloss: Tensor, dpred: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return dpred.new_empty(dpred.shape, dtype=dtype)


_flow_matching_loss_fwd = define(
    "flow_matching_loss_fwd(Tensor pred, Tensor data, Tensor sigma, Tensor? noise, Tensor? seed, str prediction_type,"
    " float sigma_min, float sigma_max, str schedule, float regularization_weight, bool with_gradient, str backend)"
    " -> (Tensor loss, Tensor metrics, Tensor dpred)",
    _forward,
    _forward_fake,
)
_flow_matching_loss_bwd = define(
    "flow_matching_loss_bwd(Tensor dloss, Tensor dpred, ScalarType dtype, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _FlowMatchingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, *inputs_and_settings: Any) -> tuple[Tensor, Tensor]:
        *rest, backend = inputs_and_settings
        loss, metrics, dpred = run(_flow_matching_loss_fwd, pred, *rest, True, backend)
        ctx.save_for_backward(dpred)
        ctx.dtype, ctx.backend, ctx.inputs = pred.dtype, backend, len(inputs_and_settings)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dmetrics: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("flow_matching_loss")
        (dpred,) = ctx.saved_tensors
        return run(_flow_matching_loss_bwd, dloss, dpred, ctx.dtype, ctx.backend), *(None,) * ctx.inputs


def flow_matching_loss(
    pred: Tensor,
    data: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    prediction_type: str = "v_prediction",
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    schedule: str = "linear",
    regularization_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error against the velocity (or the noise), with gradient and metrics from the same pass.

    Equivalent to `flow_matching_loss_ref`.

    pred, data: [B, T, C]; sigma: fp32 [B] in [0, 1], 1 = pure noise; noise: [B, T, C] or None; seed: int64 [2] =
    (seed, offset) or None: exactly one of the two, the one that `flow_interpolate` got. pred, data and noise in fp32,
    bf16 or fp16, mixed freely; fp64 only alone (sigma too). prediction_type: "v_prediction" or "epsilon".
    Returns `(loss, metrics)`, all 0-d, fp32 (fp64 for fp64), on pred's device; nothing waits for the device. An empty
    batch has loss 0 and zero gradient. metrics, none of them differentiable:
      mse                the first part of the loss
      cosine_similarity  mean over tokens of the cosine between predicted and true target
      l2_distance        mean over tokens of |pred - target|_2
      pred_norm, target_norm  mean over tokens of |.|_2
      snr_db             10 log10(mean target^2 / mean error^2); 0 for a network that says zero
      regularization     the second part of the loss, weight included
    Only pred is differentiable.
    Numerics: fp32 arithmetic and sums; the gradient is rounded once, to pred's dtype. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype, device or setting and for data, sigma or noise that require grad,
    RuntimeError where the backend asked for cannot run it.
    """
    _check(
        pred, data, sigma, noise, seed, prediction_type, sigma_min, sigma_max, schedule, regularization_weight
    )  # fmt: skip
    refuse_transforms("flow_matching_loss")
    backend = BACKENDS.choose(pred, data, sigma, noise, seed)
    arguments = (
        pred, data, sigma, noise, seed,
        prediction_type, float(sigma_min), float(sigma_max), schedule, float(regularization_weight),
    )  # fmt: skip
    with recorded("flow_matching_loss"):
        if needs_grad(pred):
            loss, metrics = _FlowMatchingLoss.apply(*arguments, backend)
        else:
            loss, metrics, _ = run(_flow_matching_loss_fwd, *arguments, False, backend)
        return loss, _named(metrics)
