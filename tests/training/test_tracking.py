"""wandb goes on in the run that a checkpoint names; TensorBoard's file has what was logged."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from blip3o_fast.training import checkpoints, tracking
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.tracking import WandbRun, run_id_of, trackers


@pytest.fixture
def settings(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login
    (tmp_path / "run").mkdir()

    def make(**changes):
        return TrainSettings("embeddings", tmp_path / "run", **changes)

    return make


@pytest.fixture
def stub(monkeypatch):
    """A module in wandb's place that notes what it is told."""
    wandb = ModuleType("wandb")
    wandb.told = SimpleNamespace(init=[], logs=[], finished=0)
    wandb.run, wandb.config, wandb.summary = None, SimpleNamespace(update=lambda *a, **k: None), {}
    config = type("Config", (dict,), {"update": lambda self, *a, **k: None})
    wandb.config = config()

    def init(**given):
        wandb.told.init.append(given)
        wandb.run = SimpleNamespace(id=given["id"], summary={}, _label=lambda **k: None)
        return wandb.run

    def finish():
        wandb.told.finished += 1
        wandb.run = None

    wandb.init, wandb.finish, wandb.log = init, finish, wandb.told.logs.append
    util = ModuleType("wandb.sdk.lib.config_util")
    util.ConfigError = type("ConfigError", (Exception,), {})
    for name, module in (
        ("wandb", wandb), ("wandb.sdk", ModuleType("wandb.sdk")), ("wandb.sdk.lib", ModuleType("wandb.sdk.lib")),
        ("wandb.sdk.lib.config_util", util),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    return wandb.told


def test_the_run_is_in_the_checkpoint_and_is_continued(settings, stub, make_trainer, stand_in, tmp_path):
    given = settings(wandb_project="there", wandb_run_name="first")
    first = make_trainer(tmp_path / "run", max_steps=4)
    first.add_callback(tracking._wandb(given, None))
    first.train()
    assert len(stub.init) == 1 and stub.finished == 1
    told = stub.init[0]
    assert (told["project"], told["name"], told["dir"]) == ("there", "first", str(tmp_path / "run"))
    assert told["resume"] == "allow" and told["config"]["learning_rate"] == given.learning_rate
    checkpoint = checkpoints.last_whole(tmp_path / "run")
    assert run_id_of(checkpoint) == told["id"] and len(told["id"]) == 8
    logged = [log["train/loss"] for log in stub.logs if "train/loss" in log]
    entries = checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert logged == [entry["loss"] for entry in entries if "loss" in entry]
    assert any("eval/loss" in log and log["train/global_step"] == 4 for log in stub.logs)

    second = make_trainer(tmp_path / "run", model=stand_in(seed=9), max_steps=8)
    second.add_callback(tracking._wandb(given, checkpoint))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert stub.init[1]["id"] == told["id"]
    assert run_id_of(checkpoints.last_whole(tmp_path / "run")) == told["id"]


def test_a_run_that_began_without_wandb_gets_one_when_it_is_continued(settings, stub, make_trainer, tmp_path):
    make_trainer(tmp_path / "run", max_steps=4).train()
    checkpoint = checkpoints.last_whole(tmp_path / "run")
    assert run_id_of(checkpoint) is None and run_id_of(tmp_path) is None
    second = make_trainer(tmp_path / "run", max_steps=8)
    second.add_callback(tracking._wandb(settings(), checkpoint))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert run_id_of(checkpoints.last_whole(tmp_path / "run")) == stub.init[0]["id"]


def test_which_trackers_run(settings, stub, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    made, reason = trackers(settings(), None)
    assert made == [] and "no login" in reason
    assert trackers(settings(no_wandb=True), None) == ([], "")
    assert trackers(settings(report_to="none"), None) == ([], "")
    with pytest.raises(ValueError, match="--report_to wandb: wandb is off: no login"):
        trackers(settings(report_to="wandb"), None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    monkeypatch.setenv("WANDB_DIR", "/there")
    (made,), reason = trackers(settings(), None)
    assert isinstance(made, WandbRun) and reason == ""
    assert (made.init["project"], made.init["dir"], made.init["name"]) == ("elsewhere", "/there", "run")
    assert trackers(settings(no_wandb=True), None)[0] == []
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--report_to tensorboard: not installed; pip install .*\[tensorboard\]"):
        trackers(settings(report_to="tensorboard"), None)


# ---- with the libraries themselves -----------------------------------------------------------------------------------


def test_tensorboards_file_has_what_was_logged(settings, make_trainer, stand_in, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra dev)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(steps, resume=None):
        trainer = make_trainer(tmp_path / "run", model=stand_in(), max_steps=steps)
        (tracker,), _ = trackers(settings(report_to="tensorboard"), resume)
        trainer.add_callback(tracker)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    train(6)  # a run that was cut off after its checkpoint of step 4
    train(8, resume=tmp_path / "run" / "checkpoint-4")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    entries = [entry for entry in checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in entry]
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == {entry["step"]: pytest.approx(entry["loss"]) for entry in entries}
    assert len(events.Scalars("train/loss")) == len(found), "what was trained again is there once"
    assert {"eval/loss", "train/grad_norm", "train/samples_per_second"} <= set(events.Tags()["scalars"])


def test_an_offline_run_of_wandb_has_what_was_logged(settings, make_trainer, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra dev)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = make_trainer(tmp_path / "run", max_steps=4)
    (tracker,), reason = trackers(settings(), None)
    assert reason == ""
    trainer.add_callback(tracker)
    trainer.train()
    wandb.teardown()  # as at the end of a process: `finish` does not wait for the file
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert tracker.run_id in written.name and run_id_of(tmp_path / "run" / "checkpoint-4") == tracker.run_id
    losses = [value for record in history(written.read_bytes()) for key, value in record if key == "train/loss"]
    entries = checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert losses == pytest.approx([entry["loss"] for entry in entries if "loss" in entry])


def history(content):
    """The logged (key, value) pairs of an offline run's file: a log of records in blocks of 32 KiB, as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, block, parts = 7, 1 << 15, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # no header fits into the rest of a block
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                yield [("/".join(i.nested_key) or i.key, json.loads(i.value_json)) for i in record.history.item]
    assert parts == b"", "the last record is cut off"
