"""A whole forward on a CPU, batch 1: seconds and peak memory, per way of storing the weights.

Each way runs in a process of its own, since a peak cannot be taken back. The weights are random; their values decide
neither time nor memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import machine
from blip3o_fast import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.sampling import prepare

# name -> (dtype of the model, storage of the packed weights or None for the eager model)
WAYS = {
    "eager fp32": (torch.float32, None),
    "eager bf16": (torch.bfloat16, None),
    "prepared fp32": (torch.float32, "fp32"),
    "prepared bf16": (torch.bfloat16, "bf16"),
    "prepared int8": (torch.float32, "int8"),
    "prepared int8, bf16 model": (torch.bfloat16, "int8"),
}


def make(config: BLIP3oConfig, dtype: torch.dtype) -> BLIP3oDiT:
    with torch.device("meta"):
        model = BLIP3oDiT(config).to(dtype)
    model.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():
        bound = parameter.shape[-1] ** -0.5
        parameter.uniform_(-bound, bound)
    return model


def measure(way: str, config: BLIP3oConfig, repeats: int) -> dict[str, Any]:
    dtype, storage = WAYS[way]
    model = make(config, dtype)
    x = torch.randn(1, config.num_tokens, config.in_channels).to(dtype)
    context = torch.randn(1, 64, config.cross_attention_dim).to(dtype)
    timestep = torch.tensor([500.0])
    prepared = None if storage is None else prepare(model, storage=storage)
    run: Callable[[], Any] = lambda: (  # noqa: E731
        eager_forward(model, x, timestep, context) if prepared is None else prepared(x, timestep, context)
    )
    seconds = []
    with torch.no_grad():
        run()
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return {
        "way": way,
        "seconds": statistics.median(seconds),
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "packed_bytes": 0 if prepared is None else prepared.nbytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_memory", description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of the network (24)")
    parser.add_argument("--repeats", type=int, default=5, help="timed forwards each (5)")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process, print it as JSON")
    options = parser.parse_args(arguments)
    config = BLIP3oConfig(num_layers=options.layers)
    if options.way is not None:
        print(json.dumps(measure(options.way, config, options.repeats)))
        return 0
    stamp = machine.stamp()
    print(f"{stamp['cpu']['model']}, {stamp['threads']} threads, {stamp['isa']}, commit {stamp['commit']}")
    print(f"{'':28}{'seconds':>10}{'weights':>12}{'packed':>12}{'peak RSS':>12}")
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.model_memory", "--way", way]
        command += ["--layers", str(options.layers), "--repeats", str(options.repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{way:28}  failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
            continue
        row = json.loads(done.stdout)
        sizes = "".join(f"{row[key] / 1e6:>9.0f} MB" for key in ("weights_bytes", "packed_bytes", "peak_bytes"))
        print(f"{way:28}{row['seconds']:>10.3f}{sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
