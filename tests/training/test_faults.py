"""Runs that are killed, terminated or out of disk end with the weights of an undisturbed one (`faults.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def hurt(embeddings, folder, kills, seed, ranks=1):
    command = [sys.executable, str(ROOT / "tests" / "training" / "faults.py"), str(embeddings), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(kills), str(seed), str(ranks)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    with_counts = {name: value for name, value in report.items() if isinstance(value, int)}
    print(with_counts)
    assert report["unexpected"] == [] and report["differences"] == []
    assert report["kills"] == kills and report["samples_lost"] == 0
    return report


def test_killed_terminated_and_out_of_disk(embeddings, tmp_path):
    report = hurt(embeddings, tmp_path, kills=2, seed=1)
    assert report["kills_in_a_save"] >= 1 and report["runs"] == 3
    status, error = report["full_disk"]
    assert status == "failed" and error.startswith("CheckpointError: ")
    assert "checkpoint-6 could not be written" in error and "GB are free" in error
    assert "checkpoint-3 is whole: continue from it with --resume_from_checkpoint auto" in error
    assert report["full_disk_left"] == ["checkpoint-3"] and report["full_disk_whole"] == "checkpoint-3"
    assert report["sigterm"] == "interrupted" and report["interrupted_checkpoint"] == "checkpoint-5"
    assert report["link_is_gone"]


@pytest.mark.slow
def test_many_kills(embeddings, tmp_path):
    report = hurt(embeddings, tmp_path, kills=60, seed=2)
    assert report["kills_in_a_save"] >= 5 and report["runs"] >= 20


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(embeddings, tmp_path):
    """Weights, averages and optimizer states bit for bit: gloo adds two numbers in one order only."""
    report = hurt(embeddings, tmp_path, kills=10, seed=3, ranks=2)
    assert report["runs"] >= 5
    status, error = report["poisoned"]
    # The save between the bad steps is whole and good: it has the weights of step 4.
    assert status == "failed" and report["poisoned_whole"] == "checkpoint-6"
    assert "3 steps in a row: 5 (loss), 6 (loss), 7 (loss)" in error
    assert "rank 1, samples: picture_" in error and " of a batch of 2" in error and "rank 0" not in error
