"""gated_residual_modulate: a gated residual and the norm after it as diffusers has them, torch.compile of it, ours."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.ops import gated_residual, rms_norm_modulate
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops.gated_residual_modulate import BACKENDS

SMALL = {"tokens": 4, "width": 32}
# As autocast makes them: fp32 residual and weights, half-precision branch and modulation from the GEMMs.
MIXED = {"x": torch.float32, "weight": torch.float32, "next_weight": torch.float32}


def eager(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, next_weight: Tensor, next_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """norm2 and gate_msa, then ffn_norm1 and scale_mlp, of diffusers' `LuminaNextDiTBlock`."""
    h = gated_residual.eager(x, y, gate, weight)
    return h, rms_norm_modulate.eager(h, next_weight, next_scale)


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
    # gate and scale are chunks of one modulation tensor, as adaLN's GEMM writes them
    gate, next_scale = draw("gate", batch, 4 * width, scale=0.5).chunk(4, dim=1)[1:3]
    inputs = {
        "x": draw("x", batch, tokens, width),
        "y": draw("y", batch, tokens, width, scale=2),
        "gate": gate,
        "weight": draw("weight", width, scale=0.1, shift=1),
        "next_weight": draw("next_weight", width, scale=0.1, shift=1),
        "next_scale": next_scale if scaled else None,
    }
    elements, small = batch * tokens * width, 2 * (batch * width + width)
    return Case(
        op="gated_residual_modulate",
        sizes={"batch": batch, "tokens": tokens, "width": width},
        inputs=inputs,
        upstream=(draw("x", batch, tokens, width), draw("x", batch, tokens, width)),
        eager=eager,
        ours=ops.gated_residual_modulate,
        reference=ops.gated_residual_modulate_ref,
        # forward: x, y -> h, n. backward: h, y, dh, dn -> dx, dy; and the modulation, weights and their gradients
        bytes_moved=modes(
            (4 * elements + small) * dtype.itemsize, (6 * elements + 2 * small) * dtype.itemsize + 8 * batch * tokens
        ),
        flops=modes(11 * elements, 26 * elements),
        chosen=BACKENDS.choose(*inputs.values()),
    )


@SIZES
def bench_gated_residual_modulate(
    compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype
) -> None:
    compare(work(case, batch, dtype, bench_device))
