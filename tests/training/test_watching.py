"""A step between two logs reads nothing from the device; what the log says in words; the profiled steps."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from blip3o_fast.training import checkpoints
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.callbacks import Progress
from blip3o_fast.training.linear_line import LinearLine
from blip3o_fast.training.profiling import ProfileSteps, longest

# What makes the host wait for a device.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
TRAINING = ("blip3o_fast/training", "transformers/", "accelerate/")


@pytest.fixture
def reads(monkeypatch):
    """(method, file) of every read by the training's code, while ``reads.watching``."""
    found = SimpleNamespace(watching=False, calls=[])

    def watched_read(name, original):
        def read(*args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if found.watching and any(part in caller for part in TRAINING):
                found.calls.append((name, caller))
            return original(*args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched_read(name, getattr(torch.Tensor, name)))
    return found


def watched(trainer, reads):
    """Watch everything but what comes with a log, an evaluation or a checkpoint."""
    original = trainer._maybe_log_save_evaluate
    pauses = []

    def maybe(*args, **kwargs):
        control = trainer.control
        pause = control.should_log or control.should_evaluate or control.should_save
        reads.watching = not pause
        pauses.append(pause)
        original(*args, **kwargs)
        reads.watching = trainer.state.global_step < trainer.state.max_steps  # the summary at the end is a log too

    trainer._maybe_log_save_evaluate = maybe
    return pauses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_between_two_logs_nothing_waits_for_the_device(tmp_path, make_trainer, reads, accumulate):
    changes = {"logging_steps": 4, "eval_steps": 8, "save_steps": 8, "gradient_accumulation_steps": accumulate}
    trainer = make_trainer(tmp_path / "run", **changes)
    trainer.watch.reads_are_free = False  # as on a GPU
    pauses = watched(trainer, reads)
    trainer.train()
    assert reads.calls == []
    assert [pauses.count(True), pauses.count(False)] == [3, 6]  # steps 1, 4 and 8; the end of the epoch asks again


def test_a_read_between_two_logs_would_be_seen(tmp_path, make_trainer, reads, monkeypatch):
    trainer = make_trainer(tmp_path / "run", logging_steps=4)
    watched(trainer, reads)  # reads_are_free: a CPU looks at every loss
    trainer.train()
    assert len(reads.calls) >= 4 and all("finite.py" in file for _, file in reads.calls)


def test_a_pinned_batch_goes_to_the_device_without_waiting(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path / "run")
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: copies.append((args, options)) or self)
    batch = {"target": torch.ones(2), "sample_index": 3}
    for pinned in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, pinned=pinned: pinned)
        assert trainer._prepare_inputs(batch)["sample_index"] == 3
    assert copies[0] == ((trainer.args.device,), {"non_blocking": True})
    assert not copies[1][1].get("non_blocking")


def test_a_log_has_all_that_is_watched(tmp_path, make_trainer):
    from blip3o_fast.training.clock import StepCost

    trainer = make_trainer(tmp_path / "run", regularization_weight=0.01)
    trainer.cost = StepCost(tokens=16, flops=1000, peak=1e9)
    trainer.train()
    last = [entry for entry in checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in entry][-1]
    wanted = {
        "step", "epoch", "loss", "mse", "regularization", "loss_over_linear", "cosine_similarity", "l2_distance",
        "pred_norm", "target_norm", "grad_norm", "learning_rate", "snr_db", "samples", "samples_per_second",
        "tokens_per_second", "mfu", "memory_gb", "data_wait", "step_seconds", "step_seconds_max", "slowest_rank",
        "slowest_rank_seconds", "seconds",
    }  # fmt: skip
    assert wanted <= set(last)
    assert last["tokens_per_second"] == pytest.approx(16 * last["samples_per_second"], rel=1e-3)
    assert last["mfu"] == pytest.approx(1000 * last["samples_per_second"] / 1e9, rel=1e-2)
    assert 0 <= last["data_wait"] <= 1 and last["step_seconds"] <= last["step_seconds_max"]


# ---- the linear line -------------------------------------------------------------------------------------------------


def told(capsys, ratios, evaluates=True, warmup=10):
    """What LinearLine says of logs at the steps 5, 15, 25, ..."""
    line = LinearLine(evaluates)
    args = SimpleNamespace(get_warmup_steps=lambda steps: warmup)
    for k, ratio in enumerate(ratios):
        key = "eval_loss_over_linear" if evaluates else "loss_over_linear"
        line.on_log(args, SimpleNamespace(global_step=5 + 10 * k, max_steps=100), None, logs={key: ratio})
        line.on_log(args, SimpleNamespace(global_step=5 + 10 * k, max_steps=100), None, logs={"loss": 1.0})
    return capsys.readouterr().out


