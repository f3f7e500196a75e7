"""rms_norm_modulate: diffusers' RMSNorm times (1 + scale), its torch.compile, and ours."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.work import Inputs, Work, compiled, gold_by
from blip3o_fast import ops
from blip3o_fast.ops.rms_norm_modulate import BACKENDS

TOKENS, WIDTH = 64, 1792


def eager(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The op sequence of diffusers' `RMSNorm` and `LuminaRMSNormZero` in the same dtype."""
    dtype = x.dtype
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    y = x * torch.rsqrt(variance + 1e-5)
    if weight.dtype in (torch.float16, torch.bfloat16):
        y = y.to(weight.dtype)
    y = (y * weight).to(dtype)
    return y * (1 + scale[:, None])


def bytes_moved(batch: int, itemsize: int) -> dict[str, int]:
    """forward: x, weight, scale -> y. backward: dy, x, weight, scale, rstd -> dx, dweight, dscale."""
    rows, small = batch * TOKENS * WIDTH, batch * WIDTH + WIDTH
    forward = (2 * rows + small) * itemsize
    backward = (3 * rows + 2 * small) * itemsize + 4 * batch * TOKENS
    return {"forward": forward, "backward": backward, "both": forward + backward}


def flops(batch: int) -> dict[str, int]:
    """Per element, forward: x^2 and its sum 2, times rstd, times the sample's factor. backward: xhat, g, two
    products with their sums 4, and dx 3."""
    elements = batch * TOKENS * WIDTH
    return {"forward": 4 * elements, "backward": 9 * elements, "both": 13 * elements}


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        (1, torch.float32),
        (4, torch.float32),
        (64, torch.float32),
        pytest.param(256, torch.float32, marks=pytest.mark.full),
        pytest.param(4, torch.bfloat16, marks=pytest.mark.full),
        pytest.param(64, torch.bfloat16, marks=pytest.mark.full),
    ],
    ids=str,
)
def bench_rms_norm_modulate(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (shift + scale * torch.randn(shape, generator=generator)).to(bench_device, dtype)

    def inputs() -> Inputs:
        x, weight = draw(batch, TOKENS, WIDTH), draw(WIDTH, scale=0.1, shift=1)
        # in the model, scale is one chunk of the four that one GEMM makes
        scale = draw(batch, 4 * WIDTH, scale=0.3)[:, :WIDTH]
        wrt = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "scale": scale.requires_grad_()}
        return Inputs((x, weight, scale), wrt, draw(batch, TOKENS, WIDTH))

    sample = inputs().args
    compare(
        Work(
            suite="rms_norm_modulate",
            case={"batch": batch, "tokens": TOKENS, "width": WIDTH, "dtype": str(dtype).removeprefix("torch.")},
            inputs=inputs,
            providers={
                "eager": eager,
                "compile": compiled(eager, bench_device),
                "ours": ops.rms_norm_modulate,
            },
            gold=gold_by(ops.rms_norm_modulate_ref),
            bytes_moved=bytes_moved(batch, dtype.itemsize),
            flops=flops(batch),
            details={"ours": BACKENDS.choose(*sample)},
        )
    )
