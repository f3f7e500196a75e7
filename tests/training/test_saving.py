"""What a checkpoint knows beside its weights, the best one, and a save that fails."""

import json

import pytest
import torch
from safetensors.torch import load_file

from blip3o_fast.training import checkpoints, saving
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.run import train

SMALL = {
    "model_dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "batch_size": 4, "learning_rate": 1e-2,
    "max_steps": 6, "save_steps": 2, "logging_steps": 2, "eval_steps": 2, "eval_generation_samples": 0,
    "normalize": "standardize", "no_wandb": True, "device": "cpu", "progress": False,
}  # fmt: skip


def test_a_checkpoint_says_where_its_data_go_on_and_where_it_comes_from(embeddings, tmp_path):
    train(TrainSettings(embeddings, tmp_path / "run", **SMALL, seed=5))
    folder = tmp_path / "run" / "checkpoint-4"
    state = checkpoints.read_state(folder)
    assert (state["step"], state["next_sample"], state["seed"]) == (4, 16, 5)
    assert (state["skipped_steps"], state["skipped_in_a_row"], state["wandb_run_id"]) == (0, [], None)
    entries = checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [e["eval_loss"] for e in entries if "eval_loss" in e and e["step"] == 4] == [state["eval_loss"]]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["run"] == {name: run[name] for name in ("settings", "data", "versions")}
    assert state["run"]["data"]["checksum"] and state["run"]["settings"]["learning_rate"] == 1e-2
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "ema.safetensors", "rng_state.pth", "config.json",
            "normalizer.safetensors", "state.json", "complete.json"} <= names  # fmt: skip


def make_checkpoint(output, step, loss):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).write_bytes(b"x")
    checkpoints.write_json(folder / checkpoints.STATE_FILE, {"eval_loss": loss})
    checkpoints.mark_complete(folder, step)
    return folder


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    assert checkpoints.best_whole(tmp_path) is None
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.1), (4, None), (5, 0.4)):
        make_checkpoint(tmp_path, step, loss)
    assert checkpoints.best_whole(tmp_path).name == "checkpoint-2"  # the earlier of two
    checkpoints.rotate(tmp_path, 1, keep_best=True)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [2, 5]
    checkpoints.unmark(tmp_path / "checkpoint-2")  # cut off: not a candidate
    assert checkpoints.best_whole(tmp_path).name == "checkpoint-5"
    checkpoints.rotate(tmp_path, 1)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [5]


def test_the_trained_model_is_the_best_one_where_that_is_asked_for(embeddings, tmp_path, monkeypatch, capsys):
    from blip3o_fast.training.validation import Validation

    original, losses = Validation.run, iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(Validation, "run", lambda *args, **kwargs: original(*args, **kwargs) | {"loss": next(losses)})
    flags = SMALL | {"load_best_model_at_end": True, "save_total_limit": 1}
    result = train(TrainSettings(embeddings, tmp_path / "run", **flags))
    assert result["eval_loss"] == 0.1 and result["step"] == 6
    assert "best model: checkpoint-4, held-out loss 0.1000" in capsys.readouterr().out
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    trained = load_file(tmp_path / "run" / "model.safetensors")
    average = {step: load_file(tmp_path / "run" / f"checkpoint-{step}" / "ema.safetensors") for step in (4, 6)}
    assert all(torch.equal(trained[name], average[4][name]) for name in trained)
    assert not all(torch.equal(trained[name], average[6][name]) for name in trained)


def test_the_best_model_needs_an_evaluation_at_each_checkpoint():
    for changes in ({"eval_split": 0.0}, {"save_steps": 3}):
        with pytest.raises(ValueError, match="--load_best_model_at_end needs an evaluation at each checkpoint"):
            TrainSettings("e", "o", **SMALL | {"load_best_model_at_end": True} | changes).check()
    with pytest.raises(ValueError, match="--init_optimizer needs --init_from"):
        TrainSettings("e", "o", init_optimizer="optimizer.pt").check()