def test_a_run_above_the_linear_line_says_so_once_after_the_warmup(capsys):
    said = told(capsys, [3.0, 1.25, 1.2, 1.1])
    assert said.count("note:") == 1
    assert "at step 15, after the warm-up, the held-out loss is 1.25 times that of the best linear" in said
    assert "the training loss is 1.00 times" in told(capsys, [3.0, 1.0], evaluates=False)


def test_a_run_below_the_linear_line_says_nothing(capsys):
    assert told(capsys, [3.0, 0.97, 1.2]) == ""
    assert told(capsys, [3.0]) == ""  # still warming up
    assert "nan times" in told(capsys, [3.0, float("nan")])


# ---- the progress ----------------------------------------------------------------------------------------------------


def test_the_line_of_a_log_says_how_fast_and_what_it_waits_for(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=20)
    progress.on_train_begin(None, state, None)
    state.global_step = 10
    log = {"loss": 0.5, "learning_rate": 1e-3, "samples_per_second": 104.2, "mfu": 0.413, "data_wait": 0.3}
    progress.on_log(None, state, None, logs=log)
    assert "104 samples/s | MFU 41% | 30% of it waiting for data | left" in capsys.readouterr().out
    progress.on_log(None, state, None, logs=log | {"data_wait": 0.01})
    assert "waiting" not in capsys.readouterr().out
    evaluation = {"eval_loss": 0.7, "eval_recall_at_1": 0.5, "eval_recall_at_1_chance": 0.1}
    progress.on_log(None, state, None, logs=evaluation | {"eval_recall_at_1_ridge": 0.94})
    assert "recall@1 0.50 (chance 0.10, ridge 0.94)" in capsys.readouterr().out


# ---- --profile_steps -------------------------------------------------------------------------------------------------


def test_the_profiled_steps_leave_a_trace_and_a_table(tmp_path, make_trainer, capsys):
    trainer = make_trainer(tmp_path / "run", max_steps=6)
    forwards = []
    original = trainer.loss_function

    def counted(*args, **kwargs):
        forwards.append(trainer.state.global_step + 1)
        with torch.profiler.record_function("a forward pass"):
            return original(*args, **kwargs)

    trainer.loss_function = counted
    trainer.add_callback(ProfileSteps(3, 4, tmp_path / "run"))
    trainer.train()
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps_3-4.json", "steps_3-4.txt"]
    events = json.loads((folder / "steps_3-4.json").read_text())["traceEvents"]
    assert forwards == [1, 2, 3, 4, 5, 6]
    assert sum(event.get("name") == "a forward pass" for event in events if event.get("cat") == "user_annotation") == 2
    table = (folder / "steps_3-4.txt").read_text()
    assert len(table.strip().splitlines()) == 11 and "%" in table
    printed = capsys.readouterr().out
    assert table in printed and "trace: " in printed


def test_a_run_that_stops_among_the_profiled_steps_keeps_what_it_has(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path / "run", max_steps=3)
    trainer.add_callback(ProfileSteps(2, 9, tmp_path / "run"))
    trainer.train()
    assert (tmp_path / "run" / "profile" / "steps_2-9.json").is_file()


def event(key, where, own, calls=1):
    return SimpleNamespace(
        key=key, count=calls, device_type=SimpleNamespace(name=where),
        self_cpu_time_total=own, self_device_time_total=own,
    )  # fmt: skip


def test_the_table_has_the_longest_kernels_where_there_is_a_gpu():
    host = [event(f"aten::op_{k}", "CPU", 1000.0 * k) for k in range(14)]
    lines = longest(host).splitlines()
    assert "operations" in lines[0] and len(lines) == 11
    assert [line.split()[0] for line in lines[1:3]] == ["aten::op_13", "aten::op_12"]
    assert lines[1].split()[1:] == ["1", "13.00", "14.3%"]  # of 91 ms
    lines = longest([*host, event("gemm" * 30, "CUDA", 3000.0, calls=7), event("norm", "CUDA", 1000.0)]).splitlines()
    assert "kernels" in lines[0] and len(lines) == 3
    assert lines[1].split()[1:] == ["7", "3.00", "75.0%"] and "..." in lines[1]


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile_steps": "10"}, r"--profile_steps must be first:last .*, got '10'"),
        ({"profile_steps": 10}, r"--profile_steps must be first:last .*, got 10"),
        ({"report_to": ["wandb"]}, r"--report_to must be none, .*, got \['wandb'\]"),
        ({"profile_steps": "5:4"}, r"--profile_steps must be"),
        ({"profile_steps": "0:4"}, r"--profile_steps must be"),
        ({"report_to": "mlflow"}, r"--report_to must be none, wandb, tensorboard or wandb,tensorboard, got 'mlflow'"),
        ({"report_to": "none,wandb"}, r"--report_to must be"),
        ({"report_to": "wandb", "no_wandb": True}, r"--no_wandb and --report_to wandb exclude each other"),
    ],
)
def test_bad_flags_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings("embeddings", "output", **changes).check()
