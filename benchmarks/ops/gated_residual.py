"""gated_residual: diffusers' RMSNorm, tanh gate and add, its torch.compile, and ours."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.ops.rms_norm_modulate import rms_norm
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops.gated_residual import BACKENDS

SMALL = {"tokens": 4, "width": 32}
# As autocast makes them: fp32 residual and weight, half-precision branch and modulation from the GEMMs.
MIXED = {"x": torch.float32, "weight": torch.float32}


def eager(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The second half of each branch in diffusers' `LuminaNextDiTBlock`."""
    return x + gate.unsqueeze(1).tanh() * rms_norm(y, weight)


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    width: int = WIDTH,
) -> Case:
    draw = Draw(dtype, device, seed, dtypes)
    inputs = {
        "x": draw("x", batch, tokens, width),
        "y": draw("y", batch, tokens, width, scale=2),
        "gate": draw("gate", batch, 4 * width)[:, width : 2 * width],  # the second chunk of a modulation
        "weight": draw("weight", width, scale=0.1, shift=1),
    }
    elements, small = batch * tokens * width, batch * width + width
    return Case(
        op="gated_residual",
        sizes={"batch": batch, "tokens": tokens, "width": width},
        inputs=inputs,
        upstream=(draw("x", batch, tokens, width),),
        eager=eager,
        ours=ops.gated_residual,
        reference=ops.gated_residual_ref,
        # forward: x, y, gate, weight -> h. backward: dh, y, gate, weight, rstd -> dy, dgate, dweight; dx is dh itself
        bytes_moved=modes(
            (3 * elements + small) * dtype.itemsize, (3 * elements + 2 * small) * dtype.itemsize + 4 * batch * tokens
        ),
        flops=modes(6 * elements, 14 * elements),
        chosen=BACKENDS.choose(*inputs.values()),
    )


@SIZES
def bench_gated_residual(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
