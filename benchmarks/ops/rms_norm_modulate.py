"""rms_norm_modulate: diffusers' RMSNorm times (1 + scale), its torch.compile, ours, and the norms of others."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import FULL, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops.rms_norm_modulate import BACKENDS

SMALL = {"tokens": 4, "width": 32}
# As autocast makes them: fp32 residual and weight, half-precision modulation from the GEMM.
MIXED = {"x": torch.float32, "weight": torch.float32}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The op sequence of diffusers' `RMSNorm`, with its roundings."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    y = x * torch.rsqrt(variance + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        y = y.to(weight.dtype)
    return y * weight


def eager(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The op sequence of diffusers' `RMSNorm` and `LuminaRMSNormZero` in the same dtype."""
    y = rms_norm(x, weight)
    return y if scale is None else y * (1 + scale[:, None])


def bytes_moved(batch: int, itemsize: int, tokens: int, width: int) -> dict[str, int]:
    """forward: x, weight, scale -> y. backward: dy, x, weight, scale, rstd -> dx, dweight, dscale."""
    rows, small = batch * tokens * width, batch * width + width
    return modes((2 * rows + small) * itemsize, (3 * rows + 2 * small) * itemsize + 4 * batch * tokens)


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    width: int = WIDTH,
    scaled: bool = True,
) -> Case:
    draw = Draw(dtype, device, seed, dtypes)
    x, weight = draw("x", batch, tokens, width), draw("weight", width, scale=0.1, shift=1)
    # in the model, scale is one chunk of the four that one GEMM makes
    scale = draw("scale", batch, 4 * width, scale=0.3)[:, :width] if scaled else None
    elements = batch * tokens * width
    return Case(
        op="rms_norm_modulate",
        sizes={"batch": batch, "tokens": tokens, "width": width},
        inputs={"x": x, "weight": weight, "scale": scale},
        upstream=(draw("y", batch, tokens, width),),
        eager=eager,
        ours=ops.rms_norm_modulate,
        reference=ops.rms_norm_modulate_ref,
        bytes_moved=bytes_moved(batch, dtype.itemsize, tokens, width),
        # forward: x^2 and its sum 2, times rstd, times the sample's factor; backward: xhat, g, two products with their
        # sums 4, and dx 3
        flops=modes(4 * elements, 9 * elements),
        chosen=BACKENDS.choose(x, weight, scale),
        peers=peers.rms_norms(),
    )


_QUICK = [(1, torch.float32), (64, torch.float32)]
_FULL = [(4, torch.float32), *(size for size in FULL if size not in _QUICK)]


@pytest.mark.parametrize(
    ("batch", "dtype"), [*_QUICK, *(pytest.param(*size, marks=pytest.mark.full) for size in _FULL)], ids=str
)
def bench_rms_norm_modulate(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
