"""`sample` into a file and into a folder, and what `evaluate` makes of either; `interpolate`."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blip3o_fast.cli import main
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.evaluation.evaluate import EvaluateSettings, evaluate_checkpoint
from blip3o_fast.evaluation.interpolation import InterpolateSettings, nearest, run_interpolation
from blip3o_fast.evaluation.samples import read_samples, run_sample
from blip3o_fast.evaluation.settings import DEFAULTS, SampleSettings, SamplingSettings

FAST = {"num_steps": 2, "eval_split": 0.3, "device": "cpu"}


def settings_of(kind, trained, **changes):
    return kind(trained / "model", trained / "embeddings", **FAST | changes)


@pytest.mark.parametrize("each", [1, 2])
def test_a_folder_is_judged_as_the_file_is(trained, tmp_path, capsys, each):
    how = {"num_samples_per_condition": each, "guidance_scale": 3.0, "guidance_start": 0.6, "seed": 2}
    file = run_sample(settings_of(SampleSettings, trained, output=tmp_path / "s", **how))
    folder = run_sample(settings_of(SampleSettings, trained, output_dir=tmp_path / "f", samples_per_shard=5, **how))
    printed = capsys.readouterr().out
    shards = {1: 3, 2: 6}[each]  # 5 pictures of 12 in a shard, or 2 of them twice
    assert printed.count(f"{12 * each} samples, guidance 3, 2 steps") == 2
    assert f"{shards} of {shards} result shards are there" in printed
    data = EmbeddingDataset(trained / "embeddings", split="eval", eval_split=0.3)
    stored = load_file(file)
    assert torch.equal(stored["index"], data.indices.repeat_interleave(each))
    assert torch.equal(stored["target"], data.targets.repeat_interleave(each, 0))
    one, other = read_samples(file, data), read_samples(folder, data)
    for name in ("target", "condition", "index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.index, data.indices) and torch.equal(one.generated, stored["generated"][::each])
    assert (one.generated - other.generated).abs().max() <= 1e-5
    assert one.generated.std() > 0.1
    # The interval and the number of steps are taken from the samples, so the unconditional ones are made alike.
    results = []
    for samples in (file, folder):
        asked = settings_of(EvaluateSettings, trained, samples=samples, num_steps=4, seed=2)
        results.append(evaluate_checkpoint(asked))
        printed = capsys.readouterr().out
        assert "were made with num_steps 2, not 4" in printed and "with guidance_start 0.6, not 1.0" in printed
        assert ("note: the samples are 2 of each picture" in printed) == (each == 2)
    assert results[0] == pytest.approx(results[1], rel=1e-4) and results[0]["guidance_scale"] == 3.0
    everywhere = evaluate_checkpoint(settings_of(EvaluateSettings, trained, seed=2))
    for name in ("token_cosine_unconditional", "l2_distance_unconditional"):  # without a condition at every level
        assert everywhere[name] == pytest.approx(results[0][name], rel=1e-5)


def test_a_folder_of_other_pictures_or_unfinished_is_not_judged(trained, tmp_path):
    folder = run_sample(settings_of(SampleSettings, trained, output_dir=tmp_path / "f", samples_per_shard=5))
    with pytest.raises(ValueError, match=r"made of other embeddings or another split.*eval_split 0\.3"):
        evaluate_checkpoint(settings_of(EvaluateSettings, trained, samples=folder, eval_split=0.5))
    (folder / "samples_00002.safetensors").unlink()
    with pytest.raises(ValueError, match="2 of 3 result shards are there, samples_00002.safetensors is not"):
        evaluate_checkpoint(settings_of(EvaluateSettings, trained, samples=folder))
    with pytest.raises(FileNotFoundError, match=r"samples\.json: no such file"):
        evaluate_checkpoint(settings_of(EvaluateSettings, trained, samples=trained))


def test_one_file_is_not_for_several_processes(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="which 2 processes cannot share; use --output_dir FOLDER"):
        run_sample(settings_of(SampleSettings, trained, output=tmp_path / "s"))


def test_what_is_not_told_is_what_it_was(trained):
    assert DEFAULTS == {
        "num_steps": 30, "guidance_scale": 2.0, "solver": "euler", "guidance_start": 1.0, "guidance_end": 0.0
    }  # fmt: skip
    assert SamplingSettings("m", "e").run() == DEFAULTS
    assert SamplingSettings("m", "e", num_steps=5).resolved().solver == "euler"
    assert SamplingSettings("m", "e", guidance_scale=0.0).run() == DEFAULTS | {"guidance_scale": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "a", "output_dir": "b"}, "--output a and --output_dir b exclude each other"),
        ({"overwrite": True}, "--overwrite belongs to --output_dir"),
        ({"num_samples_per_condition": 0}, "--num_samples_per_condition must be a whole number >= 1, got 0"),
        ({"samples_per_shard": -1}, "--samples_per_shard must be"),
        ({"guidance_start": 1.5}, "--guidance_start must be a noise level between 0 and 1, got 1.5"),
        ({"guidance_end": float("nan")}, "--guidance_end must be a noise level"),
        ({"guidance_start": 0.2, "guidance_end": 0.4}, "--guidance_start must be at least --guidance_end"),
    ],
)
def test_bad_flags_are_named(trained, changes, message):
    with pytest.raises(ValueError, match=message):
        run_sample(settings_of(SampleSettings, trained, **changes))


# ---- interpolate -----------------------------------------------------------------------------------------------------


def test_interpolate_writes_the_way_and_prints_who_is_near(trained, tmp_path, capsys):
    output = tmp_path / "deep" / "way.safetensors"
    flags = ["--model", trained / "model", "--embeddings_path", trained / "embeddings", "--output", output]
    flags += ["--pair", "3,7", "--count", "4", "--num_steps", "2", "--eval_split", "0.3", "--device", "cpu"]
    assert main(["interpolate", *map(str, flags)]) == 0
    data = EmbeddingDataset(trained / "embeddings", split="eval", eval_split=0.3)
    stored, lines = load_file(output), capsys.readouterr().out.splitlines()
    assert torch.equal(stored["condition"][[0, 3]], data.conditions[[3, 7]])
    assert stored["weights"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    samples = load_file(run_sample(settings_of(SampleSettings, trained, output=tmp_path / "s")))
    assert (stored["generated"][0] - samples["generated"][3]).abs().max() <= 1e-5  # the first end is its sample
    assert len(lines) == 5 and lines[4].startswith(f"4 steps from 3 ({data.keys[3]}) to 7 ({data.keys[7]}), linear: ")
    for line, row in zip(lines, stored["nearest"].tolist(), strict=False):
        place = data.indices.tolist().index(row)
        assert f"nearest is {place:>6} {data.keys[place]} " in line
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["pair"] == "3,7" and file.metadata()["method"] == "linear"


def test_the_truth_is_nearest_to_itself():
    targets = torch.randn(9, 4, 3) + 5
    place, similarity = nearest(targets[[4, 0]] * 1.0, targets)
    assert place.tolist() == [4, 0] and similarity.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": "3"}, "--pair must be two places in the split, as 3,17, got '3'"),
        ({"pair": "3,-1"}, "--pair must be two places"),
        ({"pair": "3,12"}, "--pair 3,12: the 'eval' split of .* has 12 pictures, 0 to 11"),
        ({"count": 1}, "--count must be a whole number >= 2, got 1"),
        ({"method": "cubic"}, "--method must be one of linear, spherical"),
        ({"output": "."}, "--output . is a folder"),
        ({"num_steps": 0}, "--num_steps must be"),
    ],
)
def test_bad_flags_of_interpolate_are_named(trained, changes, message):
    with pytest.raises(ValueError, match=message):
        run_interpolation(settings_of(InterpolateSettings, trained, **{"pair": "3,7"} | changes))
