"""merged_linear of q1, k1, q2 and v1: one GEMM each as stock, torch.compile of them, and ours as one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops

SMALL = {"tokens": 4, "width": 16, "parts": (16, 8, 16)}
MIXED: dict[str, torch.dtype] = {}  # a GEMM has one dtype; autocast casts


def eager(x: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights.values())


def _split(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The op's one result as the model reads it: each layer's columns, the gradients joined again."""

    def run(x: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
        layers = list(weights.values())
        return function(x, layers).split([weight.shape[0] for weight in layers], dim=-1)

    return run


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    width: int = WIDTH,
    parts: tuple[int, ...] = (WIDTH,) * 4,
) -> Case:
    """parts: outputs of each layer; the weights lie side by side in one storage, as the model lays them out."""
    draw, columns = Draw(dtype, device, seed, dtypes), sum(parts)
    inputs: dict[str, Any] = {"x": draw("x", batch, tokens, width)}
    whole = draw("weight", columns, width, scale=width**-0.5)
    inputs |= {f"weight{i}": weight for i, weight in enumerate(whole.split(list(parts)))}
    rows = batch * tokens
    forward = rows * width + columns * width + rows * columns
    products = 2 * rows * width * columns
    return Case(
        op="merged_linear",
        sizes={"batch": batch, "tokens": tokens, "width": width, "columns": columns},
        inputs=inputs,
        upstream=tuple(draw("y", batch, tokens, part) for part in parts),
        eager=eager,
        ours=_split(ops.merged_linear),
        reference=_split(ops.merged_linear_ref),
        # forward: x, weights -> y. backward: dy, x, weights -> dx, dweights
        bytes_moved=modes(forward * dtype.itemsize, (2 * forward - rows * columns) * dtype.itemsize),
        flops=modes(products, 2 * products),
        chosen="vendor GEMM",
    )


@SIZES
def bench_merged_linear(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
