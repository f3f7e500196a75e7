"""ode_step: BLIP3-o's guidance and Euler step, torch.compile of them, and ours."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.cases import SIZES, TOKENS, WIDTH, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops.ode_step import BACKENDS

SMALL = {"tokens": 4, "width": 32}
# As the sampler has them: an fp32 state over a half-precision network.
MIXED = {"x": torch.float32}


def eager(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: Tensor, dsigma: Tensor) -> Tensor:
    """Guidance in the network's dtype, the scheduler's step in fp32, its result cast back."""
    v = v_cond if v_uncond is None else v_uncond + guidance.to(v_cond.dtype) * (v_cond - v_uncond)
    return (x.to(dsigma.dtype) + dsigma * v).to(x.dtype)


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    width: int = WIDTH,
    guided: bool = True,
) -> Case:
    draw = Draw(dtype, device, seed, dtypes)
    x, v_cond, v_uncond = (draw(name, batch, tokens, width) for name in ("x", "v_cond", "v_uncond"))
    guidance, dsigma = (torch.full((), value, device=device) for value in (3.0, -1 / 30))
    elements, tensors = batch * tokens * width, 4 if guided else 3
    return Case(
        op="ode_step",
        sizes={"batch": batch, "tokens": tokens, "width": width, "guided": guided},
        inputs={"x": x, "v_cond": v_cond, "v_uncond": v_uncond if guided else None},
        given={"guidance": guidance, "dsigma": dsigma},
        upstream=(draw("x", batch, tokens, width),),
        eager=eager,
        ours=ops.ode_step,
        reference=ops.ode_step_ref,
        # forward: x, v_cond, v_uncond -> y. backward: dy -> dv_cond, dv_uncond; dx is dy itself
        bytes_moved=modes(tensors * elements * dtype.itemsize, (tensors - 1) * elements * dtype.itemsize),
        flops=modes(5 * elements if guided else 2 * elements, 2 * elements if guided else elements),
        chosen=BACKENDS.choose(x, v_cond, v_uncond, guidance, dsigma),
    )


@SIZES
def bench_ode_step(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
