"""A folder of samples: what is in it, however it came to be: one process or two, in one go or killed in between."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blip3o_fast import BLIP3oDiT, sample
from blip3o_fast.cli import main
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.reader import open_conditions
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling import generate_from_dataset, prepare, result_shards
from blip3o_fast.sampling.generate import noise_of, weights_fingerprint
from blip3o_fast.sampling.ranks import Rank
from blip3o_fast.sampling.result_shards import read_results

FAST = {"num_steps": 2, "samples_per_shard": 16, "batch_size": 8}
TOKENS, CHANNELS = 16, 4


@pytest.fixture(scope="module")
def model(served: Path) -> BLIP3oDiT:
    return BLIP3oDiT.from_pretrained(served / "model").eval()


@pytest.fixture(scope="module")
def whole(served: Path, model: BLIP3oDiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every other way must give too."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    done = generate_from_dataset(model, served / "embeddings", folder, **FAST)
    assert (done.samples, done.shards, done.there, done.written) == (60, 4, 4, 4)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_it_is_sample_of_every_condition(served, model, whole):
    data = EmbeddingDataset(served / "embeddings")
    noise = normal_noise_at(0, torch.arange(60), (TOKENS, CHANNELS))
    results = read_results(whole)
    assert torch.equal(results.index, torch.arange(60)) and results.keys == data.keys
    for rows in torch.arange(60).split(16):  # a shard is two batches of 8, the last one 8 and 4
        for batch in rows.split(8):
            expected = sample(prepare(model), data.conditions[batch], noise=noise[batch], num_steps=2)
            assert torch.equal(results.generated[batch], expected)
    assert results.generated.std() > 0.1
    apart = (results.generated[1:] - results.generated[:-1]).abs().amax((1, 2))
    assert bool((apart > 0.01).all())  # no sample is another one's


def test_networks_of_diffusers_pipelines_and_patches_of_several_tokens(served, model, tmp_path):
    """Whatever `sample` takes."""
    from diffusers import LuminaNextDiT2DModel

    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 6, "hidden_size": 32, "num_layers": 1}
    sizes |= {"num_attention_heads": 2, "cross_attention_dim": model.normalizer.condition.in_features}
    network = LuminaNextDiT2DModel(**sizes, num_kv_heads=2, multiple_of=32, learn_sigma=False).eval()
    given = {"network": network, "pipeline": SimpleNamespace(transformer=network, config={})}
    for name, one in (given | {"ours": BLIP3oDiT.from_stock(network)}).items():
        generate_from_dataset(one, served / "embeddings", tmp_path / name, num_samples=2, num_steps=2)
    made = contents(tmp_path / "ours")
    assert contents(tmp_path / "network") == made and contents(tmp_path / "pipeline") == made
    results = read_results(tmp_path / "network")
    condition = EmbeddingDataset(served / "embeddings").conditions[results.index]
    noise = noise_of(0, results.index, 1, (16, 6))
    expected = sample(prepare(BLIP3oDiT.from_stock(network)), condition, noise=noise, num_steps=2)
    assert torch.equal(results.generated, expected)


def test_a_shard_says_what_it_is(whole):
    assert sorted(p.name for p in whole.iterdir()) == [
        "samples.json",
        *(f"samples_0000{i}.safetensors" for i in range(4)),
    ]
    last = load_file(whole / "samples_00003.safetensors")
    assert last["index"].tolist() == list(range(48, 60)) and last["generated"].shape == (12, TOKENS, 6)
    with safe_open(whole / "samples_00003.safetensors", framework="pt") as file:
        (said,) = file.metadata().values()
    said, described = json.loads(said), json.loads((whole / "samples.json").read_text())
    assert said["keys"] == [f"picture {i}" for i in range(48, 60)] and said["made"] == described["made"]
    asked = {"num_steps": 2, "guidance_scale": 3.0, "solver": "euler", "seed": 0, "pictures": 60}
    assert said["made"] == said["made"] | asked


def test_batches_shards_and_more_samples_each_leave_the_noise(served, model, whole, tmp_path):
    expected = read_results(whole).generated
    three = generate_from_dataset(
        model, served / "embeddings", tmp_path / "a", num_samples_per_condition=3, **FAST | {"batch_size": 7}
    )
    assert (three.samples, three.shards) == (180, 12)  # 5 whole pictures fit 16 rows
    generated = read_results(tmp_path / "a").generated
    assert (generated[::3] - expected).abs().max() <= 1e-5
    assert (generated[1::3] - generated[::3]).abs().amax((1, 2)).min() > 0.01
    assert (generated[2::3] - generated[1::3]).abs().amax((1, 2)).min() > 0.01
    shape = (TOKENS, CHANNELS)
    noise = noise_of(5, torch.tensor([3, 7]), 2, shape)
    assert torch.equal(noise[::2], normal_noise_at(5, torch.tensor([3, 7]), shape))
    assert torch.equal(noise, torch.cat([noise_of(5, torch.tensor([i]), 2, shape) for i in (3, 7)]))


def test_a_data_set_in_memory_gives_the_same_files(served, model, whole, tmp_path):
    data = EmbeddingDataset(served / "embeddings")
    generate_from_dataset(model, data, tmp_path / "b", **FAST)
    assert contents(tmp_path / "b") == contents(whole)
    normalised = EmbeddingDataset(served / "embeddings", normalize="standardize")
    with pytest.raises(ValueError, match="dataset: its conditions are normalised"):
        generate_from_dataset(model, normalised, tmp_path / "c", **FAST)


class Counting:
    """A reader that counts the rows which are alive at once, by who asked for them."""

    def __init__(self, reader):
        self.reader, self.largest, self.total = reader, 0, 0

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def read(self, start, stop):
        self.largest, self.total = max(self.largest, stop - start), self.total + stop - start
        return self.reader.read(start, stop)


def test_no_more_than_a_batch_of_conditions_is_read_at_once(served, model, tmp_path):
    reader = Counting(open_conditions(served / "embeddings"))
    generate_from_dataset(model, reader, tmp_path / "d", **FAST)
    assert (reader.largest, reader.total) == (8, 60)
    reader = Counting(open_conditions(served / "embeddings"))
    generate_from_dataset(model, reader, tmp_path / "d", **FAST)
    assert reader.total == 0  # all is there


def test_the_first_process_shows_how_far_and_how_fast(served, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    generate_from_dataset(model, served / "embeddings", tmp_path / "n", rank=Rank(1, 2), **FAST)
    generate_from_dataset(model, served / "embeddings", tmp_path / "n", progress=False, rank=Rank(0, 4), **FAST)
    assert capsys.readouterr() == ("", "")
    generate_from_dataset(model, served / "embeddings", tmp_path / "n", **FAST)
    out, err = capsys.readouterr()
    steps = err.split("\r")
    assert out == "" and "44/60" in steps[1]  # what was there counts as done, and not in the speed
    assert "60/60" in steps[-1] and "sample/s" in steps[-1]


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_shares_of_any_number_of_processes_make_the_same_folder(served, model, whole, tmp_path):
    """First 1 of 3 processes, then all of 2: what was made stays."""
    folder = tmp_path / "e"
    first = generate_from_dataset(model, served / "embeddings", folder, rank=Rank(1, 3), **FAST)
    assert (first.there, first.written) == (1, 1)
    made = (folder / "samples_00001.safetensors").stat()
    written = [
        generate_from_dataset(model, served / "embeddings", folder, rank=Rank(number, 2), **FAST).written
        for number in (0, 1)
    ]
    assert written == [2, 1]
    again = (folder / "samples_00001.safetensors").stat()
    assert (made.st_ino, made.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert contents(folder) == contents(whole)


def test_two_processes_of_the_command_make_what_one_makes(served, whole, tmp_path, monkeypatch, capsys):
    """torchrun's variables, and nothing else of it: the processes, of which this is one, never meet."""
    folder = tmp_path / "f"
    flags = ["sample", "--model", served / "model", "--embeddings_path", served / "embeddings", "--split", "all"]
    flags += ["--output_dir", folder, "--device", "cpu", "--guidance_scale", "3"]
    flags = [str(word) for word in (*flags, *(w for name, value in FAST.items() for w in (f"--{name}", value)))]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "blip3o_fast", *flags], **pipes) as first:
        monkeypatch.setenv("RANK", "1")
        assert main(flags) == 0
        printed, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert "60 samples, guidance 3, 2 steps" in printed and capsys.readouterr().out == ""
    mine, theirs = contents(folder), contents(whole)
    told = [json.loads(both.pop("samples.json")) for both in (mine, theirs)]
    assert mine == theirs
    assert told[0]["made"] == told[1]["made"] and told[0]["told"]["split"] == "all"


