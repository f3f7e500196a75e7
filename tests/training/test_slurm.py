"""examples/slurm/train.sbatch: its syntax, and its body on two local processes under a stub of srun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip3o_fast.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
# srun starts its command on each node (here: one) and passes signals on, as a process that has become the command does.
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> "$SCONTROL_LOG"\n[ "$1" = show ] && echo localhost\nexit 0\n'


def test_the_script_is_bash_and_asks_for_what_it_relies_on():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    for line in (
        "#SBATCH --requeue",
        "#SBATCH --signal=B:TERM@",
        "--ntasks-per-node=1",
        "--resume_from_checkpoint auto",
    ):
        assert line in text


@pytest.mark.slow
def test_a_job_that_is_stopped_goes_back_into_the_queue_and_ends_the_next_time(embeddings, tmp_path):
    programs, log, output = tmp_path / "bin", tmp_path / "scontrol.log", tmp_path / "run"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path, "SCONTROL_LOG": str(log), "SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "GPUS_PER_NODE": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    flags = {
        "embeddings_path": embeddings, "output_dir": output, "model_dim": 16, "num_layers": 1, "num_heads": 2,
        "multiple_of": 8, "batch_size": 2, "max_steps": 400, "learning_rate": 1e-4, "logging_steps": 10,
        "eval_steps": 400, "save_steps": 1000, "eval_generation_samples": 0, "device": "cpu",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]

    def submit():
        return subprocess.Popen(
            ["bash", SCRIPT, *words, "--no_wandb"], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    job, deadline = submit(), time.monotonic() + 200
    while not (output / checkpoints.METRICS_FILE).exists():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)  # to the batch shell alone, as --signal=B:TERM does
    printed, _ = job.communicate(timeout=200)
    assert job.returncode == 0, printed
    assert "requeue 77" in log.read_text() and "back into the queue" in printed
    last = checkpoints.last_whole(output)
    assert last is not None and 0 < checkpoints.step_of(last) < 400
    log.unlink()
    job = submit()
    printed, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and f"resuming    {last}" in printed, printed
    assert checkpoints.read_run(output)["status"] == "finished" and "requeue" not in log.read_text()
