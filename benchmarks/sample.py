"""A whole sampling run with guidance: latency of one sample, throughput of many. Stock's loop and its torch.compile,
`sample`, and `Sampler` by what it stores.

All have the same weights and start from the same noise; every call has a condition of its own, so nothing is kept from
one to the next. Few layers stand for all: `python -m benchmarks.sampling_run` has the whole depth.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.model_block import CONTEXT_TOKENS, Doubled, flops, judge_half
from benchmarks.model_step import make_model
from benchmarks.work import Absent, Inputs, Values, Verdict, Work, compiled
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.demo.stock import StockBLIP3o, sample_stock
from blip3o_fast.sampling import Sampler
from blip3o_fast.testing import relative_l2

FAR = 0.1  # relative L2 distance of samples that are those of the fp64 run, in any storage
RUN = {"num_steps": 4, "guidance_scale": 3.0}


def judge(given: Values, baseline: Values, gold: Values, dtype: torch.dtype) -> Verdict:
    """Inexact: further from the fp64 run than twice the first provider is. Wrong: so far that it is another sample."""
    verdict = judge_half(given, baseline, gold, dtype=dtype)
    error = relative_l2(given["y"], gold["y"])
    return Verdict(None if error <= FAR else f"y: relative L2 error {error:.3e} > {FAR}", verdict.inexact, {"y": error})


def _sampler(model: BLIP3oDiT, run: dict[str, Any], storage: str) -> Callable[[Tensor, Tensor], Tensor] | Absent:
    try:
        sampler = Sampler(model, storage=storage)
    except (RuntimeError, ValueError) as error:  # nothing is packed without the extension, or on a GPU
        return Absent(str(error))
    return lambda condition, noise: sampler(condition, noise=noise, **run)


def exact(model: BLIP3oDiT, run: dict[str, Any], given: Inputs) -> Values:
    """The gold: stock's loop over diffusers' modules in fp64."""
    double = StockBLIP3o.with_weights(model.config, model.state_dict()).double().to(given.args[0].device)
    with Doubled():
        return {"y": sample_stock(double, *(arg.double() for arg in given.args), **run)}


def work(
    batch: int,
    dtype: torch.dtype,
    config: BLIP3oConfig,
    device: str = "cpu",
    *,
    compile: bool = True,
    **run: Any,
) -> Work:
    """run: `num_steps` and `guidance_scale`, instead of `RUN`'s. The condition and the noise are fp32 for everybody."""
    settings = {**RUN, **run}
    model = make_model(config, dtype, device)
    stock = StockBLIP3o.with_weights(config, model.state_dict()).to(device, dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(1)

    def inputs() -> Inputs:
        condition = torch.randn(batch, CONTEXT_TOKENS, config.cross_attention_dim, generator=generator, device=device)
        noise = torch.randn(batch, config.num_tokens, config.in_channels, generator=generator, device=device)
        # rounded to the network's dtype, so that the fp64 run sees what stock sees
        return Inputs((condition.to(dtype).float(), noise.to(dtype).float()), {}, noise)

    def loop(network: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda condition, noise: sample_stock(network, condition.to(dtype), noise.to(dtype), **settings)

    network = compiled(stock, device, whole=False) if compile else Absent("left out of this run")
    storages = ("fp32", "bf16") if dtype == torch.float32 else ("bf16", "int8")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    passes = settings["num_steps"] * (1 if settings["guidance_scale"] in (0, 1) else 2)
    return Work(
        suite="sample",
        case={
            "batch": batch,
            "layers": config.num_layers,
            "width": config.hidden_size,
            "steps": settings["num_steps"],
            "guidance": settings["guidance_scale"],
            "dtype": str(dtype).removeprefix("torch."),
        },
        inputs=inputs,
        providers={
            "eager": loop(stock),
            "compile": network if isinstance(network, Absent) else loop(network),
            "ours": lambda condition, noise: sample(model, condition, noise=noise, **settings),
            **{f"Sampler, {storage}": _sampler(model, settings, storage) for storage in storages},
            **({"Sampler": _sampler(model, settings, "auto")} if device == "cuda" else {}),
        },
        gold=lambda given: exact(model, settings, given),
        judge=functools.partial(judge, dtype=dtype),
        bytes_moved={"whole": settings["num_steps"] * weights},
        flops={"whole": passes * config.num_layers * flops(config, batch)["forward"]},
        modes=("whole",),
        peers=frozenset({"compile", f"Sampler, {storages[1]}"}),  # the last in fewer bits than the weights have
        items=(batch, "samples"),
    )


WIDE = {"in_channels": 1792, "cross_attention_dim": 2048}
TWO = {"config": BLIP3oConfig(num_layers=2, **WIDE), "num_steps": 4}
full = pytest.mark.full


@pytest.mark.benchmark(min_rounds=3)  # a run takes seconds
@pytest.mark.parametrize(
    "case",
    [
        pytest.param({**TWO, "batch": 1, "dtype": torch.float32}, id="latency"),
        pytest.param(
            {"config": BLIP3oConfig(num_layers=1, **WIDE), "num_steps": 2, "batch": 8, "dtype": torch.float32},
            id="throughput, one layer",
        ),
        pytest.param({**TWO, "batch": 1, "dtype": torch.bfloat16}, id="latency, bfloat16", marks=full),
        pytest.param({**TWO, "batch": 16, "dtype": torch.float32}, id="throughput", marks=full),
        pytest.param({**TWO, "batch": 16, "dtype": torch.bfloat16}, id="throughput, bfloat16", marks=full),
    ],
)
def bench_sample(compare: Callable[[Work], None], bench_device: str, case: dict[str, Any]) -> None:
    compare(work(**case, device=bench_device))
