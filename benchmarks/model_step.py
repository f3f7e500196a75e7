"""The network in sampling, one call: stock's sequence, ours, and ours with the condition prepared before."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.model_block import CONTEXT_TOKENS, Doubled, as_trained, flops, judge_half, on_triton
from benchmarks.work import Absent, Inputs, Values, Work, compiled, values
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.eager import eager_forward


def make_model(config: BLIP3oConfig, dtype: torch.dtype, device: str) -> BLIP3oDiT:
    """As training leaves it: gates and modulation, zero at initialisation, are not. Made on the device."""
    with torch.device(device):
        model = BLIP3oDiT(config)
    as_trained(model, torch.Generator(device).manual_seed(0))
    return model.to(dtype).eval().requires_grad_(False)


def work(
    batch: int,
    dtype: torch.dtype,
    device: str,
    config: BLIP3oConfig,
    *,
    triton: bool | None = None,
    compile: bool = True,
) -> Work:
    """batch: what the network sees, with guidance two per sample. All inputs of a Work are those of its one model."""
    triton = device == "cuda" if triton is None else triton
    model = make_model(config, dtype, device)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def prepare(condition: Tensor) -> Any:
        with torch.no_grad():
            return on_triton(model.prepare_condition, triton)(condition)

    def inputs() -> Inputs:
        x = draw(batch, config.num_tokens, config.in_channels)
        condition = draw(batch, CONTEXT_TOKENS, config.cross_attention_dim)
        time = torch.full((batch,), 400.0, device=device)
        return Inputs((x, time, condition, prepare(condition)), {}, draw(*x.shape))

    def eager(x: Tensor, time: Tensor, condition: Tensor, made: Any) -> Tensor:
        return eager_forward(model, x, time, condition)

    def ours(x: Tensor, time: Tensor, condition: Tensor, made: Any) -> Tensor:
        return model(x, time, condition)

    def hoisted(x: Tensor, time: Tensor, condition: Tensor, made: Any) -> Tensor:
        return model(x, time, made)

    def gold(given: Inputs) -> Values:
        double = copy.deepcopy(model).double()
        with Doubled():
            return values(
                lambda x, time, condition, made: eager_forward(double, x.double(), time, condition.double()),
                given,
                gradients=False,
            )

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    forward = weights + 2 * batch * config.num_tokens * config.in_channels * dtype.itemsize
    products = config.num_layers * flops(config, batch)["forward"]
    return Work(
        suite="model_step",
        case={
            "batch": batch,
            "layers": config.num_layers,
            "width": config.hidden_size,
            "dtype": str(dtype).removeprefix("torch."),
        },
        inputs=inputs,
        providers={
            "eager": eager,
            "compile": compiled(eager, device) if compile else Absent("left out of this run"),
            "ours": on_triton(ours, triton),
            "ours, condition prepared": on_triton(hoisted, triton),
        },
        gold=gold,
        judge=functools.partial(judge_half, dtype=dtype),
        bytes_moved={"forward": forward, "inference": forward},
        flops={"forward": products, "inference": products},
        modes=("forward",),
        rotate=False,
    )


@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.full
def bench_model_step(compare: Callable[[Work], None], bench_device: str, batch: int) -> None:
    compare(work(batch, torch.float32, bench_device, BLIP3oConfig(num_layers=2)))
