"""What `sample`, `evaluate` and `interpolate` make of a sampler.json beside the weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blip3o_fast import BLIP3oDiT, sample
from blip3o_fast.cli import main
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.evaluation import evaluate as module
from blip3o_fast.flow.solvers import sigma_grid
from blip3o_fast.sampling.generate import noise_of
from blip3o_fast.sampling.settings import SamplerSettings

TUNED = SamplerSettings("ab2", 3, "cosine", 1.5, guidance_start=0.9, guidance_end=0.1)
EULER = {"num_steps": 30, "guidance_scale": 2.0}
COUNT, SEED = 3, 7


@pytest.fixture
def tuned(trained, tmp_path):
    """The model's folder with a file of its own."""
    shutil.copytree(trained / "model", tmp_path / "model")
    TUNED.write(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def said(trained, tuned, capsys):
    """Runs a verb on the tuned model; what it printed about the file, and all of it."""

    def run(verb, *flags):
        common = ["--model", tuned, "--embeddings_path", trained / "embeddings", "--eval_split", "0.3"]
        common += ["--device", "cpu", "--seed", SEED]
        assert main([verb, *map(str, [*common, *flags])]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return [line for line in out.splitlines() if line.startswith(f"{tuned / 'sampler.json'}: ")], out

    return run


@pytest.fixture(scope="module")
def by_hand(trained):
    """sample(...) of the first pictures of the split, from the noise of the command line."""
    model = BLIP3oDiT.from_pretrained(trained / "model").eval()
    data = EmbeddingDataset(trained / "embeddings", split="eval", eval_split=0.3)
    noise = noise_of(SEED, data.indices[:COUNT], 1, (model.config.num_tokens, model.config.in_channels))
    return lambda **how: sample(model, data.conditions[:COUNT], noise=noise, **how)


def close(a, b):
    return (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("flags", "how", "line"),
    [
        ([], TUNED.arguments(), f"{TUNED}"),
        (
            ["--num_steps", "4", "--solver", "heun"],
            TUNED.arguments() | {"num_steps": 4, "solver": "heun", "sigmas": sigma_grid(4, "cosine")},
            f"{replace(TUNED, num_steps=4, solver='heun')} (given: solver, num_steps; the file has ab2, 3 steps)",
        ),
        (
            ["--guidance_scale", "3"],
            TUNED.arguments() | {"guidance_scale": 3.0, "guidance_start": 1.0, "guidance_end": 0.0},
            "ab2, 3 steps, cosine grid, guidance 3 (given: guidance_scale)",
        ),
    ],
)
def test_a_file_of_samples_is_made_as_it_says_where_no_flag_does(said, tuned, by_hand, tmp_path, flags, how, line):
    output = tmp_path / "s.safetensors"
    lines, _ = said("sample", "--output", output, "--num_samples", COUNT, *flags)
    assert lines == [f"{tuned / 'sampler.json'}: {line}"], "one line, once"
    assert close(load_file(output)["generated"], by_hand(**how))
    assert not close(load_file(output)["generated"], by_hand(**how | {"sigmas": sigma_grid(how["num_steps"])}))
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert torch.equal(torch.tensor(json.loads(metadata.pop("sigmas"))), how["sigmas"])
    assert {name: metadata[name] for name in how if name != "sigmas"} == {
        name: str(value) for name, value in how.items() if name != "sigmas"
    }


def test_flags_that_say_everything_leave_the_file_alone(said, by_hand, tuned, tmp_path):
    (tuned / "sampler.json").write_text("{")
    flags = ["--num_steps", 3, "--guidance_scale", 2, "--solver", "euler", "--guidance_start", 1, "--guidance_end", 0]
    lines, _ = said("sample", "--output", tmp_path / "s", "--num_samples", COUNT, *flags)
    assert lines == [] and close(load_file(tmp_path / "s")["generated"], by_hand(num_steps=3, guidance_scale=2.0))


def test_the_grid_belongs_to_a_folder_of_samples(said, tuned, trained, by_hand, tmp_path, capsys):
    flags = ["--output_dir", tmp_path / "f", "--num_samples", COUNT, "--samples_per_shard", "2"]
    lines, _ = said("sample", *flags)
    assert len(lines) == 1
    made = json.loads((tmp_path / "f" / "samples.json").read_text())["made"]
    assert torch.equal(torch.tensor(made["sigmas"]), TUNED.arguments()["sigmas"]) and made["solver"] == "ab2"
    parts = [load_file(path) for path in sorted((tmp_path / "f").glob("*.safetensors"))]
    index, generated = (torch.cat([part[name] for part in parts]) for name in ("index", "generated"))
    order = EmbeddingDataset(trained / "embeddings", split="eval", eval_split=0.3).indices[:COUNT].argsort()
    assert torch.equal(index, index.sort().values) and close(generated, by_hand(**TUNED.arguments())[order])
    assert "2 of 2 result shards are there, 2 of them kept" in said("sample", *flags)[1]

    replace(TUNED, grid="linear").write(tuned)  # the same numbers otherwise
    common = ["--model", tuned, "--embeddings_path", trained / "embeddings", "--eval_split", "0.3", "--seed", SEED]
    assert main(["sample", *map(str, [*common, "--device", "cpu", *flags])]) == 2
    assert "holds samples of other settings: sigmas" in capsys.readouterr().err


def test_evaluate_judges_that_sampler_and_its_unconditional_run_is_guided_nowhere(said, monkeypatch, by_hand, tmp_path):
    asked, generate = [], module.generate
    monkeypatch.setattr(module, "generate", lambda m, d, s: asked.append((s.run(), out := generate(m, d, s))) or out)
    lines, _ = said("evaluate", "--num_samples", COUNT)
    assert len(lines) == 1
    (one, generated), (other, without) = asked
    levels = TUNED.arguments()["sigmas"]
    nowhere = {"guidance_scale": 0.0, "guidance_start": 1.0, "guidance_end": 0.0}
    assert torch.equal(one.pop("sigmas"), levels) and torch.equal(other.pop("sigmas"), levels)
    assert other == one | nowhere and one["solver"] == "ab2" and one["num_steps"] == 3
    assert close(generated, by_hand(**TUNED.arguments()))
    assert close(without, by_hand(**TUNED.arguments() | nowhere))


def test_given_samples_say_on_which_noise_levels_they_were_made(said, monkeypatch, tuned, tmp_path):
    """The file was made with the tuned sampler; then another one was written, or none is there."""
    said("sample", "--output", tmp_path / "s")
    judged = []
    monkeypatch.setattr(module, "generate", lambda m, d, s: judged.append(s.run()) or torch.zeros(12, 16, 6))
    assert "note" not in said("evaluate", "--samples", tmp_path / "s")[1]
    (tuned / "sampler.json").unlink()
    out = said("evaluate", "--samples", tmp_path / "s")[1]
    assert "with noise levels 1, 0.75, 0.25, ..., not the linear noise levels" in out and "solver ab2, not euler" in out
    assert all(torch.equal(run["sigmas"], TUNED.arguments()["sigmas"]) for run in judged) and len(judged) == 2


def test_interpolate_goes_the_same_way(said, by_hand, tmp_path):
    lines, _ = said("interpolate", "--pair", "0,1", "--count", "2", "--output", tmp_path / "way")
    assert len(lines) == 1
    assert close(load_file(tmp_path / "way")["generated"][0], by_hand(**TUNED.arguments())[0])
    with safe_open(tmp_path / "way", framework="pt") as file:
        assert json.loads(file.metadata()["sigmas"]) == TUNED.arguments()["sigmas"].tolist()


@pytest.mark.parametrize(
    ("verb", "flags"),
    [("sample", ["--output_dir", "f"]), ("sample", []), ("evaluate", []), ("interpolate", ["--pair", "0,1"])],
)
def test_a_broken_file_is_named(trained, tuned, tmp_path, monkeypatch, capsys, verb, flags):
    monkeypatch.chdir(tmp_path)
    (tuned / "sampler.json").write_text('{"solver": "ab2"}')
    common = ["--model", str(tuned), "--embeddings_path", str(trained / "embeddings"), "--eval_split", "0.3"]
    assert main([verb, *common, *flags]) == 2
    assert f"{tuned / 'sampler.json'}: num_steps, grid, guidance_scale missing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "before any work"