def test_only_what_is_about_writing_becomes_a_checkpoint_error(tmp_path):
    folder = tmp_path / "checkpoint-3"
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")):
        folder.mkdir()
        with (
            pytest.raises(saving.CheckpointError, match="there is no earlier checkpoint"),
            saving.whole_or_nothing(folder),
        ):
            raise error
        assert not folder.exists()
    folder.mkdir()
    with pytest.raises(RuntimeError, match="of the network"), saving.whole_or_nothing(folder):
        raise RuntimeError("an error of the network")
    assert folder.exists()


def test_a_trainer_that_would_see_other_samples_refuses_a_checkpoint(tmp_path, make_trainer):
    make_trainer(tmp_path, max_steps=4).train()
    for changes, now in (({"batch_size": 2}, "2 and 42"), ({"seed": 1}, "4 and 1")):
        other = make_trainer(tmp_path, **changes)
        with pytest.raises(ValueError, match=f"an effective batch of 4 and seed 42, this run has {now}"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # A checkpoint of an earlier version has no state.json and is continued.
    (tmp_path / "checkpoint-4" / "state.json").unlink()
    make_trainer(tmp_path, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_interrupted_checkpoint_is_a_link_that_can_be_continued(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 5, None)
    saving.point_to_interrupted(tmp_path, checkpoint)
    link = tmp_path / "interrupted_checkpoint"
    assert link.is_symlink() and link.readlink().name == "checkpoint-5"  # relative: the folder can be moved
    assert checkpoints.what_is_missing(link) is None
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-5"]
    saving.point_to_interrupted(tmp_path, None)
    assert not link.is_symlink() and checkpoint.is_dir()
    link.mkdir()  # somebody's own folder of that name is left alone
    saving.point_to_interrupted(tmp_path, checkpoint)
    assert link.is_dir() and not link.is_symlink()


def test_a_run_that_never_is_finite_stops_and_says_so_in_its_record(embeddings, tmp_path, monkeypatch):
    from blip3o_fast.training import run
    from blip3o_fast.training.finite import NonFiniteError

    original = run._flow_loss

    def poisoned(*args):
        def call(*inner, **kwargs):
            loss, metrics = original(*args)(*inner, **kwargs)
            return loss * float("inf"), metrics

        return call

    monkeypatch.setattr(run, "_flow_loss", poisoned)
    with pytest.raises(
        NonFiniteError, match=r"2 steps in a row: 1 \(loss\), 2 \(loss\).*there is no checkpoint yet"
    ) as error:
        train(TrainSettings(embeddings, tmp_path / "run", **SMALL, max_bad_steps=2))
    assert "samples: picture_" in str(error.value)
    record = checkpoints.read_run(tmp_path / "run")
    assert record["status"] == "stopped" and record["reason"] == str(error.value)


def test_an_optimizer_state_that_does_not_fit_is_refused_before_anything_is_written(embeddings, tmp_path):
    flags = {
        name: value
        for name, value in SMALL.items()
        if name not in ("model_dim", "num_layers", "num_heads", "multiple_of")
    }
    train(TrainSettings(embeddings, tmp_path / "base", **SMALL | {"max_steps": 2}))
    bad = flags | {"init_from": str(tmp_path / "base"), "max_steps": 1, "ema_decay": 0.0, "warmup_steps": 0}
    with pytest.raises(FileNotFoundError, match="nowhere.pt is not there"):
        train(TrainSettings(embeddings, tmp_path / "run", **bad, init_optimizer=str(tmp_path / "nowhere.pt")))
    assert not (tmp_path / "run").exists()
    checkpoint = tmp_path / "base" / "checkpoint-2"
    train(TrainSettings(embeddings, tmp_path / "run", **bad, init_optimizer=str(checkpoint)))
    # Its third step, not its first.
    state = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    assert {float(slots["step"]) for slots in state.values()} == {3.0}
