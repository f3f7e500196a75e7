"""packed_linear of a block's four products on a CPU: torch's linear, oneDNN's packed weights, and ours."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.work import Absent, Inputs, Values, Verdict, Work, error_bound, gold_by
from blip3o_fast.ops import PackedWeights, packed_linear
from blip3o_fast.testing import relative_l2

# (inputs, outputs) of BLIP3-o's block: q1 k1 q2 v1; w1 w3; w2; the attention's output
PRODUCTS = {"qkqv": (1792, 7168), "gate_up": (1792, 9728), "down": (4864, 1792), "out": (1792, 1792)}
INT8_ERROR = 0.03  # relative L2 of one product: 8 bits with one scale per row keep 1 to 2 % of normal numbers


def onednn(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The best that PyTorch has, behind no public name: what Inductor's freezing calls."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def ours(weight: Tensor, storage: str) -> Callable[[Tensor], Tensor]:
    packed = PackedWeights([weight], storage=storage)
    return lambda x: packed_linear(x, packed)


def cold(make: Callable[[], Callable[[Tensor], Tensor]], copies: int) -> Callable[[Tensor], Tensor] | Absent:
    """The product with as many equal weights in turn as exceed the caches: a block's weights come from memory."""
    try:
        turn = itertools.cycle([make() for _ in range(copies)])
    except (AttributeError, RuntimeError) as error:
        return Absent(str(error).splitlines()[0])
    return lambda x: next(turn)(x)


def judge(given: Values, baseline: Values, gold: Values) -> Verdict:
    """Sums of thousands of products in any order: fp32 arithmetic, one rounding to y's dtype; int8 by its own bound."""
    y = given["y"]
    error, bound = relative_l2(y, gold["y"]), error_bound(y.dtype)
    wrong = None if error <= max(bound, INT8_ERROR) else f"y: relative L2 error {error:.3e}"
    return Verdict(wrong, None if error <= bound else f"y: relative L2 error {error:.3e} > {bound:.3e}", {"y": error})


def work(rows: int, product: str, dtype: torch.dtype) -> Work:
    inner, outer = PRODUCTS[product]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outer, inner, generator=generator) / inner**0.5).to(dtype)

    def inputs() -> Inputs:
        x, dy = (torch.randn(rows, columns, generator=generator).to(dtype) for columns in (inner, outer))
        return Inputs((x,), {"x": x}, dy)

    copies = math.ceil(2 * machine.cache_bytes() / weight.nbytes)
    makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "eager": lambda: functools.partial(F.linear, weight=weight.clone()),
        "onednn": lambda: onednn(weight, rows),
    }
    for storage in ("fp32", "bf16", "int8") if dtype == torch.float32 else ("bf16", "int8"):
        makers[storage] = functools.partial(ours, weight, storage)
    itemsize = dtype.itemsize
    return Work(
        suite="packed_linear",
        case={
            "rows": rows,
            "product": product,
            "in": inner,
            "out": outer,
            "dtype": str(dtype).removeprefix("torch."),
        },
        inputs=inputs,
        providers={name: cold(make, copies) for name, make in makers.items()},
        gold=gold_by(lambda x: F.linear(x, weight.to(x.dtype))),
        bytes_moved={"forward": (inner * outer + rows * (inner + outer)) * itemsize},
        flops={"forward": 2 * rows * inner * outer},
        modes=("forward",),
        rotate=False,  # the weights rotate instead
        judge=judge,
        # weights rounded to fewer bits are another matrix: timed, and the row says how far off
        peers=frozenset({"onednn", "int8", *(["bf16"] if dtype == torch.float32 else [])}),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [64, 256])
def bench_packed_linear(
    compare: Callable[[Work], None], bench_device: str, rows: int, product: str, dtype: Any
) -> None:
    compare(work(rows, product, dtype))
