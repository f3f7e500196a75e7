"""Triton kernels of `flow_matching_loss`: some tokens of a sample per program, their sums added up by one more launch.

    forward:   e = pred - target,  target = p * data + q * noise       one read of pred and data (and of a given noise)
               dpred = 2 / N * e + weight / M * pred / |pred|          one fp32 write, where a gradient is needed
               sums over the program's tokens of SUMS                  eight fp32 numbers per program
               loss and metrics from the sums of all programs          the second launch
    backward:  dpred * dloss                                           one read, one write

N elements and M tokens in all. A token's C channels are held whole, in a block of the next power of two; the noise of a
seed is made in registers. Nothing waits for the host: dloss and the seed are read on the device.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _config
from blip3o_fast.kernels._config import LaunchConfig, launch_config
from blip3o_fast.kernels._flow_schedule import target_coefficients
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride
from blip3o_fast.kernels._philox import minus_two_log, normals, normals_at, sample_stream

# A program's sums over its tokens: squared error, squared target, cosine, |error|, |pred|, |target|, and two zeros.
SUMS = 8
# Warps of a launch that keep a GPU busy: as many as 132 multiprocessors have room for at half their occupancy.
_BUSY_WARPS = 4096
_FINISH = LaunchConfig(num_warps=16, block=1024)
_SCALE = LaunchConfig(num_warps=4, block=2048)


@triton.jit
def four_sums(a, b, c, d, N: tl.constexpr):
    """The sums of four [N] vectors by one reduction: each alone would make the warps wait for each other again."""
    rows = tl.reshape(tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (2, 1, 0)), (4, N))
    left, right = tl.split(tl.reshape(tl.sum(rows, axis=1), (2, 2)))
    sum_a, sum_c = tl.split(left)
    sum_b, sum_d = tl.split(right)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit(do_not_specialize=["rows", "chunks"])
def flow_matching_loss_fwd(
    pred_ptr, data_ptr, sigma_ptr, noise_ptr, seed_ptr, dpred_ptr, partial_ptr,
    tokens, rows, chunks, stride_pb, stride_pt, stride_db, stride_dt, stride_nb, stride_nt,
    span: tl.float64, error_factor: tl.float32, norm_factor: tl.float32,
    C: tl.constexpr, COSINE: tl.constexpr, EPSILON: tl.constexpr, SEEDED: tl.constexpr, GRADIENT: tl.constexpr,
    REGULARIZED: tl.constexpr, QUADS: tl.constexpr, SUMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its tokens does not.
    program = tl.program_id(0)
    sample, first = (program // chunks).to(tl.int64), (program % chunks) * rows
    cols = tl.arange(0, BLOCK_C)
    seen = cols < C
    if not EPSILON:
        of_data, of_noise = target_coefficients(tl.load(sigma_ptr + sample), span, COSINE)
    if SEEDED:
        s_low, s_high, k_low, k_high = sample_stream(seed_ptr, sample)
    error_sum, cosine_sum, distance_sum, pred_sum, target_sum, power_sum = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for step in range(first, tl.minimum(first + rows, tokens)):
        token = tl.cast(step, tl.int64)
        pred = tl.load(pred_ptr + sample * stride_pb + token * stride_pt + cols, mask=seen, other=0.0).to(tl.float32)
        if SEEDED:
            start = token * C
            if C % 4 == 0:
                noise = normals(start >> 2, s_low, s_high, k_low, k_high, BLOCK_C, QUADS)
            else:
                noise = normals_at(start + cols, s_low, s_high, k_low, k_high)
            noise = tl.where(seen, noise, 0.0)
        else:
            at = noise_ptr + sample * stride_nb + token * stride_nt
            noise = tl.load(at + cols, mask=seen, other=0.0).to(tl.float32)
        if EPSILON:
            target = noise
        else:
            at = data_ptr + sample * stride_db + token * stride_dt
            target = of_data * tl.load(at + cols, mask=seen, other=0.0).to(tl.float32) + of_noise * noise
        error = pred - target
        squared_error, squared_pred, squared_target, dot = four_sums(
            error * error, pred * pred, target * target, pred * target, BLOCK_C
        )
        pred_norm, target_norm = tl.sqrt(squared_pred), tl.sqrt(squared_target)
        error_sum += squared_error
        power_sum += squared_target
        cosine_sum += dot / (tl.maximum(pred_norm, 1e-8) * tl.maximum(target_norm, 1e-8))
        distance_sum += tl.sqrt(squared_error)
        pred_sum += pred_norm
        target_sum += target_norm
        if GRADIENT:
            dpred = error * error_factor
            if REGULARIZED:
                dpred += pred * tl.where(pred_norm > 0, norm_factor / tl.maximum(pred_norm, 1e-30), 0.0)
            row = sample * tokens + token
            tl.store(dpred_ptr + row * C + cols, dpred, mask=seen)
    place = tl.arange(0, SUMS)
    sums = tl.where(place == 0, error_sum, tl.where(place == 1, power_sum, tl.where(place == 2, cosine_sum, 0.0)))
    sums = tl.where(place == 3, distance_sum, tl.where(place == 4, pred_sum, tl.where(place == 5, target_sum, sums)))
    tl.store(partial_ptr + program.to(tl.int64) * SUMS + place, sums)


@triton.jit(do_not_specialize=["programs"])
def flow_matching_loss_sums(
    partial_ptr, loss_ptr, metrics_ptr, programs,
    per_element: tl.float32, per_token: tl.float32, weight: tl.float32, SUMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: loss [] and metrics [7] from partial [programs, SUMS], added up in an order that only it decides."""
    place = tl.arange(0, SUMS)
    acc = tl.zeros((SUMS, ROWS), tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        seen = (rows < programs)[None, :]
        acc += tl.load(partial_ptr + rows.to(tl.int64)[None, :] * SUMS + place[:, None], mask=seen, other=0.0)
    sums = tl.sum(acc, axis=1) * tl.where(place < 2, per_element, per_token)
    mse, power = tl.sum(tl.where(place == 0, sums, 0.0), axis=0), tl.sum(tl.where(place == 1, sums, 0.0), axis=0)
    pred_norm = tl.sum(tl.where(place == 4, sums, 0.0), axis=0)
    # 10 log10; what is not finite stays so, which the logarithm of `_philox.py` does not see to.
    ratio = tl.div_rn(power + 1e-20, mse + 1e-20)
    high, rest = minus_two_log(tl.maximum(ratio, 1.2e-38))
    snr = (high + rest) * -2.1714724095162588 + (ratio - ratio)
    regularization = pred_norm * weight
    # METRICS in their order: the place of each sum among them, then what is no sum.
    tl.store(metrics_ptr + tl.maximum(place - 1, 0), sums, mask=(place != 1) & (place < 6))
    tl.store(metrics_ptr + 5, snr)
    tl.store(metrics_ptr + 6, regularization)
    tl.store(loss_ptr, mse + regularization)


@triton.jit(do_not_specialize=["blocks"])
def flow_matching_loss_bwd(dloss_ptr, dpred_ptr, out_ptr, n, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    sample, first = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    seen = lanes < n - first
    row = sample * n + first
    dpred = tl.load(dpred_ptr + row + lanes, mask=seen, other=0.0) * tl.load(dloss_ptr).to(tl.float32)
    tl.store(out_ptr + row + lanes, dpred.to(out_ptr.dtype.element_ty), mask=seen)


def _rows(batch: int, tokens: int, warps: int) -> int:
    """Tokens of one sample that one program walks through: the most that still keep a GPU busy, 16 at most."""
    for rows in (16, 8, 4, 2):
        if batch * triton.cdiv(tokens, rows) * warps >= _BUSY_WARPS:
            return rows
    return 1


def forward(
    pred: Tensor, data: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None,
    prediction_type: str, sigma_min: float, sigma_max: float, schedule: str, regularization_weight: float,
    loss: Tensor, metrics: Tensor, dpred: Tensor | None,
) -> None:  # fmt: skip
    """Fill loss [], metrics [7] and, if needed, dpred [B, T, C], the gradient for dloss = 1; fp32, contiguous."""
    batch, tokens, channels = pred.shape
    elements, all_tokens = max(pred.numel(), 1), max(batch * tokens, 1)  # an empty batch has loss 0
    config = launch_config("flow_matching_loss.forward", width=channels, capability=capability_of(pred))
    rows = _rows(batch, tokens, config.num_warps)
    chunks = triton.cdiv(tokens, rows)
    programs = batch * chunks if pred.numel() else 0
    partial = torch.empty((programs, SUMS), dtype=torch.float32, device=pred.device)
    pred, data = with_unit_stride(pred), with_unit_stride(data)
    noise = None if noise is None else with_unit_stride(noise)
    noise_strides = (0, 0) if noise is None else noise.stride()[:2]
    itemsize = min(pred.itemsize, data.itemsize)
    launch(
        flow_matching_loss_fwd, (programs,),
        pred, data, sigma.contiguous(), noise, None if seed is None else seed.contiguous(), dpred, partial,
        tokens, rows, chunks, *pred.stride()[:2], *data.stride()[:2], *noise_strides,
        sigma_max - sigma_min, 2 / elements, regularization_weight / all_tokens,
        C=channels, COSINE=schedule == "cosine", EPSILON=prediction_type == "epsilon", SEEDED=seed is not None,
        GRADIENT=dpred is not None, REGULARIZED=regularization_weight > 0, QUADS=1 if itemsize == 4 else 2,
        SUMS=SUMS, BLOCK_C=max(config.block, 8), num_warps=config.num_warps,
    )  # fmt: skip
    finish = replace(_FINISH, **_config.tuned("flow_matching_loss.sums", 0, capability_of(pred)))
    launch(
        flow_matching_loss_sums, (1,),
        partial, loss, metrics, programs, 1 / elements, 1 / all_tokens, regularization_weight,
        SUMS=SUMS, ROWS=finish.block, num_warps=finish.num_warps,
    )  # fmt: skip


def backward(dloss: Tensor, dpred: Tensor, out: Tensor) -> None:
    """Fill out [B, T, C] with dpred * dloss; dpred: fp32, both contiguous, dloss: []."""
    batch, tokens, channels = out.shape
    config = replace(_SCALE, **_config.tuned("flow_matching_loss.backward", 0, capability_of(dpred)))
    blocks = triton.cdiv(tokens * channels, config.block)
    launch(
        flow_matching_loss_bwd, (batch * blocks,),
        dloss, dpred.contiguous(), out, tokens * channels, blocks, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
