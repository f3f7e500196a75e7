"""Triton kernels of `swiglu`: every program owns BLOCK_F columns of one row, of both halves of it.

    forward:   y  = a * s * b,  s = 1 / (1 + exp(-a))                  one read of gate_up, one write of y
    backward:  da = dy * b * s * (1 + a * (1 - s)),  db = dy * a * s   one read of dy and gate_up, one write of dgate_up

F = 4864 is 4.75 blocks of 1024. Whole rows would be blocks of 8192, of which 41 % sit idle, in few large programs.
"""

import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _config
from blip3o_fast.kernels._config import LaunchConfig, next_power_of_2
from blip3o_fast.kernels._launch import capability_of, launch
from blip3o_fast.kernels._tl import sigmoid

_BLOCK = 1024
# Of a block, in one thread: one access of 128 bits for each tensor in half precision.
_ELEMENTS_PER_THREAD = 8


@triton.jit
def swiglu_fwd(gate_up_ptr, y_ptr, stride, F: tl.constexpr, BLOCK_F: tl.constexpr):
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its programs does not.
    program = tl.program_id(0)
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (program // blocks).to(tl.int64)
    cols = (program % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    seen = cols < F
    gate_ptr = gate_up_ptr + row * stride
    a = tl.load(gate_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    b = tl.load(gate_ptr + F + cols, mask=seen, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + cols, (a * sigmoid(a) * b).to(y_ptr.dtype.element_ty), mask=seen)


@triton.jit
def swiglu_bwd(dy_ptr, gate_up_ptr, dgate_up_ptr, stride_dy, stride, F: tl.constexpr, BLOCK_F: tl.constexpr):
    program = tl.program_id(0)
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (program // blocks).to(tl.int64)
    cols = (program % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    seen = cols < F
    gate_ptr = gate_up_ptr + row * stride
    dy = tl.load(dy_ptr + row * stride_dy + cols, mask=seen, other=0.0).to(tl.float32)
    a = tl.load(gate_ptr + cols, mask=seen, other=0.0).to(tl.float32)
    b = tl.load(gate_ptr + F + cols, mask=seen, other=0.0).to(tl.float32)
    s = sigmoid(a)
    da = dy * b * (s * (1.0 + a * (1.0 - s)))
    db = dy * (a * s)
    dgate_ptr = dgate_up_ptr + row * (2 * F)
    tl.store(dgate_ptr + cols, da.to(dgate_up_ptr.dtype.element_ty), mask=seen)
    tl.store(dgate_ptr + F + cols, db.to(dgate_up_ptr.dtype.element_ty), mask=seen)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., N] and the distance between its rows: x itself where one number says it, else a copy."""
    if not x.is_contiguous():
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        return x, x.stride(0)
    return x, x.shape[-1]


def _configured(direction: str, width: int, capability: int) -> LaunchConfig:
    table = _config.tuned(f"swiglu.{direction}", width, capability)
    block: int = table.get("block", min(_BLOCK, next_power_of_2(width)))
    return LaunchConfig(num_warps=table.get("num_warps", max(1, block // (32 * _ELEMENTS_PER_THREAD))), block=block)


def forward(gate_up: Tensor, y: Tensor) -> None:
    """Fill y [..., F], contiguous."""
    width = y.shape[-1]
    if y.numel() == 0:
        return
    gate_up, stride = _rows(gate_up)
    config = _configured("forward", width, capability_of(gate_up))
    launch(
        swiglu_fwd, (y.numel() // width * triton.cdiv(width, config.block),),
        gate_up, y, stride,
        F=width, BLOCK_F=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def backward(dy: Tensor, gate_up: Tensor, dgate_up: Tensor) -> None:
    """Fill dgate_up [..., 2F], contiguous."""
    width = dy.shape[-1]
    if dy.numel() == 0:
        return
    (dy, stride_dy), (gate_up, stride) = _rows(dy), _rows(gate_up)
    config = _configured("backward", width, capability_of(gate_up))
    launch(
        swiglu_bwd, (dgate_up.numel() // (2 * width) * triton.cdiv(width, config.block),),
        dy, gate_up, dgate_up, stride_dy, stride,
        F=width, BLOCK_F=config.block, num_warps=config.num_warps,
    )  # fmt: skip
