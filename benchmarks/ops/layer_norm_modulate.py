"""layer_norm_modulate: diffusers' LayerNorm without parameters times (1 + scale), its torch.compile, ours, Liger's."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops.layer_norm_modulate import BACKENDS

SMALL = {"tokens": 4, "width": 32}
# As autocast makes them: fp32 residual, half-precision modulation from the GEMM.
MIXED = {"x": torch.float32}


def eager(x: Tensor, scale: Tensor) -> Tensor:
    """The op sequence of diffusers' `LuminaLayerNormContinuous` before its second GEMM."""
    return F.layer_norm(x, x.shape[-1:], None, None, 1e-6) * (1 + scale)[:, None, :]


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
    x = draw("x", batch, tokens, width, shift=0.5)
    scale = draw("scale", batch, width, scale=0.3)
    elements, small = batch * tokens * width, batch * width
    return Case(
        op="layer_norm_modulate",
        sizes={"batch": batch, "tokens": tokens, "width": width},
        inputs={"x": x, "scale": scale},
        upstream=(draw("x", batch, tokens, width),),
        eager=eager,
        ours=ops.layer_norm_modulate,
        reference=ops.layer_norm_modulate_ref,
        # forward: x, scale -> y. backward: dy, x, scale, mean, rstd -> dx, dscale
        bytes_moved=modes(
            (2 * elements + small) * dtype.itemsize, (3 * elements + 2 * small) * dtype.itemsize + 8 * batch * tokens
        ),
        flops=modes(8 * elements, 13 * elements),
        chosen=BACKENDS.choose(x, scale),
        peers=peers.layer_norms(),
    )


@SIZES
def bench_layer_norm_modulate(
    compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype
) -> None:
    compare(work(case, batch, dtype, bench_device))