@pytest.mark.parametrize(
    ("rank", "world", "message"),
    [("2", "2", "RANK must be less than WORLD_SIZE = 2, got 2"), ("-1", "2", "RANK must be a whole number"),
     ("0", "two", "WORLD_SIZE must be a whole number >= 0 .* got 'two'")],
)  # fmt: skip
def test_variables_that_make_no_sense_are_refused(monkeypatch, rank, world, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=message):
        Rank.here()


# ---- interrupted -----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import safetensors.torch
from blip3o_fast import BLIP3oDiT
from blip3o_fast.sampling import generate_from_dataset

save_file, saved = safetensors.torch.save_file, []

def dies_in_the_second(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    saved.append(path)
    if len(saved) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = dies_in_the_second
model = BLIP3oDiT.from_pretrained(sys.argv[1] + "/model").eval()
generate_from_dataset(model, sys.argv[1] + "/embeddings", sys.argv[2], num_steps=2, samples_per_shard=16, batch_size=8)
"""


def test_a_killed_run_goes_on_without_redoing_or_losing_a_sample(served, model, whole, tmp_path):
    folder = tmp_path / "g"
    done = subprocess.run([sys.executable, "-c", KILLED, served, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(p.name for p in folder.iterdir())
    assert left == [".samples_00001.safetensors.part", "samples.json", "samples_00000.safetensors"]
    with pytest.raises(ValueError, match=r"1 of 4 result shards are there, samples_00001\.safetensors is not"):
        read_results(folder)
    before = (folder / "samples_00000.safetensors").stat()
    reader = Counting(open_conditions(served / "embeddings"))
    assert generate_from_dataset(model, reader, folder, **FAST).written == 3
    assert reader.total == 60 - 16
    after = (folder / "samples_00000.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert contents(folder) == contents(whole)


def test_torn_short_and_foreign_shards_are_made_again(served, model, whole, tmp_path):
    folder = tmp_path / "h"
    generate_from_dataset(model, served / "embeddings", folder, **FAST)
    torn, empty, foreign = (folder / f"samples_0000{i}.safetensors" for i in range(3))
    torn.write_bytes(torn.read_bytes()[:-1])
    empty.write_bytes(b"")
    generate_from_dataset(model, served / "embeddings", tmp_path / "i", seed=1, **FAST)
    foreign.write_bytes((tmp_path / "i" / foreign.name).read_bytes())
    assert generate_from_dataset(model, served / "embeddings", folder, **FAST).written == 3
    assert contents(folder) == contents(whole)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused_by_their_names_and_dropped_on_demand(served, model, whole, tmp_path):
    folder, embeddings = tmp_path / "j", served / "embeddings"
    generate_from_dataset(model, embeddings, folder, **FAST | {"samples_per_shard": 8})
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    changes = {
        "num_steps": 3,
        "guidance_scale": 1.0,
        "seed": 4,
        "solver": "heun",
        "guidance_end": 0.5,
        "num_samples": 9,
    }
    for name, value in changes.items():
        named = "pictures" if name == "num_samples" else name
        with pytest.raises(ValueError, match=f"holds samples of other settings: .*{named} .*asked for {value!r}"):
            generate_from_dataset(model, embeddings, folder, **FAST | {"samples_per_shard": 8} | {name: value})
    other = BLIP3oDiT.from_pretrained(served / "model").eval()
    with torch.no_grad():
        other.layers[0].attn1.to_q.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="other weights\nhint: choose another folder, or --overwrite to drop them"):
        generate_from_dataset(other, embeddings, folder, **FAST | {"samples_per_shard": 8})
    with pytest.raises(ValueError, match="other rows"):
        halves = {"split": "eval", "eval_split": 0.5}
        generate_from_dataset(model, embeddings, folder, **FAST | {"samples_per_shard": 8} | halves)
    assert contents(folder) == before
    generate_from_dataset(model, embeddings, folder, overwrite=True, **FAST)
    now = contents(folder)
    assert now.pop("notes.txt") == b"mine" and now == contents(whole)  # 8 shards became 4
    assert generate_from_dataset(model, embeddings, folder, overwrite=True, **FAST).written == 0  # nothing else to drop


def test_the_fingerprint_sees_the_normaliser_and_not_the_place(served, model):
    again = BLIP3oDiT.from_pretrained(served / "model")
    assert weights_fingerprint(again) == weights_fingerprint(model) == weights_fingerprint(prepare(model))
    again.normalizer.target.statistics["mean"] = again.normalizer.target.statistics["mean"] + 1
    assert weights_fingerprint(again) != weights_fingerprint(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        ({"samples_per_shard": 0}, "samples_per_shard must be"),
        ({"num_samples_per_condition": 0}, "num_samples_per_condition must be"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"solver": "rk4"}, "solver must be one of"),
        ({"guidance_start": 0.2, "guidance_end": 0.3}, "guidance_start must be at least guidance_end"),
        ({"num_samples": 0}, "subset: got 0"),
        ({"split": "test"}, "split: got 'test'"),
    ],
)
def test_bad_arguments_are_refused_before_a_folder_is_made(served, model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_from_dataset(model, served / "embeddings", tmp_path / "k", **FAST | changes)
    assert not (tmp_path / "k").exists()


def test_bad_data_and_folders_are_refused(served, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file; a folder of results is needed"):
        generate_from_dataset(model, served / "embeddings", tmp_path / "file", **FAST)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        generate_from_dataset(model, served / "nowhere", tmp_path / "l", **FAST)
    with pytest.raises(ValueError, match="dataset must be a path, an EmbeddingDataset or a reader, got list"):
        generate_from_dataset(model, [1], tmp_path / "l", **FAST)
    narrow = Counting(open_conditions(served / "embeddings"))
    narrow.width = 3
    with pytest.raises(ValueError, match="conditions have 3 channels, the model was trained on 10"):
        generate_from_dataset(model, narrow, tmp_path / "l", **FAST)
    for content in ("[]", "{", '{"format_version": 1, "made": {"pictures": 0}, "told": {}}'):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / result_shards.DESCRIPTION).write_text(content)
        with pytest.raises(ValueError, match=r"samples\.json: "):
            generate_from_dataset(model, served / "embeddings", tmp_path / "m", **FAST)
    with pytest.raises(FileNotFoundError, match=r"samples\.json: no such file"):
        read_results(served / "embeddings")
