"""Stages are done once per settings, survive an interruption, and pass on what their commands said."""

import pytest

from blip3o_fast.demo.stages import Stages


class Runs:
    """A stage's work: writes its output and counts."""

    def __init__(self, path, error=None):
        self.path, self.error, self.count = path, error, 0

    def __call__(self):
        self.count += 1
        self.path.write_text(str(self.count))
        if self.error is not None:
            raise self.error


def go(folder, first, second, settings=None):
    stages = Stages(folder, ["one", "two"])
    stages.run("one", "First", settings or {"steps": 3}, [first.path], first)
    stages.run("two", "Second", {}, [second.path], second)
    return stages


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    first, second = Runs(tmp_path / "a"), Runs(tmp_path / "b")
    went = go(tmp_path, first, second)
    again = go(tmp_path, first, second)
    assert (first.count, second.count) == (1, 1)
    assert again.seconds == went.seconds
    assert capsys.readouterr().out.splitlines()[-2:] == ["[1/2] First: done before", "[2/2] Second: done before"]


def test_changed_settings_redo_the_stage_and_all_after_it(tmp_path):
    first, second = Runs(tmp_path / "a"), Runs(tmp_path / "b")
    go(tmp_path, first, second)
    go(tmp_path, first, second, {"steps": 4})
    assert (first.count, second.count) == (2, 2)


def test_a_lost_output_is_made_again(tmp_path):
    first, second = Runs(tmp_path / "a"), Runs(tmp_path / "b")
    go(tmp_path, first, second)
    second.path.unlink()
    go(tmp_path, first, second)
    assert (first.count, second.count) == (1, 2)


def test_an_interrupted_stage_is_not_done(tmp_path):
    """Its output lies there already; only the record, written last, counts."""
    first, second = Runs(tmp_path / "a"), Runs(tmp_path / "b", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, first, second)
    second.error = None
    go(tmp_path, first, second)
    assert (first.count, second.count) == (1, 2)


def test_an_interrupted_stage_continues_only_with_its_own_settings(tmp_path):
    """Same settings: what it had written is there to continue from. Others: it is gone."""
    half, found = tmp_path / "a", []

    def interrupted():
        found.append(half.exists())
        half.write_text("half")
        raise KeyboardInterrupt

    for steps in (3, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            Stages(tmp_path, ["one"]).run("one", "First", {"steps": steps}, [half], interrupted)
    assert found == [False, True, False]


def test_a_damaged_record_counts_as_none(tmp_path):
    first, second = Runs(tmp_path / "a"), Runs(tmp_path / "b")
    go(tmp_path, first, second)
    (tmp_path / "stages" / "one.json").write_text("{")
    go(tmp_path, first, second)
    assert (first.count, second.count) == (2, 2)


def test_a_failing_command_stops_the_demo(tmp_path):
    with pytest.raises(ValueError, match="`blip3o-fast envv` ended with exit code 2"):
        Stages(tmp_path, ["one"]).command("envv")
