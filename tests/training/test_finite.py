"""A step that is not finite changes nothing; three in a row stop the run, with the samples, the op and the gradient."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training import checkpoints
from blip3o_fast.training.diagnosis import diagnose
from blip3o_fast.training.finite import BadStep, FiniteWatch, NonFiniteError


def poison(trainer, what, steps):
    """From now on the loss, or only its gradient, is not finite in these steps."""
    original = trainer.loss_function

    def poisoned(model, data, condition, **kwargs):
        loss, metrics = original(model, data, condition, **kwargs)
        if trainer.state.global_step + 1 in steps:
            if what == "loss":
                loss = loss + float("nan")  # its own gradient would be finite
            else:
                # A finite loss with an infinite gradient: d sqrt(z) / dz at 0.
                loss = loss + (0 * next(model.parameters()).sum()).abs().sqrt()
        return loss, metrics

    trainer.loss_function = poisoned


def snapshot(trainer):
    """Weights and the optimizer's state, in order."""
    optimizer = trainer.optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in [*trainer.model.parameters(), *states]]


def snapshots_of_each_step(trainer):
    seen = {}
    original = trainer.ema.update

    def update(model):
        seen[trainer.state.global_step] = snapshot(trainer)
        original(model)

    trainer.ema.update = update
    return seen


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("reads_are_free", [True, False])
def test_a_bad_step_changes_nothing_and_is_named(tmp_path, make_trainer, capsys, what, reads_are_free):
    trainer = make_trainer(tmp_path, max_steps=8)
    trainer.watch.reads_are_free = reads_are_free  # False: the fused optimizer is told on the device
    poison(trainer, what, steps={3, 6})
    seen = snapshots_of_each_step(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer.defaults["fused"]
    for step in range(2, 9):
        assert same(seen[step], seen[step - 1]) == (step in (3, 6)), step
    assert all(bool(torch.isfinite(value).all()) for value in seen[8])
    name = "loss" if what == "loss" else "gradient norm"
    assert f"step 6: {name} is not finite; the step was left out" in capsys.readouterr().out
    entries = checkpoints.read_metrics(tmp_path / "metrics.jsonl")
    kind = f"skipped_for_{what}"
    skipped = [(e["skipped_step"], e[kind], e["skipped_steps"]) for e in entries if "skipped_step" in e]
    assert skipped == [(3, 1, 1), (6, 1, 2)]
    losses = {entry["step"]: entry for entry in entries if "loss" in entry}
    assert list(losses) == [1, 2, 4, 6, 8] and losses[8]["skipped_steps"] == 2
    # The window of steps 5 and 6, or 3 and 4, is averaged over its good step alone.
    for entry in losses.values():
        assert entry["loss"] == pytest.approx(entry["mse"], rel=1e-5) and 0.1 < entry["loss"] < 10
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_both_ways_to_leave_a_step_out_end_in_the_same_weights(tmp_path, make_trainer):
    ends = []
    for reads_are_free in (True, False):
        trainer = make_trainer(tmp_path / str(reads_are_free), max_steps=6)
        trainer.watch.reads_are_free = reads_are_free
        poison(trainer, "loss", steps={1, 4})  # the first: before the optimizer has any state
        trainer.train()
        ends.append(snapshot(trainer))
    assert same(*ends)


def test_a_window_without_a_good_step_has_no_loss(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=1)
    poison(trainer, "loss", steps={2, 3})
    trainer.train()
    entries = [e for e in checkpoints.read_metrics(tmp_path / "metrics.jsonl") if "learning_rate" in e]
    assert [(e["step"], "loss" in e, "mse" in e, "grad_norm" in e) for e in entries] == [
        (step, good, good, good) for step, good in ((1, True), (2, False), (3, False), (4, True))
    ]


def test_a_bad_micro_batch_takes_its_whole_step_along(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, batch_size=2, gradient_accumulation_steps=2, max_steps=4)
    original, calls = trainer.loss_function, []

    def poisoned(*args, **kwargs):
        loss, metrics = original(*args, **kwargs)
        calls.append(None)
        return (loss * float("inf") if len(calls) == 5 else loss), metrics

    trainer.loss_function = poisoned
    seen = snapshots_of_each_step(trainer)
    trainer.train()
    assert same(seen[2], seen[3]) and not same(seen[3], seen[4])
    assert trainer.watch.total == 1


@pytest.mark.parametrize("reads_are_free", [True, False])
def test_three_in_a_row_stop_the_run_with_a_diagnosis(tmp_path, make_trainer, reads_are_free):
    trainer = make_trainer(tmp_path, max_steps=12, logging_steps=12, save_steps=4, eval_steps=12)
    trainer.watch.reads_are_free = reads_are_free
    # Steps 5, 6, 7 have one bad picture each; the picture's name is found in the batch.
    names = trainer.keys = [f"key_{i}" for i in range(40)]
    bad = [int(trainer.order.pictures(4 * (step - 1), 4)[1]) for step in (5, 6, 7)]
    trainer.targets[bad] = float("nan")
    seen = snapshots_of_each_step(trainer)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    assert "3 steps in a row: 5 (loss), 6 (loss), 7 (loss); none of them was taken" in message
    assert "the last whole checkpoint is " + str(tmp_path / "checkpoint-4") in message
    assert f"samples: {names[bad[0]]} of a batch of 4" in message
    assert "data: target not finite" in message
    # On an accelerator the host finds out with the next save, and by then no step was taken after the limit.
    assert trainer.state.global_step == (7 if reads_are_free else 8)
    assert same(snapshot(trainer), seen[4])
    assert checkpoints.last_whole(tmp_path).name == "checkpoint-4"


def test_two_in_a_row_do_not_stop_it_and_the_row_survives_a_checkpoint(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, max_steps=8)
    poison(trainer, "gradient", steps={2, 3, 5, 6})
    trainer.train()
    assert trainer.watch.total == 4 and trainer.watch.row == []
    watch = FiniteWatch(3, reads_are_free=True, scaled=False)
    watch.load_state(checkpoints.read_state(tmp_path / "checkpoint-8"))
    assert watch.total == 4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    for step in (1, 2):
        watch.judge(torch.tensor(float("nan")), step, optimizer)
    assert watch.news() == [BadStep(1, "gradient norm"), BadStep(2, "gradient norm")]
    again = FiniteWatch(3, reads_are_free=True, scaled=False)
    again.load_state(watch.state())
    again.judge(torch.tensor(float("inf")), 3, optimizer)
    again.news()
    assert again.limit_reached and [bad.step for bad in again.row] == [1, 2, 3] and not watch.limit_reached


def test_the_limit_is_a_flag(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    trainer.watch = FiniteWatch(1, reads_are_free=True, scaled=False)
    poison(trainer, "loss", steps={2})
    with pytest.raises(NonFiniteError, match=r"1 steps in a row: 2 \(loss\).*there is no checkpoint yet"):
        trainer.train()
    with pytest.raises(ValueError, match="max_bad_steps must be a whole number >= 1, got 0"):
        FiniteWatch(0, reads_are_free=True, scaled=False)


def test_fp16s_search_for_a_scale_is_no_error_until_it_never_ends(tmp_path):
    watch = FiniteWatch(3, reads_are_free=False, scaled=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    infinite, loss = torch.tensor(float("inf")), torch.ones((), requires_grad=True)
    for step in range(20):
        watch.gated(loss)
        watch.judge(infinite, step, optimizer)
    with pytest.raises(NonFiniteError, match="not finite for 21 steps in a row.*--bf16"):
        watch.judge(infinite, 20, optimizer)
    watch.judge(torch.tensor(1.0), 21, optimizer)
    watch.judge(infinite, 22, optimizer)
    assert watch.news() == [] and watch.total == 0
    # No scale mends a loss that is not finite.
    for step in (23, 24, 25):
        watch.gated(loss * float("nan"))
        watch.judge(infinite, step, optimizer)
    assert watch.news() == [BadStep(step, "loss") for step in (23, 24, 25)] and watch.limit_reached


# ---- the diagnosis ---------------------------------------------------------------------------------------------------


def batch_of(pictures, tokens=16):
    return {
        "target": torch.randn(pictures, tokens, 6),
        "encoder_hidden_states": torch.randn(pictures, tokens, 12),
        "sample_index": 40,
    }


def lines_for(model, batch, loss_of=None):
    from blip3o_fast.flow.loss import FlowMatchingLoss

    loss = FlowMatchingLoss.from_config(model.config)

    def own(batch):
        data = batch["target"], batch["encoder_hidden_states"]
        return loss(model, *data, seed=1, sample_index=batch["sample_index"])[0]

    keys = [f"key_{i}" for i in range(len(batch["target"]))]
    return diagnose(model, loss_of or own, iter([(batch, keys)]))


@pytest.fixture
def network():
    sizes = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "multiple_of": 8}
    return BLIP3oDiT({"in_channels": 6, "cross_attention_dim": 12, "sample_size": 4, **sizes})


def test_the_op_and_the_weight_are_named(network):
    weight = network.layers[1].feed_forward.linear_2.weight
    with torch.no_grad():
        weight[3] = 3e38  # overflows
    samples, data, op, gradients = lines_for(network.train(), batch_of(3))
    assert samples == "samples: key_0, key_1, key_2 of a batch of 3" and data == "data: finite"
    assert op.startswith("op: first inf from ") and "layers.1.feed_forward.linear_2.weight (forward)" in op
    assert "; first NaN from " in op
    assert gradients.startswith("loss: nan; gradients: ")
    with torch.no_grad():
        weight[3] = float("nan")
    assert "weights: layers.1.feed_forward.linear_2.weight not finite before the step" in lines_for(
        network, batch_of(3)
    )
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_finite_step_gives_no_lines_and_bad_samples_are_told_apart(network):
    batch = batch_of(4)
    assert lines_for(network, batch) == []
    batch["encoder_hidden_states"][2, 5, 7] = float("inf")
    samples, data, *_ = lines_for(network, batch)
    assert samples == "samples: key_2 of a batch of 4"
    assert data == "data: encoder_hidden_states not finite"


def test_a_gradient_alone_is_found_on_the_way_back(network):
    def loss_of(batch):
        return network.layers[0].norm1.linear.bias.sum().abs().sqrt() + network.layers[1].gate.sum()

    with torch.no_grad():
        network.layers[0].norm1.linear.bias.zero_()
    samples, data, op, gradients = lines_for(network, batch_of(2), loss_of)
    assert "(backward" in op
    assert "1 of " in gradients and gradients.endswith("the first on the way back layers.0.norm1.linear.bias")


# ---- several ranks ---------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch
from torch import nn
from blip3o_fast.training.finite import FiniteWatch
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
for free in (True, False):
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    watch, weights, told = FiniteWatch(2, reads_are_free=free, scaled=False), [], []
    for step in range(1, 7):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3)).square().mean()
        if rank == 1 and step in (2, 4, 5):
            loss = loss * float("nan") if step == 2 else loss + float("nan")
        watch.gated(loss).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        watch.judge(norm, step, optimizer)
        optimizer.step()
        weights.append(model.module.weight.detach().clone())
        if free:
            told += watch.news()
            if watch.limit_reached:
                break
    told += watch.news()
    assert watch.limit_reached and told == [(2, "loss"), (4, "loss"), (5, "loss")], told
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[-1]), "nothing is taken after the limit"
    other = weights[-1].clone()
    torch.distributed.broadcast(other, 0)
    assert torch.equal(other, weights[-1])
