"""Extraction: the features that the encoders give, once per picture, whatever interrupts it."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.data import extract as module
from blip3o_fast.data import skipped as skipped_module
from blip3o_fast.data.encoders import Encoder
from blip3o_fast.data.extract import extract
from blip3o_fast.data.images import Picture, decode, find_sources, write_tars
from blip3o_fast.data.pickle_output import PICKLE
from blip3o_fast.data.pipeline import Pipeline
from blip3o_fast.data.preprocessing import Preprocessing
from blip3o_fast.data.shards import EncoderInfo, read_index, read_shards


class Patches(nn.Module):
    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        self.pictures = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pictures += len(x)
        return self.conv(x)


def encoder(name: str, dim: int, seed: int, crop: bool = False) -> Encoder:
    preprocess = Preprocessing(32, (127.0,) * 3, (64.0,) * 3, crop=crop)
    return Encoder(EncoderInfo(name, dim), preprocess, Patches(dim, seed), lambda model, x: model(x))


@pytest.fixture
def sides() -> tuple[Encoder, Encoder]:
    return encoder("condition", 6, 0), encoder("target", 5, 1)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures(count: int, start: int = 0) -> list[Picture]:
    return [Picture(f"k{i}", f"caption {i}", png(i), ".png") for i in range(start, start + count)]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_tars(iter(pictures(11)), tmp_path / "tars", 4)
    return tmp_path / "tars"


def run(images, folder: Path, sides: tuple[Encoder, Encoder], **options):
    return extract(images, folder, condition_encoder=sides[0], target_encoder=sides[1], **options)


@pytest.mark.parametrize(("batch_size", "workers"), [(None, None), (1, 1), (3, 2), (100, 5)])
def test_every_picture_once_in_order(tmp_path: Path, tars: Path, sides, batch_size, workers) -> None:
    result = run(tars, tmp_path / "out", sides, batch_size=batch_size, workers=workers)
    assert (result.pictures, result.reused, len(result.skipped)) == (11, 0, 0)
    read = read_shards(tmp_path / "out")
    assert read.keys == [f"k{i}" for i in range(11)] and read.captions[10] == "caption 10"
    for side, features in zip(sides, (read.condition, read.target), strict=True):
        inputs = torch.stack([side.preprocess(decode(png(i))) for i in range(11)])
        wanted = side.model.conv(inputs).flatten(2).transpose(1, 2)
        assert float((features - wanted).abs().max()) <= 1e-4
    assert [row.source for row in read_index(tmp_path / "out")][3:5] == ["00000.tar", "00001.tar"]
    assert sorted(os.listdir(tmp_path / "out"))[3:-1] == [f"shard-0000{i}.safetensors" for i in range(3)]
    assert len(EmbeddingDataset(tmp_path / "out", split="train")) == 10


def test_each_encoder_gets_its_own_preprocessing(tmp_path: Path, tars: Path) -> None:
    sides = encoder("condition", 6, 0), encoder("target", 6, 0, crop=True)
    run(tars, tmp_path / "out", sides)
    read = read_shards(tmp_path / "out")
    for side, features in zip(sides, (read.condition, read.target), strict=True):
        wanted = side.encode(torch.stack([side.preprocess(decode(png(i))) for i in range(11)]))
        assert float((features - wanted).abs().max()) <= 1e-4
    assert not torch.allclose(read.condition, read.target, atol=1e-2)


def test_the_thread_count_is_put_back(tmp_path: Path, tars: Path, sides, two_threads) -> None:
    run(tars, tmp_path / "out", sides)
    assert torch.get_num_threads() == 2


def test_whole_shards_are_kept(tmp_path: Path, tars: Path, sides) -> None:
    run(tars, tmp_path / "out", sides)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    result = run(tars, tmp_path / "out", sides)
    assert (result.pictures, result.reused) == (0, 11)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert sides[0].model.pictures == 11
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    result = run(tars, tmp_path / "out", sides)
    assert (result.pictures, result.reused) == (4, 7)
    (tmp_path / "out" / "shard-00000.safetensors").write_bytes(b"junk")
    assert run(tars, tmp_path / "out", sides).pictures == 4
    assert read_shards(tmp_path / "out").keys == [f"k{i}" for i in range(11)]


def test_kept_shards_need_no_encoder(tmp_path: Path, tars: Path, sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "encoder_info", lambda name, **_: EncoderInfo(name, {"a": 6, "b": 5}[name]))
    monkeypatch.setattr(module, "load_encoder", lambda name, **_: encoder(name, {"a": 6, "b": 5}[name], 0))
    extract(tars, tmp_path / "out", condition_encoder="a", target_encoder="b")
    monkeypatch.delattr(module, "load_encoder")
    assert extract(tars, tmp_path / "out", condition_encoder="a", target_encoder="b").reused == 11


def test_a_changed_source_is_done_again(tmp_path: Path, tars: Path, sides) -> None:
    run(tars, tmp_path / "out", sides)
    changed = pictures(11)
    changed[5] = Picture("new", "caption", png(40), ".png")
    write_tars(iter(changed), tars, 4)
    result = run(tars, tmp_path / "out", sides)
    assert (result.pictures, result.reused) == (4, 7)
    assert read_shards(tmp_path / "out").keys[5] == "new"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "float16"}, "dtype float32, asked for float16"),
        ({"limit": 2}, "limit None, asked for 2"),
        ({"samples_per_shard": 2}, "samples_per_shard 1000, asked for 2"),
        ({"precision": "bf16"}, "precision fp32, asked for bf16"),
    ],
)
def test_other_settings_drop_nothing_unasked(tmp_path: Path, tars: Path, sides, options: dict, told: str) -> None:
    out = tmp_path / "out"
    run(tars, out, sides)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=f"holds features of 00000.tar with {told}; .* or overwrite"):
        run(tars, out, sides, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    expected = 6 if "limit" in options else 11
    assert run(tars, out, sides, overwrite=True, **options).pictures == expected == len(read_shards(out).keys)
    assert run(tars, out, sides, overwrite=True, **options).reused == expected  # overwrite repeats nothing that fits


def test_other_settings_drop_no_part_of_ranks_unasked(
    tmp_path: Path, tars: Path, sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(tars, tmp_path / "out", sides).pictures == 4
    with pytest.raises(ValueError, match=r"00001\.tar with dtype float32, asked for float16"):
        run(tars, tmp_path / "out", sides, dtype="float16")
    assert run(tars, tmp_path / "out", sides).reused == 4


def test_missing_captions_are_listed(tmp_path: Path, sides) -> None:
    some = pictures(6)
    some[1] = Picture("k1", "", some[1].data, ".png")
    some[4] = Picture("k4", " ", b"damaged", ".png")
    write_tars(iter(some), tmp_path / "tars", 4)
    result = run(tmp_path / "tars", tmp_path / "out", sides, samples_per_shard=1)
    assert (result.pictures, len(result.skipped), result.without_caption) == (5, 1, 1)
    assert "1 have no caption" in str(result)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["source"], line["key"]) for line in lines] == [("00000.tar", "k1"), ("00001.tar", "k4")]
    assert lines[0]["reason"] == "no caption; its features were taken"
    assert len(run(tmp_path / "tars", tmp_path / "out", sides, samples_per_shard=1).skipped) == 1


def test_sources_are_added_and_foreign_ones_refused(tmp_path: Path, tars: Path, sides) -> None:
    run(tars / "00001.tar", tmp_path / "out", sides)
    result = run(tars, tmp_path / "out", sides)
    assert (result.pictures, result.reused) == (7, 4)
    assert sorted(read_shards(tmp_path / "out").keys) == sorted(f"k{i}" for i in range(11))
    with pytest.raises(ValueError, match=r"holds features of 00000\.tar, 00002\.tar, which are not among"):
        run(tars / "00001.tar", tmp_path / "out", sides)
    assert len(read_shards(tmp_path / "out").keys) == 11
    result = run(tars / "00001.tar", tmp_path / "out", sides, overwrite=True)
    assert (result.pictures, result.reused) == (0, 4)
    assert read_shards(tmp_path / "out").keys == ["k4", "k5", "k6", "k7"]


def test_other_encoders_are_refused(tmp_path: Path, tars: Path, sides) -> None:
    run(tars, tmp_path / "out", sides)
    other = (encoder("other", 6, 0), sides[1])
    with pytest.raises(ValueError, match="holds features of .* asked for .*other"):
        run(tars, tmp_path / "out", other)
    assert run(tars, tmp_path / "out", other, overwrite=True).pictures == 11
    assert read_shards(tmp_path / "out").meta.condition.name == "other"


def test_overwrite_drops_nothing_before_the_encoders_are_loaded(
    tmp_path: Path, tars: Path, sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **_: object) -> Encoder:
        raise OSError(f"{name}: the hub cannot be reached")

    monkeypatch.setattr(module, "encoder_info", lambda name, **_: EncoderInfo(name, 6 if name != "target" else 5))
    monkeypatch.setattr(module, "load_encoder", unreachable)
    run(tars / "00001.tar", tmp_path / "out", sides)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for images, name in ((tars, "other"), (tars / "00000.tar", "condition")):  # other encoders; other sources
        with pytest.raises(OSError, match="cannot be reached"):
            extract(images, tmp_path / "out", condition_encoder=name, target_encoder="target", overwrite=True)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert run(tars / "00000.tar", tmp_path / "out", sides, overwrite=True).pictures == 4
    assert read_shards(tmp_path / "out").keys == ["k0", "k1", "k2", "k3"]


def test_very_many_skipped_members_are_counted(tmp_path: Path, sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipped_module, "MAX_REASONS", 3)
    damaged = [Picture("d" * i, "", b"junk", ".png") for i in range(1, 6)]
    write_tars(iter([*pictures(1), *damaged]), tmp_path / "tars", 6)
    for _ in range(2):
        result = run(tmp_path / "tars", tmp_path / "out", sides)
        assert (len(result.skipped), len(result.skipped.reasons)) == (5, 3)
    assert "5 skipped" in str(result) and str(result).endswith("; and 2 more")


def test_damaged_pictures_are_skipped_and_named(tmp_path: Path, sides) -> None:
    some = pictures(6)
    some[2] = Picture("damaged", "", b"junk", ".png")
    some[5] = Picture("cut", "", png(5)[:-30], ".png")
    write_tars(iter(some), tmp_path / "tars", 3)
    for _ in range(2):  # a resumed run names them again
        result = run(tmp_path / "tars", tmp_path / "out", sides)
        assert set(result.skipped.reasons) == {"00000.tar:damaged", "00001.tar:cut"}
        assert result.pictures + result.reused == 4
    assert "2 skipped: 00000.tar:damaged (UnidentifiedImageError" in str(result)
    assert read_shards(tmp_path / "out").keys == ["k0", "k1", "k3", "k4"]


def test_a_source_without_pictures_is_an_error(tmp_path: Path, sides) -> None:
    write_tars(iter([Picture("damaged", "", b"junk", ".png")]), tmp_path / "tars", 3)
    with pytest.raises(ValueError, match=r"no picture of 00000.tar could be read; 00000.tar:damaged \("):
        run(tmp_path / "tars", tmp_path / "out", sides)


def test_features_that_are_not_finite_are_skipped(tmp_path: Path, tars: Path, sides) -> None:
    real = sides[1].model.conv
    wanted = sides[1].preprocess(decode(png(2)))

    class Sometimes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bad = torch.tensor([torch.equal(row, wanted) for row in x])
            return torch.where(bad[:, None, None, None], torch.nan, real(x))

    sides[1].model.conv = Sometimes()
    result = run(tars, tmp_path / "out", sides)
    assert result.skipped.reasons == {"00000.tar:k2": "its features are not finite"}
    assert "k2" not in read_shards(tmp_path / "out").keys


def test_folder_of_pictures_and_limit(tmp_path: Path, sides) -> None:
    for picture in pictures(5):
        path = tmp_path / "pictures" / f"{picture.key}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture.data)
        path.with_suffix(".txt").write_text(picture.caption)
    assert run(tmp_path / "pictures", tmp_path / "out", sides, limit=3).pictures == 3
    assert read_shards(tmp_path / "out").captions == ["caption 0", "caption 1", "caption 2"]
    # of the folder, not of every thousand of it
    sources = find_sources(tmp_path / "pictures", per_shard=2, limit=3)
    assert [source.count for source in sources] == [2, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, tars: Path, sides, dtype: str) -> None:
    run(tars, tmp_path / "full", sides)
    run(tars, tmp_path / "half", sides, dtype=dtype)
    full, half = read_shards(tmp_path / "full"), read_shards(tmp_path / "half")
    assert torch.equal(half.target, full.target.to(getattr(torch, dtype)).float())


def test_pickle_of_the_original_project(tmp_path: Path, tars: Path, sides) -> None:
    run(tars, tmp_path / "out", sides, format="pickle")
    data = pickle.loads((tmp_path / "out" / PICKLE).read_bytes())
    assert set(data) >= {
        "eva_blip3o_embeddings",
        "clip_blip3o_embeddings",
        "captions",
        "keys",
        "config",
        "total_samples",
    }
    assert type(data["eva_blip3o_embeddings"]) is np.ndarray and data["eva_blip3o_embeddings"].dtype == np.float32
    from_pickle = EmbeddingDataset(tmp_path / "out" / PICKLE, split="eval", normalize="pca:2")
    from_shards = EmbeddingDataset(tmp_path / "out", split="eval", normalize="pca:2")
    assert torch.equal(from_pickle.targets, from_shards.targets) and from_pickle.keys == from_shards.keys


def test_an_interruption_anywhere_is_continued(
    tmp_path: Path, tars: Path, sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pipeline.run
    calls = []

    def interrupted(self, pictures, progress):
        calls.append(pictures)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, pictures, progress)

    monkeypatch.setattr(Pipeline, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tars, tmp_path / "out", sides)
    assert len(read_shards(tmp_path / "out").keys) == 4
    assert run(tars, tmp_path / "out", sides).reused == 4
    assert len(read_shards(tmp_path / "out").keys) == 11


SLOW = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import test_extract_sides as t
sides = t.sides()
real = sides[0].model.forward
def slow(x):
    time.sleep(0.1)
    os.write(1, b"picture\\n")  # whole lines, also from two threads
    return real(x)
sides[0].model.forward = slow
t.extract(sys.argv[2], sys.argv[3], condition_encoder=sides[0], target_encoder=sides[1], batch_size=1, workers=2)
"""


