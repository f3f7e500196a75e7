"""Several processes train what one process trains: by torchrun, accelerate and Slurm, and after a rank was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_fast.training import checkpoints
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.clock import MEASURED
from blip3o_fast.training.resume import resume_point

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STEPS = 12
# What may differ between runs: times, and a logarithm of a mean over the batch, which is no mean of its parts.
NOT_COMPARED = MEASURED | {"snr_db"}


def flags(embeddings, output, batch_size, **changes):
    given = {
        "embeddings_path": embeddings, "output_dir": output, "model_dim": 16, "num_layers": 1, "num_heads": 2,
        "multiple_of": 8, "batch_size": batch_size, "max_steps": STEPS, "learning_rate": 1e-4, "logging_steps": 1,
        "eval_steps": 100, "save_steps": 100, "eval_generation_samples": 4, "num_inference_steps": 2, "device": "cpu",
        "normalize": "standardize",
    } | changes  # fmt: skip
    return ["train", "--no_wandb", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def torchrun(processes, *more):
    return [BIN / "torchrun", "--standalone", *more, "--nproc_per_node", str(processes), "-m", "blip3o_fast"]


def environment(**more):
    # One directory of the path first: this checkout's package, and this environment's programs.
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | more


def run(runner, words, **more):
    command = [str(word) for word in (*runner, *words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def assert_same_run(one, other):
    """The same logs to 1e-5, and the same weights."""
    first, second = (checkpoints.read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second]
    for a, b in zip(first, second, strict=True):
        for name in set(a) - NOT_COMPARED:
            assert abs(a[name] - b[name]) <= 1e-5 * abs(a[name]) + 1e-7, (a["step"], name, a[name], b[name])
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) <= 1e-5
    assert json.loads((other / "run.json").read_text())["status"] == "finished"


@pytest.fixture(scope="module")
def alone(embeddings, tmp_path_factory):
    """One process with the whole batch of 4."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run([sys.executable, "-m", "blip3o_fast"], flags(embeddings, folder, 4))
    return folder


def test_torchrun_trains_like_one_process(embeddings, alone, tmp_path):
    printed = run(torchrun(2), flags(embeddings, tmp_path / "run", 2))
    assert "4 = 2 x 1 accumulated x 2 processes" in printed
    assert printed.count("trained model:") == 1  # only the main process speaks
    assert_same_run(alone, tmp_path / "run")
    for entry in (entry for entry in checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in entry):
        assert entry["slowest_rank"] in (0, 1) and 0 < entry["step_seconds"] <= entry["step_seconds_max"]


@pytest.mark.parametrize(("accumulate", "static"), [(1, True), (2, False)])
def test_what_ddp_is_told(make_trainer, tmp_path, accumulate, static):
    handler = make_trainer(tmp_path, gradient_accumulation_steps=accumulate).accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and not handler.find_unused_parameters
    assert handler.static_graph is static


@pytest.mark.slow
def test_fifty_steps_of_two_and_of_four_processes(embeddings, tmp_path):
    run([sys.executable, "-m", "blip3o_fast"], flags(embeddings, tmp_path / "1", 4, max_steps=50))
    for processes, batch_size, accumulate in ((2, 2, 1), (4, 1, 1), (2, 1, 2)):
        folder = tmp_path / f"{processes} x {accumulate}"
        accumulated = {"gradient_accumulation_steps": accumulate, "max_steps": 50}
        run(torchrun(processes), flags(embeddings, folder, batch_size, **accumulated))
        assert_same_run(tmp_path / "1", folder)


@pytest.mark.slow
def test_accelerate_launch_trains_like_one_process(embeddings, alone, tmp_path):
    # The line for GPUs: on a CPU, accelerate starts several processes by mpirun only.
    runner = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    runner += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "blip3o_fast"]
    run(runner, flags(embeddings, tmp_path / "run", 2))
    assert_same_run(alone, tmp_path / "run")


# ---- a rank is killed ------------------------------------------------------------------------------------------------


def test_a_process_that_torchrun_started_again_continues_by_itself(monkeypatch, tmp_path, capsys):
    settings = TrainSettings("unused", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    checkpoints.write_json(tmp_path / checkpoints.RUN_FILE, {"status": "running"})
    assert resume_point(settings) is None  # killed before the first checkpoint: from the beginning
    for step in (3, 6, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "trainer_state.json"):
            (folder / name).write_text("made up")
        if step < 9:
            checkpoints.mark_complete(folder, step)
    assert resume_point(settings) == tmp_path / "checkpoint-6"
    assert "restart 1 by torchrun: continuing from the newest whole checkpoint" in capsys.readouterr().out
    settings.resume_from_checkpoint = str(tmp_path / "checkpoint-3")  # where its first life began
    assert resume_point(settings) == tmp_path / "checkpoint-6"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    assert resume_point(settings) == tmp_path / "checkpoint-3"  # as the flag says
    with pytest.raises(ValueError, match="already holds a run"):  # refused in its first life, and still
        resume_point(TrainSettings("unused", tmp_path))
    checkpoints.write_json(tmp_path / checkpoints.RUN_FILE, {"status": "running", "job": "another job"})
    assert resume_point(TrainSettings("unused", tmp_path)) == tmp_path / "checkpoint-6"
    for first_life in ("0", ""):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", first_life)
        assert resume_point(settings) == tmp_path / "checkpoint-3"
        with pytest.raises(ValueError, match="already holds a run"):
            resume_point(TrainSettings("unused", tmp_path))


def worker(launcher, rank):
    """The pid of one rank of a launcher, once it is there."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "status").read_text()
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{launcher}\n" in status and f"RANK={rank}".encode() in variables:
            return int(path.name)
    return None


@pytest.mark.slow
def test_torchrun_with_max_restarts_survives_sigkill(embeddings, tmp_path):
    """The documented line; the rank is killed from outside, at whatever step it is."""
    changes = {"max_steps": 80, "save_steps": 5}
    run([sys.executable, "-m", "blip3o_fast"], flags(embeddings, tmp_path / "1", 4, **changes))
    output = tmp_path / "run"
    command = torchrun(2, "--max-restarts", "2") + flags(embeddings, output, 2, **changes)
    job = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(), cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (output / "checkpoint-5" / checkpoints.MARKER).exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.kill(worker(job.pid, 1), signal.SIGKILL)
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed[-3000:]
    assert "restart 1 by torchrun" in printed
    assert_same_run(tmp_path / "1", output)


# ---- leaving ---------------------------------------------------------------------------------------------------------

FAILING = """
import sys, torch.distributed as dist
from blip3o_fast.training import run
from blip3o_fast.training.arguments import TrainSettings

def fails(*args):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=0, world_size=1)
    raise ValueError("in the middle of a run")

run._run = fails
try:
    run.train(TrainSettings(sys.argv[1], sys.argv[2], model_dim=16, num_layers=1, num_heads=2, device="cpu"))
except ValueError as error:
    assert "in the middle" in str(error) and not dist.is_initialized(), dist.is_initialized()
else:
    raise AssertionError("no error")
"""


def test_an_error_leaves_no_process_group_behind(embeddings, tmp_path):
    run([sys.executable, "-c", FAILING], [embeddings, tmp_path / "run", tmp_path / "store"])


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
    assert not torch.distributed.is_initialized()
