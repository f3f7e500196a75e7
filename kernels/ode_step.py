"""Triton kernels of `ode_step`: elementwise over flat memory, BLOCK elements per program.

    forward:   y = x + dsigma * (v_uncond + guidance * (v_cond - v_uncond))          one read of each, one write of y
    backward:  dv_cond = dsigma * guidance * dy,  dv_uncond = dsigma * (1 - guidance) * dy

guidance and dsigma are read from device memory, so a captured CUDA graph follows what is written there. One kernel
serves every batch, so the number of elements is an argument. It is counted in units, of as many elements (up to 16) as
divide a sample: the mask then ends between two units and leaves accesses of 128 bits whole.
"""

import math
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _config
from blip3o_fast.kernels._config import LaunchConfig
from blip3o_fast.kernels._launch import capability_of, launch

_DEFAULT = LaunchConfig(num_warps=4, block=1024)


@triton.jit
def _block(program, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """A program's first element, its lanes and their mask, of units * UNIT elements in all."""
    # Counted in units up to the last step: 32 bits are enough, and the bound is seen to be a multiple of UNIT.
    left = tl.minimum(units - program * (BLOCK // UNIT), BLOCK // UNIT) * UNIT
    lanes = tl.arange(0, BLOCK)
    return program.to(tl.int64) * BLOCK, lanes, lanes < left


@triton.jit(do_not_specialize=["units"])
def ode_step_fwd(
    x_ptr, v_cond_ptr, v_uncond_ptr, guidance_ptr, dsigma_ptr, y_ptr, units,
    GUIDED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, lanes, seen = _block(tl.program_id(0), units, UNIT, BLOCK)
    x = tl.load(x_ptr + start + lanes, mask=seen, other=0.0).to(tl.float32)
    v = tl.load(v_cond_ptr + start + lanes, mask=seen, other=0.0).to(tl.float32)
    if GUIDED:
        null = tl.load(v_uncond_ptr + start + lanes, mask=seen, other=0.0).to(tl.float32)
        v = null + tl.load(guidance_ptr) * (v - null)
    y = x + tl.load(dsigma_ptr) * v
    tl.store(y_ptr + start + lanes, y.to(y_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["units"])
def ode_step_bwd(
    dy_ptr, guidance_ptr, dsigma_ptr, dv_cond_ptr, dv_uncond_ptr, units,
    GUIDED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, lanes, seen = _block(tl.program_id(0), units, UNIT, BLOCK)
    step = tl.load(dsigma_ptr) * tl.load(dy_ptr + start + lanes, mask=seen, other=0.0).to(tl.float32)
    if GUIDED:
        guidance = tl.load(guidance_ptr)
        dv_uncond = (1.0 - guidance) * step
        tl.store(dv_uncond_ptr + start + lanes, dv_uncond.to(dv_uncond_ptr.dtype.element_ty), mask=seen)
        step = guidance * step
    tl.store(dv_cond_ptr + start + lanes, step.to(dv_cond_ptr.dtype.element_ty), mask=seen)


def _configured(direction: str, capability: int) -> LaunchConfig:
    # Memory is flat: there is no width that would set one launch apart from another.
    return replace(_DEFAULT, **_config.tuned(f"ode_step.{direction}", 0, capability))


def _unit(x: Tensor) -> int:
    """What divides the number of elements whatever the batch, 16 at most."""
    return math.gcd(16, math.prod(x.shape[1:]))


def forward(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor | None, dsigma: Tensor, y: Tensor
) -> None:
    """Fill y, of x's shape and contiguous. guidance is not read where there is no v_uncond."""
    x, v_cond = x.contiguous(), v_cond.contiguous()
    v_uncond = None if v_uncond is None else v_uncond.contiguous()
    guided, unit, config = v_uncond is not None, _unit(y), _configured("forward", capability_of(x))
    launch(
        ode_step_fwd, (triton.cdiv(y.numel(), config.block),),
        x, v_cond, v_uncond, guidance if guided else None, dsigma, y, y.numel() // unit,
        GUIDED=guided, UNIT=unit, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(dy: Tensor, guidance: Tensor | None, dsigma: Tensor, dv_cond: Tensor, dv_uncond: Tensor | None) -> None:
    """Fill dv_cond and, with guidance, dv_uncond, of dy's shape and contiguous."""
    dy = dy.contiguous()
    guided, unit, config = guidance is not None, _unit(dy), _configured("backward", capability_of(dy))
    launch(
        ode_step_bwd, (triton.cdiv(dy.numel(), config.block),),
        dy, guidance, dsigma, dv_cond, dv_uncond if guided else None, dy.numel() // unit,
        GUIDED=guided, UNIT=unit, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
