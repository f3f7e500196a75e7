"""flow_interpolate: BLIP3-o's elementwise sequence, its torch.compile, and ours; the noise given or made on the way."""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops._philox import normal_noise, philox_4x32_10, split_words, uniform
from blip3o_fast.ops.flow_interpolate import BACKENDS

SMALL = {"tokens": 4, "width": 32}
MIXED = {"noise": torch.float32}


def exact_noise(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise of (seed, offset) with logarithm, sine and cosine in fp64: what every fp32 version is off from."""
    samples, elements = torch.arange(shape[0], device=seed.device) + seed[1], math.prod(shape[1:])
    quads = torch.arange((elements + 3) // 4, device=seed.device)
    counter = (*split_words(quads[None, :]), *split_words(samples[:, None]))
    a, b, c, d = (uniform(word).double() for word in philox_4x32_10(counter, split_words(seed[0])))
    pairs = [((-2 * u.log()).sqrt(), 2 * math.pi * v) for u, v in ((a, b), (c, d))]
    normals = torch.stack([f(angle) * r for r, angle in pairs for f in (torch.cos, torch.sin)], dim=-1)
    return normals.reshape(shape[0], normals.shape[1] * 4)[:, :elements].reshape(tuple(shape))


def eager(
    data: Tensor, sigma: Tensor, noise: Tensor, seed: Tensor | None, exact: Tensor | None, schedule: str
) -> Tensor:
    """sigma in the latents' dtype, then elementwise operations in that dtype. It is always given the noise: what
    drawing it costs is left out, in its favour."""
    sigma = sigma.to(data.dtype).reshape(-1, *(1,) * (data.dim() - 1))
    if schedule == "linear":
        alpha, scale = 1.0 - sigma, sigma
    else:
        alpha, scale = (1 + torch.cos(math.pi * sigma)) / 2, torch.sin(math.pi * sigma / 2)
    return (alpha * data + scale * noise).to(data.dtype)


def ours(
    data: Tensor, sigma: Tensor, noise: Tensor, seed: Tensor | None, exact: Tensor | None, schedule: str
) -> Tensor:
    if seed is None:
        return ops.flow_interpolate(data, sigma, noise=noise, schedule=schedule)
    return ops.flow_interpolate(data, sigma, seed=seed, schedule=schedule)


def reference(
    data: Tensor, sigma: Tensor, noise: Tensor, seed: Tensor | None, exact: Tensor | None, schedule: str
) -> Tensor:
    return ops.flow_interpolate_ref(data, sigma, noise=noise if exact is None else exact, schedule=schedule)


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
    schedule: str = "linear",
) -> Case:
    """seeded: ours makes the noise from a seed; eager is given it as a tensor, and the gold as exact."""
    draw = Draw(dtype, device, seed, dtypes)
    data, sigma = draw("data", batch, tokens, width, shift=0.5), draw.uniform(batch)
    pair = torch.tensor([5 + seed, 17], device=device) if seeded else None
    noise = draw("noise", batch, tokens, width) if pair is None else normal_noise(pair, data.shape)
    elements = batch * tokens * width
    tensors = 2 if seeded else 3
    return Case(
        op="flow_interpolate",
        sizes={"batch": batch, "tokens": tokens, "width": width, "noise": "seed" if seeded else "given"},
        inputs={"data": data} if seeded else {"data": data, "noise": noise},
        given={
            "sigma": sigma,
            "seed": pair,
            "exact": None if pair is None else exact_noise(pair, data.shape),
            **({"noise": noise} if seeded else {}),
        },
        settings={"schedule": schedule},
        upstream=(draw("data", batch, tokens, width),),
        eager=eager,
        ours=ours,
        reference=reference,
        # forward: data, noise (where it is given) -> x_t. backward: dy -> ddata, dnoise
        bytes_moved=modes(tensors * elements * dtype.itemsize + 4 * batch, tensors * elements * dtype.itemsize),
        flops=modes(3 * elements, (tensors - 1) * elements),
        chosen=BACKENDS.choose(data, sigma, noise, pair),
    )


@pytest.mark.parametrize("seeded", [False, True], ids=["given", "seeded"])
@SIZES
def bench_flow_interpolate(
    compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype, seeded: bool
) -> None:
    compare(work(case, batch, dtype, bench_device, seeded=seeded))
