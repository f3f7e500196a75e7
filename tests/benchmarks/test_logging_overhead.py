"""The benchmark of watching: its arithmetic, and a run of it that leaves the trainer as it was."""

import re

import pytest

from benchmarks import logging_overhead
from benchmarks.logging_overhead import Overhead
from blip3o_fast.training.trainer import BLIP3oTrainer


def test_the_share_counts_a_log_once_in_its_steps():
    found = Overhead(step=0.1, per_log=0.01, per_step=0.001)
    assert found.share(1) == pytest.approx(0.11)
    assert found.share(10) == pytest.approx(0.02)


def test_a_run_of_it_prints_all_shares(capsys):
    before = BLIP3oTrainer.log, BLIP3oTrainer.compute_loss, BLIP3oTrainer.__init__
    assert logging_overhead.main(["--preset", "tiny", "--batch_size", "4", "--steps", "5"]) == 0
    assert before == (BLIP3oTrainer.log, BLIP3oTrainer.compute_loss, BLIP3oTrainer.__init__)
    last = capsys.readouterr().out.splitlines()[-1]
    step, per_step, per_log, *shares = (float(word) for word in re.findall(r"[\d.]+(?= ms a| us| ms,|%)", last))
    assert 0 < per_step / 1e3 < step and 0 < per_log
    assert len(shares) == 3 and shares[0] > shares[1] > shares[2]
    with pytest.raises(SystemExit):
        logging_overhead.main(["--steps", "2"])
