"""flow_matching_loss: BLIP3-o's target and mean squared error, torch.compile of them, and ours with its metrics."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.ops.flow_interpolate import exact_noise
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops._philox import normal_noise
from blip3o_fast.ops.flow_matching_loss import BACKENDS

SMALL = {"tokens": 4, "width": 32}
# As autocast makes them: a half-precision prediction, fp32 features.
MIXED = {"data": torch.float32, "noise": torch.float32}


def eager(
    pred: Tensor, data: Tensor, sigma: Tensor, noise: Tensor, seed: Tensor | None, exact: Tensor | None, weight: float
) -> Tensor:
    """The loss alone, which is what stock trains on; ours returns seven metrics from the same pass. It is always given
    the noise."""
    pred, target = pred.float(), (noise - data).float()
    loss = F.mse_loss(pred, target)
    return loss + weight * pred.norm(dim=-1).mean() if weight else loss


def ours(
    pred: Tensor, data: Tensor, sigma: Tensor, noise: Tensor, seed: Tensor | None, exact: Tensor | None, weight: float
) -> Tensor:
    given = {"noise": noise} if seed is None else {"seed": seed}
    return ops.flow_matching_loss(pred, data, sigma, **given, regularization_weight=weight)[0]


def reference(
    pred: Tensor, data: Tensor, sigma: Tensor, noise: Tensor, seed: Tensor | None, exact: Tensor | None, weight: float
) -> Tensor:
    noise = noise if exact is None else exact
    return ops.flow_matching_loss_ref(pred, data, sigma, noise=noise, regularization_weight=weight)[0]


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    width: int = WIDTH,
    seeded: bool = False,
    weight: float = 0.0,
) -> Case:
    """seeded: ours makes the noise from a seed; eager is given it, the gold as exact. weight: regularisation."""
    draw = Draw(dtype, device, seed, dtypes)
    pred, data = draw("pred", batch, tokens, width), draw("data", batch, tokens, width, shift=0.5)
    sigma, pair = draw.uniform(batch), torch.tensor([5 + seed, 17], device=device) if seeded else None
    noise = draw("noise", batch, tokens, width) if pair is None else normal_noise(pair, data.shape)
    elements, read = batch * tokens * width, 2 if seeded else 3
    forward = read * elements * dtype.itemsize
    # The gradient is made in the forward pass, and kept in fp32 until the upstream gradient is known.
    backward = elements * (4 + dtype.itemsize)
    return Case(
        op="flow_matching_loss",
        sizes={"batch": batch, "tokens": tokens, "width": width, "noise": "seed" if seeded else "given"},
        inputs={"pred": pred},
        given={
            "data": data,
            "sigma": sigma,
            "noise": noise,
            "seed": pair,
            "exact": None if pair is None else exact_noise(pair, data.shape),
        },
        settings={"weight": weight},
        upstream=(1.0 + draw.uniform(),),
        eager=eager,
        ours=ours,
        reference=reference,
        bytes_moved=modes(forward, backward) | {"both": forward + 4 * elements + backward},
        flops=modes(4 * elements, elements),
        chosen=BACKENDS.choose(pred, data, sigma, noise, pair),
        sums=frozenset({"y"}),
    )


@pytest.mark.parametrize("seeded", [False, True], ids=["given", "seeded"])
@SIZES
def bench_flow_matching_loss(
    compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype, seeded: bool
) -> None:
    compare(work(case, batch, dtype, bench_device, seeded=seeded))
