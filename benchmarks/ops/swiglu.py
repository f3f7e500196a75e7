"""swiglu: diffusers' FP32SiLU times the other half, its torch.compile, ours, and what others have made of it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.cases import SIZES, TOKENS, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops.swiglu import BACKENDS

FFN_WIDTH = 4864
SMALL = {"tokens": 4, "width": 32}
MIXED: dict[str, torch.dtype] = {}  # one input


def eager(gate_up: Tensor) -> Tensor:
    """diffusers' `LuminaFeedForward` between its GEMMs; the two halves are views here, two results there."""
    a, b = gate_up.chunk(2, dim=-1)
    return F.silu(a.float()).to(a.dtype) * b


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    width: int = FFN_WIDTH,
) -> Case:
    """width: F, of each half."""
    draw = Draw(dtype, device, seed, dtypes)
    gate_up = draw("gate_up", batch, tokens, 2 * width, scale=3)
    elements = batch * tokens * width
    return Case(
        op="swiglu",
        sizes={"batch": batch, "tokens": tokens, "width": width},
        inputs={"gate_up": gate_up},
        upstream=(draw("y", batch, tokens, width),),
        eager=eager,
        ours=ops.swiglu,
        reference=ops.swiglu_ref,
        # forward: a, b -> y. backward: dy, a, b -> da, db
        bytes_moved=modes(3 * elements * dtype.itemsize, 5 * elements * dtype.itemsize),
        flops=modes(5 * elements, 10 * elements),
        chosen=BACKENDS.choose(gate_up),
        peers=peers.swiglus(),
    )


@SIZES
def bench_swiglu(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
