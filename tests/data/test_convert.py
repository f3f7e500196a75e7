"""Converting between pickles, chunked pickles and shards; and what `inspect` says of each."""

import hashlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from blip3o_fast.cli import main
from blip3o_fast.data import inspection
from blip3o_fast.data.blocks import open_features
from blip3o_fast.data.convert import convert
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.inspection import inspect_features
from blip3o_fast.data.inspection_plot import grids
from blip3o_fast.data.shards import read_shards

TOKENS, E, C = 4, 6, 5


def features(count: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "eva_blip3o_embeddings": torch.randn(count, TOKENS, E, generator=generator).numpy(),
        "clip_blip3o_embeddings": torch.randn(count, TOKENS, C, generator=generator).numpy(),
        "captions": [f"caption {seed} {i}" for i in range(count)],
        "keys": [f"{seed}_{i}" for i in range(count)],
        "config": {"grid": 2},
        "total_samples": count,
    }


def write(path: Path, data: dict) -> Path:
    path.write_bytes(pickle.dumps(data, protocol=4))
    return path


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """What the original's later versions write: chunks of unlike sizes and a manifest."""
    folder = tmp_path / "chunks"
    folder.mkdir()
    for k, count in enumerate((5, 3, 7)):
        write(folder / f"embeddings_shard_{k:05d}.pkl", features(count, seed=k))
    manifest = {"total_shards": 3, "total_samples": 15, "failed_shards": [], "format_version": "blip3o_chunked_v1"}
    (folder / "embeddings_manifest.json").write_text(json.dumps(manifest))
    return folder


def expected(counts: tuple[int, ...] = (5, 3, 7)) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    parts = [features(count, seed=k) for k, count in enumerate(counts)]
    condition, target = (
        torch.from_numpy(numpy.concatenate([part[name] for part in parts]))
        for name in ("eva_blip3o_embeddings", "clip_blip3o_embeddings")
    )
    return condition, target, [key for part in parts for key in part["keys"]]


@pytest.mark.parametrize("size", [1, 4, 5, 15, 100])
def test_chunks_become_shards_of_one_size(chunks, tmp_path, size):
    assert convert(chunks, tmp_path / "out", samples_per_shard=size) == 15
    read = read_shards(tmp_path / "out")
    condition, target, keys = expected()
    assert torch.equal(read.condition, condition) and torch.equal(read.target, target) and read.keys == keys
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == -(-15 // size)
    assert read.captions[0] == "caption 0 0" and read.meta.condition.dim == E


def test_a_pickle_becomes_shards_and_shards_the_same_pickle(tmp_path):
    source = write(tmp_path / "blip3o_grid_embeddings.pkl", features(9))
    assert main(["convert", str(source), "--output", str(tmp_path / "out"), "--samples_per_shard", "4"]) == 0
    back = tmp_path / "back"
    back.mkdir()
    assert main(["convert", str(tmp_path / "out"), "--output", str(back), "--format", "pickle"]) == 0
    first, second = (pickle.loads(path.read_bytes()) for path in (source, back / "blip3o_grid_embeddings.pkl"))
    assert first.keys() == second.keys()
    for name in ("eva_blip3o_embeddings", "clip_blip3o_embeddings"):
        assert numpy.array_equal(first[name], second[name]) and second[name].dtype == numpy.float32
    assert (first["keys"], first["captions"], 9) == (second["keys"], second["captions"], second["total_samples"])


def test_chunks_become_one_pickle_that_trains(chunks, tmp_path):
    assert convert(chunks, tmp_path / "all.pkl", format="pickle") == 15
    data = EmbeddingDataset(tmp_path / "all.pkl")
    assert torch.equal(data.conditions, expected()[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.pkl", "chunks"], "no temporary folder is left"


def test_the_split_survives(chunks, tmp_path, monkeypatch):
    convert(chunks, tmp_path / "small", dtype="float32")
    assert not (tmp_path / "small" / "split.json").exists()
    (tmp_path / "small" / "split.json").write_text('{"rule": "hash"}')
    convert(tmp_path / "small", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "split.json").read_text()) == {"rule": "hash"}
    # halved on the way, so that by its size alone it would be split otherwise
    (tmp_path / "small" / "split.json").unlink()
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("shard*"))
    monkeypatch.setattr("blip3o_fast.data.splits.LARGE", size - 1)
    convert(tmp_path / "small", tmp_path / "half", dtype="bfloat16")
    before, after = (EmbeddingDataset(tmp_path / name, split="eval", eval_split=0.3) for name in ("small", "half"))
    assert before.keys == after.keys and json.loads((tmp_path / "half" / "split.json").read_text())["rule"] == "hash"


def test_half_precision_on_disk(chunks, tmp_path):
    convert(chunks, tmp_path / "half", dtype="bfloat16")
    assert torch.equal(read_shards(tmp_path / "half").condition, expected()[0].bfloat16().float())
    assert "stored as bfloat16" in str(inspect_features(tmp_path / "half"))


def test_bad_input_is_named_and_leaves_nothing(chunks, tmp_path):
    with pytest.raises(ValueError, match="--format must be one of shards, pickle, got 'npz'"):
        convert(chunks, tmp_path / "out", format="npz")
    with pytest.raises(ValueError, match="--samples_per_shard must be a whole number >= 1, got 0"):
        convert(chunks, tmp_path / "out", samples_per_shard=0)
    with pytest.raises(ValueError, match="--dtype must be one of float32"):
        convert(chunks, tmp_path / "out", dtype="float8")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert(chunks, chunks)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="allowed are a folder made by"):
        open_features(tmp_path)
    (chunks / "embeddings_shard_00001.pkl").unlink()
    with pytest.raises(ValueError, match="lists 3 chunks, 2 are there"):
        convert(chunks, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wide = features(2, seed=1)
    wide["eva_blip3o_embeddings"] = numpy.zeros((2, TOKENS, E + 1), dtype=numpy.float32)
    write(chunks / "embeddings_shard_00001.pkl", wide)
    with pytest.raises(ValueError, match=r"00001.pkl: eva has the shape \(2, 4, 7\); the files before"):
        convert(chunks, tmp_path / "out.pkl", format="pickle")
    assert not (tmp_path / "out.pkl").exists() and not list(tmp_path.glob(".convert-*"))
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):  # some shards were written before it was found
        with pytest.raises(ValueError, match=r"00001.pkl: eva has the shape"):
            convert(chunks, tmp_path / name, samples_per_shard=2)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "empty").iterdir())


