"""What a smaller storage of the weights costs in sampled quality, beside its speed: a trained model, held-out pictures.

Every storage samples the same pictures from the same noise. "forward" and "samples" are relative L2 distances to what
fp32 gives; the rest are the scores of `blip3o-fast evaluate`.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import machine
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.evaluation.evaluate import judge
from blip3o_fast.evaluation.samples import generate, load_model
from blip3o_fast.evaluation.settings import SampleSettings
from blip3o_fast.ops.packed_linear import STORAGE
from blip3o_fast.sampling import prepare
from blip3o_fast.testing import relative_l2

SCORES = ("recall_at_1", "token_cosine", "centred_cosine", "frechet_distance")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage_quality", description=__doc__)
    parser.add_argument("--model", required=True, help="a run's folder, as `make demo` leaves one in runs/demo/model")
    parser.add_argument("--embeddings_path", required=True, type=Path, help="the embeddings that it was trained on")
    parser.add_argument("--eval_split", type=float, default=0.1, help="as in training (0.1)")
    parser.add_argument("--rounds", type=int, default=3, help="of sampling with each storage, in turns (3)")
    options = parser.parse_args(arguments)
    train, held_out = EmbeddingDataset.splits(options.embeddings_path, eval_split=options.eval_split)
    if held_out is None or len(held_out) < 2:
        parser.error(f"argument --eval_split: {options.eval_split} leaves fewer than 2 of {len(train)} pictures")
    if options.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {options.rounds}")
    model = load_model(options.model, torch.device("cpu"))
    settings = SampleSettings(options.model, options.embeddings_path, eval_split=options.eval_split)
    run = settings.run()

    x = torch.randn(len(held_out), model.config.num_tokens, model.config.in_channels)
    condition = held_out.conditions if model.normalizer is None else model.normalizer.condition(held_out.conditions)
    forwards = {s: prepare(model, storage=s)(x, torch.tensor(500.0), condition) for s in STORAGE}
    generated, seconds = {}, {s: [] for s in STORAGE}
    for _ in range(options.rounds):
        for storage in STORAGE:
            start = time.perf_counter()
            generated[storage] = generate(model, held_out, replace(settings, storage=storage), progress=False)
            seconds[storage].append((time.perf_counter() - start) / len(held_out))

    stamp = machine.stamp()
    print(f"{stamp['cpu']['model']}, {stamp['threads']} threads, {stamp['isa']}, commit {stamp['commit']}")
    print(f"{len(held_out)} held-out pictures, {run['num_steps']} steps, guidance {run['guidance_scale']:g}")
    print(f"{'':8}{'ms/picture':>12}{'forward':>10}{'samples':>10}" + "".join(f"{name:>18}" for name in SCORES))
    for storage in STORAGE:
        scores = judge({"": generated[storage]}, held_out.targets, train.targets)
        milliseconds = sorted(seconds[storage])[len(seconds[storage]) // 2] * 1e3
        distances = [relative_l2(made[storage], made["fp32"]) for made in (forwards, generated)]
        print(f"{storage:8}{milliseconds:>12.2f}{distances[0]:>10.1e}{distances[1]:>10.1e}", end="")
        print("".join(f"{scores[name]:>18.4f}" for name in SCORES))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