def test_ctrl_c_in_a_real_process(tmp_path: Path, tars: Path, sides) -> None:
    (tmp_path / "test_extract_sides.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('whole', {__file__!r})\n"
        "whole = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(whole)\n"
        "extract = whole.extract\ndef sides(): return whole.encoder('condition', 6, 0), whole.encoder('target', 5, 1)\n"
    )
    command = [sys.executable, "-c", SLOW, str(tmp_path), str(tars), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(6):  # inside the second shard
        assert process.stdout.readline() == "picture\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert time.monotonic() - start < 20
    names = os.listdir(tmp_path / "out")
    assert "shard-00000.safetensors" in names and not [name for name in names if name.startswith(".")]
    assert len(read_shards(tmp_path / "out").keys) == 4
    assert run(tars, tmp_path / "out", sides).reused == 4


def test_progress_is_quiet_when_redirected(
    tmp_path: Path, tars: Path, sides, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tars, tmp_path / "a", sides)
    assert capsys.readouterr().err == ""
    run(tars, tmp_path / "b", sides, quiet=False)
    assert "00000.tar (1 of 3)" in capsys.readouterr().err


def test_bad_arguments_are_refused_before_anything_is_made(tmp_path: Path, tars: Path) -> None:
    for options, match in (
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"workers": 1.5}, "workers: got 1.5"),
        ({"limit": -1}, "limit: got -1"),
        ({"dtype": "int4"}, "dtype: got 'int4'; allowed are 'float32', 'float16', 'bfloat16', 'int8'"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"precision": "fp16", "device": "cpu"}, "a CPU has 'fp32' and 'bf16'"),
        ({"samples_per_shard": 0}, "samples_per_shard: got 0"),
        ({"format": "csv"}, "format: got 'csv'; allowed are 'shards', 'pickle'"),
        ({"device": "tpu9"}, "device: got 'tpu9'; allowed are 'auto'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99'; this machine shows"),
        ({"condition_encoder": "vgg"}, "encoder: got 'vgg'; allowed are efficientnet-lite0"),
    ):
        with pytest.raises(ValueError, match=match):
            extract(tars, tmp_path / "out", **options)
    with pytest.raises(FileNotFoundError, match="images: .*missing does not exist"):
        extract(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(ValueError, match="tower: got 'hidden'; efficientnet-lite0 has 'extract_features'"):
        extract(tars, tmp_path / "out", condition_encoder="efficientnet-lite0", tower="hidden")
    assert not (tmp_path / "out").exists()


def test_real_encoders_end_to_end(tmp_path: Path) -> None:
    write_tars(iter(pictures(3)), tmp_path / "tars", 3)
    names = {"condition_encoder": "efficientnet-lite0", "target_encoder": "efficientnet-lite2"}
    extract(tmp_path / "tars", tmp_path / "out", **names)
    dataset = EmbeddingDataset(tmp_path / "out")
    assert dataset.conditions.shape == dataset.targets.shape == (3, 64, 1280)
    assert not torch.allclose(dataset.conditions, dataset.targets)
    assert find_sources(tmp_path / "tars")[0].name == "00000.tar"
