"""Two processes train what one process trains."""

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

from blip3o_fast.training import checkpoints
from blip3o_fast.training.clock import MEASURED


def launch(embeddings, output, processes, batch_size):
    flags = {
        "embeddings_path": embeddings, "output_dir": output, "model_dim": 16, "num_layers": 1, "num_heads": 2,
        "multiple_of": 8, "batch_size": batch_size, "max_steps": 4, "learning_rate": 1e-4, "logging_steps": 1,
        "eval_steps": 4, "save_steps": 4, "eval_generation_samples": 4, "num_inference_steps": 2, "device": "cpu",
        "normalize": "standardize",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    runner = [sys.executable, "-m", "blip3o_fast"]
    if processes > 1:
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        runner += ["-m", "blip3o_fast"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*runner, "train", "--no_wandb", *words], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_draw_log_and_end_like_one(embeddings, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    launch(embeddings, alone, 1, batch_size=4)
    printed = launch(embeddings, together, 2, batch_size=2)
    assert "4 = 2 x 1 accumulated x 2 processes" in printed
    assert printed.count("trained model:") == 1  # only the main process speaks
    entries = [checkpoints.read_metrics(folder / "metrics.jsonl") for folder in (alone, together)]
    assert [entry["step"] for entry in entries[1]] == [entry["step"] for entry in entries[0]]
    for one, two in zip(*entries, strict=True):
        # snr_db is a logarithm of a mean over the batch, so it is not the mean of its parts.
        for name in set(one) - MEASURED - {"snr_db"}:
            assert abs(one[name] - two[name]) <= 1e-5 * abs(one[name]) + 1e-7, name
    for entry in (entry for entry in entries[1] if "loss" in entry):
        assert entry["slowest_rank"] in (0, 1) and 0 < entry["step_seconds"] <= entry["step_seconds_max"]
    first, second = (load_file(folder / "model.safetensors") for folder in (alone, together))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-5
    assert json.loads((together / "run.json").read_text())["status"] == "finished"
    assert not torch.distributed.is_initialized()


STOP = """
import sys, torch
from blip3o_fast.training.callbacks import StopRequest
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
stop, seen = StopRequest(), []
for step in range(3):
    stop.requested = stop.requested or (rank == 1 and step == 1)  # a signal that only one rank gets
    seen.append(stop.agreed(torch.device("cpu")))
assert seen == [False, True, True] and stop.requested, seen
torch.distributed.destroy_process_group()
"""


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    command = [sys.executable, "-c", STOP, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
