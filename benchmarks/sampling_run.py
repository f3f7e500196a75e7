"""Whole sampling runs on a CPU, one sample with guidance: a plain loop over diffusers' modules, our network called at
every step with nothing made before, `sample` and `Sampler`.

All sides have the same random weights and start from the same noise; every repetition has a condition of its own, so
nothing is kept from one to the next. "distance" is the relative L2 distance of the samples to those of stock in fp32.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.__main__ import AVX2_ONLY
from benchmarks.model_block import as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.demo.stock import StockBLIP3o, sample_stock
from blip3o_fast.ops import _cpu, use_isa
from blip3o_fast.sampling import Sampler
from blip3o_fast.testing import relative_l2
from blip3o_fast.timing import interleaved

CONTEXT_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CallByCall(nn.Module):
    """Our network without what the sampler makes once: every call computes everything from its arguments."""

    def __init__(self, model: BLIP3oDiT) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs)


def runs_of(
    model: BLIP3oDiT, stock: StockBLIP3o, settings: dict[str, Any], dtype: torch.dtype
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """name -> run(condition, noise), both fp32 [1, ...]."""
    sampler, call_by_call = Sampler(model), CallByCall(model)
    return {
        "stock": lambda condition, noise: sample_stock(stock, condition.to(dtype), noise.to(dtype), **settings),
        "call by call": lambda condition, noise: sample(call_by_call, condition, noise=noise, **settings),
        "sample": lambda condition, noise: sample(model, condition, noise=noise, **settings),
        "Sampler (packed)": lambda condition, noise: sampler(condition, noise=noise, **settings),
    }


def _in_turn(run: Callable[[Tensor, Tensor], Tensor], conditions: list[Tensor], noise: Tensor) -> Callable[[], Tensor]:
    turn = itertools.cycle(conditions)
    return lambda: run(next(turn), noise)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling_run", description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of the network (24)")
    parser.add_argument("--width", type=int, default=1792, help="of the network (1792)")
    parser.add_argument("--steps", type=int, default=10, help="of a run (10)")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="two passes a step unless it is 1 or 0 (3)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turn (3)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of weights and activations (both)")
    parser.add_argument("--isa", choices=("auto", "avx2"), default="auto", help="avx2: everybody does without AVX-512")
    options = parser.parse_args(arguments)
    for name in ("layers", "width", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    if options.width % 64:
        parser.error(f"argument --width: must be a multiple of 64, the width of a head, got {options.width}")
    if options.isa == "avx2" and not AVX2_ONLY.items() <= os.environ.items():  # read when the libraries are loaded
        command = [sys.executable, "-m", "benchmarks.sampling_run", *arguments]
        return subprocess.run(command, env={**os.environ, **AVX2_ONLY}).returncode
    with use_isa(options.isa):
        return report(options)


def report(options: argparse.Namespace) -> int:
    heads = options.width // 64
    config = BLIP3oConfig(num_layers=options.layers, hidden_size=options.width, num_attention_heads=heads)
    model = BLIP3oDiT(config).eval().requires_grad_(False)
    as_trained(model, torch.Generator().manual_seed(0))
    stock = StockBLIP3o.with_weights(config, model.state_dict())

    generator = torch.Generator().manual_seed(1)
    conditions = [torch.randn(1, CONTEXT_TOKENS, config.cross_attention_dim, generator=generator) for _ in range(8)]
    noise = torch.randn(1, config.num_tokens, config.in_channels, generator=generator)
    settings = {"num_steps": options.steps, "guidance_scale": options.guidance_scale}
    exact = sample_stock(stock, conditions[0], noise, **settings)
    stamp = machine.stamp()
    print(f"{stamp['cpu']['model']}, {stamp['threads']} threads, {_cpu.active_isa()}, commit {stamp['commit']}")
    print(f"{options.layers} layers, width {options.width}, {options.steps} steps, guidance {options.guidance_scale:g}")
    for name in options.dtype or DTYPES:
        model, stock = model.to(DTYPES[name]), stock.to(DTYPES[name])
        runs = runs_of(model, stock, settings, DTYPES[name])
        distances = {side: relative_l2(run(conditions[0], noise), exact) for side, run in runs.items()}
        calls = {side: _in_turn(run, conditions, noise) for side, run in runs.items()}
        timings = interleaved(calls, rounds=options.rounds, warmup=0)
        for side, timing in timings.items():
            hoisting = timing.speedups(timings["call by call"]).median if side == "sample" else None
            gain = timing.speedups(timings["stock"]).median
            line = f"{name:6}{side:20}{timing.median:>9.3f} s{gain:>8.2f} x   distance {distances[side]:.1e}"
            if hoisting is not None:
                line += f"   {hoisting:.2f} x call by call"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
