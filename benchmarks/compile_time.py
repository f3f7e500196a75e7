"""How long a user waits for the first result: a fresh process imports, samples, trains, compiles. In seconds.

Every call is a process of its own, from its start to its end, with no compiled code kept from an earlier one. What it
computed is compared with fp64, here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.work import Absent, Inputs, Values, Verdict, Work
from blip3o_fast.testing import relative_l2

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1e-4  # relative L2 of a few layers in fp32

IMPORTS = {
    "import torch": "import torch",
    "import blip3o_fast": "import blip3o_fast",
    "from blip3o_fast import BLIP3oDiT, sample": "from blip3o_fast import BLIP3oDiT, sample",
    "import diffusers' network": "from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel",
}
# Weights and inputs are drawn in fp32 from the same seeds in every process.
PREAMBLE = """
import json, torch
from benchmarks.model_block import CONTEXT_TOKENS, as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
config = BLIP3oConfig.preset({preset!r})
model = as_trained(BLIP3oDiT(config).eval(), torch.Generator().manual_seed(0)).requires_grad_(False)
generator = torch.Generator().manual_seed(1)
condition = torch.randn(1, CONTEXT_TOKENS, config.cross_attention_dim, generator=generator)
noise = torch.randn(1, config.num_tokens, config.in_channels, generator=generator)
time = torch.tensor([400.0])
"""
STOCK = """
from blip3o_fast.demo.stock import StockBLIP3o, sample_stock
stock = StockBLIP3o.with_weights(config, model.state_dict()).requires_grad_(False)
"""
RUN = "{'num_steps': 2, 'guidance_scale': 3.0}"
TRAIN = """
network.requires_grad_(True).train()
loss = network(noise, time, condition).pow(2).mean()
loss.backward()
torch.optim.AdamW(network.parameters()).step()
result = loss.detach()
"""
ANSWER = "\nprint(json.dumps(result.flatten().tolist()))"
# name -> (what stock does, eager; compiled; what ours does, eager; compiled)
FIRSTS: dict[str, dict[str, str]] = {
    "sampling run": {
        "eager": STOCK + f"result = sample_stock(stock, condition, noise, **{RUN})",
        "compile": STOCK + f"result = sample_stock(torch.compile(stock), condition, noise, **{RUN})",
        "ours": f"result = sample(model, condition, noise=noise, **{RUN})",
    },
    "call": {
        "eager": STOCK + "result = stock(noise, time, condition)",
        "compile": STOCK + "result = torch.compile(stock)(noise, time, condition)",
        "ours": "result = model(noise, time, condition)",
        "ours, compile": "result = torch.compile(model)(noise, time, condition)",
    },
    "training step": {
        "eager": STOCK + "network = stock" + TRAIN,
        "compile": STOCK + "network = torch.compile(stock)" + TRAIN,
        "ours": "network = model" + TRAIN,
        "ours, compile": "network = torch.compile(model)" + TRAIN,
    },
}


def in_process(code: str) -> Callable[..., Tensor]:
    """The numbers that the code prints as JSON, computed by a new Python from a checkout's root.

    RuntimeError with the last line of what it said where it failed.
    """

    def run(*_: Any) -> Tensor:
        environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
        return torch.tensor(json.loads(done.stdout.splitlines()[-1]))

    return run


def judge(given: Values, baseline: Values, gold: Values) -> Verdict:
    if given["y"].shape != gold["y"].shape:
        return Verdict(f"y: shape {tuple(given['y'].shape)} instead of {tuple(gold['y'].shape)}", None, {})
    error = relative_l2(given["y"], gold["y"])
    return Verdict(None if error <= BOUND else f"y: relative L2 error {error:.3e} > {BOUND}", None, {"y": error})


def _work(first: str, case: Mapping[str, Any], codes: Mapping[str, str], gold: Callable[[], Tensor]) -> Work:
    no_compiler = machine.compiler() is None
    providers: dict[str, Any] = {
        name: Absent("no C++ compiler for torch.compile") if no_compiler and "compile" in name else in_process(code)
        for name, code in codes.items()
    }
    return Work(
        suite="compile_time",
        case={"first": first, **case, "dtype": "float32"},
        inputs=lambda: Inputs((), {}, torch.zeros(())),
        providers=providers,
        gold=lambda given: {"y": gold()},
        bytes_moved={},
        flops={},
        modes=("whole",),
        rotate=False,
        judge=judge,
    )


def import_work() -> Work:
    """Importing, in a new Python; torch alone is the baseline, which nobody can do without."""
    codes = {name: f"{code}\nprint([1.0])" for name, code in IMPORTS.items()}
    return _work("import", {}, codes, lambda: torch.ones(1, dtype=torch.float64))


def exact(first: str, preset: str) -> Tensor:
    """What stock's modules give in fp64, from the same seeds."""
    from benchmarks.model_block import Doubled

    names: dict[str, Any] = {}
    exec(PREAMBLE.format(preset=preset) + STOCK, names)  # the very lines that the processes run
    stock = names["stock"].double()
    condition, noise, time = (names[name].double() for name in ("condition", "noise", "time"))
    with Doubled(), torch.no_grad():
        if first == "sampling run":
            return names["sample_stock"](stock, condition, noise, num_steps=2, guidance_scale=3.0).flatten()
        y = stock(noise, time, condition)
        return y.pow(2).mean().reshape(1) if first == "training step" else y.flatten()


def work(first: str, preset: str) -> Work:
    """first: a key of `FIRSTS`; preset: of the network, small, because what is asked for is the time before it runs."""
    codes = {name: PREAMBLE.format(preset=preset) + code + ANSWER for name, code in FIRSTS[first].items()}
    return _work(first, {"preset": preset}, codes, lambda: exact(first, preset))


pytestmark = [pytest.mark.full, pytest.mark.benchmark(min_rounds=3, min_time=0)]


def bench_import(compare: Callable[[Work], None]) -> None:
    compare(import_work())


@pytest.mark.parametrize("first", list(FIRSTS))
def bench_compile_time(compare: Callable[[Work], None], first: str) -> None:
    compare(work(first, "small"))
