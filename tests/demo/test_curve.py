"""The committed loss curve, which the demo's report draws behind the user's."""

import json

from blip3o_fast.demo.run import REFERENCE_CURVE
from blip3o_fast.training.checkpoints import read_metrics


def test_the_curve_is_there_and_shows_a_run_that_worked():
    lines = REFERENCE_CURVE.read_text().splitlines()
    entries = read_metrics(REFERENCE_CURVE)
    assert len(entries) == len(lines), "every line is one JSON object"
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [entry for entry in entries if "eval_loss" in entry]
    assert [step for step, _ in losses] == sorted(step for step, _ in losses)
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert held_out[-1]["eval_loss_over_linear"] < 1
    assert json.loads(lines[-1])["step"] == 500