torch.distributed.destroy_process_group()
"""


def test_all_ranks_leave_a_step_out_together(tmp_path):
    command = [sys.executable, "-c", RANKS, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def test_the_checkpoint_of_a_stopped_run_is_loadable(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    poison(trainer, "loss", steps={6, 7, 8})
    with pytest.raises(NonFiniteError, match="finite this time"):  # the poison knows the step, not the sample
        trainer.train()
    weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8 and checkpoints.last_whole(tmp_path).name == "checkpoint-8"


def test_a_row_goes_on_over_a_continuation(tmp_path, make_trainer):
    first = make_trainer(tmp_path, max_steps=4)
    poison(first, "gradient", steps={3, 4})
    first.train()
    again = make_trainer(tmp_path, max_steps=8)
    poison(again, "gradient", steps={5})
    with pytest.raises(NonFiniteError, match=r"3 steps in a row: 3 \(gradient norm\), 4 .*, 5 .*"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.watch.total == 3 and same(snapshot(again), snapshot(first))


def test_on_an_accelerator_nothing_waits_for_the_device_between_logs():
    from torch.utils._python_dispatch import TorchDispatchMode

    from blip3o_fast.training.sums import MetricSums

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += "_local_scalar_dense" in str(func)  # what bool(), float() and item() call
            return func(*args, **(kwargs or {}))

    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    watch, sums = FiniteWatch(3, reads_are_free=False, scaled=False), MetricSums()
    with Reads():
        for step in range(1, 6):
            optimizer.zero_grad()
            loss = weight.sum() * (float("nan") if step == 2 else 1.0)
            sums.add(loss, {"mse": loss})
            watch.gated(loss).backward()
            watch.judge(weight.grad.square().sum(), step, optimizer)
        assert Reads.count == 0
        assert watch.news() == [BadStep(2, "loss")]
        assert Reads.count > 0  # the counter counts