def test_a_killed_conversion_leaves_no_set_that_can_be_read(chunks, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from blip3o_fast.data import convert, shards\n"
        "whole = shards.ShardWriter.write\n"
        "def write(self, number, *rest, **more):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if number == 3 else whole(self, number, *rest, **more)\n"
        "shards.ShardWriter.write = write\n"
        "convert.convert(sys.argv[1], sys.argv[2], samples_per_shard=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, chunks, tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL and len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    with pytest.raises(FileNotFoundError, match=r"index\.jsonl: no such file"):
        read_shards(tmp_path / "out")
    with pytest.raises(ValueError, match="holds no picture"):
        inspect_features(tmp_path / "out")


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_is_the_whole_sets_statistics(chunks, tmp_path):
    found = inspect_features(chunks, captions=2)
    condition, target, _ = expected()
    assert (found.pictures, found.tokens, found.captions) == (15, TOKENS, ["caption 0 0", "caption 0 1"])
    for side, features in ((found.condition, condition), (found.target, target)):
        flat = features.double().reshape(-1, side.width)
        mean, deviation = side.channels()
        torch.testing.assert_close(mean, flat.mean(0))
        torch.testing.assert_close(deviation, flat.std(0, unbiased=False))
        torch.testing.assert_close(torch.cat(side.norms), flat.norm(dim=-1).float())
    assert found.faults == [] and found.repeated_keys == found.repeated_features == 0
    text = str(found)
    assert "chunked pickles, 3 files" in text and "GPUs at 1200 pictures/s each" in text and "faults      none" in text


def test_inspect_finds_what_is_repeated_missing_and_damaged(tmp_path, capsys):
    data = features(8)
    data["eva_blip3o_embeddings"][3] = data["eva_blip3o_embeddings"][1]
    data["keys"][5], data["captions"][2] = data["keys"][4], " "
    write(tmp_path / "set.pkl", data)
    found = inspect_features(tmp_path / "set.pkl")
    assert (found.repeated_features, found.repeated_keys, found.without_caption) == (1, 1, 1)
    convert(tmp_path / "set.pkl", tmp_path / "out", samples_per_shard=3)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert main(["inspect", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert f"FAULT       {shard}: not a whole safetensors file" in text
    assert "FAULT       8 pictures are listed, 5 could be read" in text


def test_inspect_is_exact_far_from_zero_and_over_all_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_NORMS_KEPT", 10)  # for the figure; what is printed is of all tokens
    data = features(150)
    data["eva_blip3o_embeddings"] = data["eva_blip3o_embeddings"].astype(numpy.float64) * 1e-3 + 1e5
    data["eva_blip3o_embeddings"][149, 0] *= 7
    found = inspect_features(write(tmp_path / "set.pkl", data)).condition
    flat = data["eva_blip3o_embeddings"].astype(numpy.float32).astype(numpy.float64).reshape(-1, E)
    numpy.testing.assert_allclose(found.channels()[0].numpy(), flat.mean(0), rtol=1e-13)
    numpy.testing.assert_allclose(found.channels()[1].numpy(), flat.std(0), rtol=1e-9)
    still = flat[:-TOKENS]  # without the large token: deviations of 1e-3 around 1e5
    side = inspection.Side(E)
    side.add(torch.from_numpy(still).reshape(-1, TOKENS, E), ["k"] * 149)
    numpy.testing.assert_allclose(side.channels()[1].numpy(), still.std(0), rtol=1e-6)
    norms = numpy.linalg.norm(flat, axis=1)
    assert (found.kept, found.norm_least, found.norm_most) == (
        10,
        pytest.approx(norms.min()),
        pytest.approx(norms.max()),
    )
    numpy.testing.assert_allclose((found.norm_sums / found.tokens)[0], norms.mean(), rtol=1e-12)


def test_inspect_compares_checksums_with_the_manifest(tmp_path, capsys):
    convert(write(tmp_path / "set.pkl", features(8)), tmp_path / "out", samples_per_shard=3)
    assert inspect_features(tmp_path / "out").checksums == "none recorded"
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    about = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in shards}
    manifest = {"manifest_version": 1, "sources": {}, "shards": about}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    found = inspect_features(tmp_path / "out")
    assert (found.checksums, found.faults) == ("3 of 3 files as manifest.json records them", [])
    data = bytearray(shards[1].read_bytes())
    data[-2] ^= 1  # a bit of a number, which no reader would notice
    shards[1].write_bytes(data)
    assert main(["inspect", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert f"FAULT       {shards[1]}: its SHA-256 is not the one that manifest.json records" in text
    assert "checksums   2 of 3 files" in text


def test_the_figure(chunks, tmp_path):
    assert main(["inspect", str(chunks), "--figure", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    image = grids(expected()[0])
    assert image.shape == (2, 15 * 3 - 1, 3) and 0 <= image.min() and image.max() <= 1
    assert image[:, 2].min() == 1, "a white line between two grids"
