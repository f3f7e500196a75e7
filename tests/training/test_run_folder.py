"""Only whole checkpoints count, and nothing whole is lost when old ones are deleted."""

import json
import shutil

import pytest

from blip3o_fast.training import checkpoints


def make_checkpoint(output, step, *, whole=True):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "optimizer.pt"):
        (folder / name).write_bytes(b"x" * step)
    if whole:
        checkpoints.mark_complete(folder, step)
    return folder


def test_the_last_whole_checkpoint_is_found_by_number(tmp_path):
    assert checkpoints.last_whole(tmp_path / "nowhere") is None
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 200, whole=False)
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoints.last_whole(tmp_path).name == "checkpoint-100"


def test_every_way_to_be_cut_off_is_noticed(tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    assert checkpoints.what_is_missing(folder) is None
    (folder / "optimizer.pt").write_bytes(b"x")
    assert checkpoints.what_is_missing(folder) == "optimizer.pt has 1 bytes instead of 5"
    (folder / "optimizer.pt").unlink()
    assert checkpoints.what_is_missing(folder) == "optimizer.pt is missing"
    (folder / checkpoints.MARKER).write_text("{")
    assert "cannot be read" in checkpoints.what_is_missing(folder)
    checkpoints.unmark(folder)
    assert "interrupted" in checkpoints.what_is_missing(folder)
    shutil.rmtree(folder)
    assert checkpoints.what_is_missing(folder) == "there is no such folder"
    bare = make_checkpoint(tmp_path, 7, whole=False)
    (bare / "model.safetensors").unlink()
    checkpoints.mark_complete(bare, 7)
    assert checkpoints.what_is_missing(bare) == "model.safetensors is missing"


def test_an_edited_model_card_breaks_no_checkpoint(tmp_path):
    folder = make_checkpoint(tmp_path, 7, whole=False)
    (folder / "README.md").write_text("generated")
    checkpoints.mark_complete(folder, 7)
    (folder / "README.md").write_text("edited by hand")
    assert checkpoints.what_is_missing(folder) is None


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step, whole=step != 2)
    newer = make_checkpoint(tmp_path, 5, whole=False)  # being written
    checkpoints.rotate(tmp_path, None)
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == [1, 3, 4, 5]
    checkpoints.rotate(tmp_path, 1)
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == [4, 5]
    shutil.rmtree(tmp_path / "checkpoint-4")
    checkpoints.rotate(tmp_path, 1)  # nothing whole: nothing is deleted
    assert newer.is_dir()


def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        make_checkpoint(tmp_path, step)

    def cut_off(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.rotate(tmp_path, 1)
    assert checkpoints.what_is_missing(tmp_path / "checkpoint-1") is not None
    assert checkpoints.last_whole(tmp_path).name == "checkpoint-2"


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    checkpoints.truncate_metrics(path, 5)  # not there yet: nothing to do
    path.write_text("".join(json.dumps({"step": s, "loss": s / 10}) + "\n" for s in (2, 4, 6)) + '{"step": 7, "lo')
    checkpoints.truncate_metrics(path, 4)
    assert [entry["step"] for entry in checkpoints.read_metrics(path)] == [2, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_run_json_is_read_or_named(tmp_path):
    assert checkpoints.read_run(tmp_path) is None
    checkpoints.write_json(tmp_path / "run.json", {"status": "running"})
    assert checkpoints.read_run(tmp_path) == {"status": "running"}
    for content in ("{", "[1]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is not the run\.json of a training run"):
            checkpoints.read_run(tmp_path)
