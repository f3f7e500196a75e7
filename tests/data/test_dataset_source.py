"""A dataset of the library datasets as a source of pictures: the rows are the library's own."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blip3o_fast.data import dataset_source
from blip3o_fast.data.dataset_source import is_dataset
from blip3o_fast.data.encoders import Encoder
from blip3o_fast.data.extract import extract
from blip3o_fast.data.images import Skipped, decode, find_sources
from blip3o_fast.data.preprocessing import Preprocessing
from blip3o_fast.data.shards import EncoderInfo, read_shards
from blip3o_fast.data.throughput import Progress
from blip3o_fast.data.tower import missing_package

datasets: Any = pytest.importorskip("datasets", reason="the library datasets is not installed")


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def rows(count: int = 5, **columns: list[Any]) -> Any:
    given = {"image": [{"bytes": picture(i), "path": None} for i in range(count)], **columns}
    made = datasets.Dataset.from_dict(given)
    return made.cast_column("image", datasets.Image())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows(caption=[f"caption {i}\nsecond line" for i in range(5)], number=list(range(5))).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def read(item: str | Path, told: Skipped | None = None, per_shard: int = 1000) -> list[Any]:
    told = Skipped() if told is None else told
    return [found for source in find_sources(str(item), per_shard) for found in source.pictures(told)]


@pytest.mark.parametrize("form", ["{}", "hf:{}", "hf:{}?image=image&caption=caption"])
def test_rows_are_pictures(folder: Path, form: str) -> None:
    found = read(form.format(folder))
    assert [(p.key, p.caption, p.data, p.extension) for p in found] == [
        (f"{i:09d}", f"caption {i}", picture(i), ".png") for i in range(5)
    ]
    oracle = datasets.load_from_disk(str(folder))
    assert all(
        decode(p.data).tobytes() == row["image"].convert("RGB").tobytes() for p, row in zip(found, oracle, strict=True)
    )


def test_pieces_of_a_shard_each(folder: Path) -> None:
    sources = find_sources(folder, per_shard=2)
    assert [source.name for source in sources] == ["set[0:]", "set[2:]", "set[4:]"]
    assert [p.key for p in sources[1].pictures(Skipped())] == ["000000002", "000000003"]
    assert [s.fingerprint for s in sources] == [s.fingerprint for s in find_sources(f"hf:{folder}", per_shard=2)]
    assert [s.count for s in find_sources(folder, per_shard=2, limit=3)] == [2, 1]
    assert find_sources(f"hf:{folder}?caption=caption", 2)[0].fingerprint == sources[0].fingerprint
    rows(caption=["other"] * 5).save_to_disk(folder.parent / "other" / "set")
    assert find_sources(folder.parent / "other" / "set", per_shard=2)[0].fingerprint != sources[0].fingerprint


def test_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": rows(3, text=["a", "b", "c"]), "test": rows(2, text=["d", "e"])})
    both.save_to_disk(tmp_path / "both")
    assert [p.caption for p in read(f"hf:{tmp_path / 'both'}?split=test")] == ["d", "e"]
    assert find_sources(f"hf:{tmp_path / 'both'}?split=test")[0].name == "both:test[0:]"
    with pytest.raises(ValueError, match=r"which split\? it has train, test; hf:NAME\?split=train"):
        read(tmp_path / "both")
    with pytest.raises(ValueError, match=r"split=dev\? it has train, test"):
        read(f"hf:{tmp_path / 'both'}?split=dev")
    datasets.DatasetDict({"all": rows(2, text=["x", "y"])}).save_to_disk(tmp_path / "one")
    assert len(read(tmp_path / "one")) == 2


def test_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*given: Any, **options: Any) -> Any:
        asked.append((given, options))
        return datasets.DatasetDict({"train": datasets.load_from_disk(str(folder))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read("hf:some/set?config=small&revision=abc&split=train")
    assert len(found) == 5 and asked == [(("some/set", "small"), {"revision": "abc"})]
    progress = Progress(find_sources("hf:some/set", per_shard=2), None, quiet=True, on_cpu=False, yes=True)
    progress.update(found[:2], 2)  # which looks at no file: there is none of the set's name
    assert progress.total() == 5

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"images: hf:some/set is neither a folder nor in the cache, .*\(no network\)"):
        read("hf:some/set")


def test_rows_that_are_amiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(9))
    cells = [
        {"bytes": picture(0), "path": None},
        None,
        {"bytes": None, "path": str(secret)},
        {"bytes": picture(1) + bytes(2000), "path": None},
        {"bytes": b"junk", "path": None},
        {"bytes": picture(2), "path": None},
    ]
    made = datasets.Dataset.from_dict({"image": cells, "texts": [["a", "b"], ["c"], ["d"], ["e"], ["f"], []]})
    features = datasets.Features(image=datasets.Image(), texts=datasets.Sequence(datasets.Value("string")))
    made = made.cast(features)  # save_to_disk would embed what the path names
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr(dataset_source, "MAX_PICTURE_BYTES", 2000)
    told = Skipped()
    found = read("hf:some/set?caption=texts", told)
    assert [(p.key, p.caption) for p in found] == [("000000000", "a"), ("000000004", "f"), ("000000005", "")]
    assert told.reasons["set[0:]:000000001"] == "no picture"
    assert told.reasons["set[0:]:000000002"] == "its picture is a path, not embedded bytes"
    assert "at most 2000 are read" in told.reasons["set[0:]:000000003"]
    assert len(told) == 3


def test_bytes_without_the_picture_type(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"jpg": [picture(0)], "n": [1], "note": ["x"]})
    made.save_to_disk(tmp_path / "set")
    (found,) = read(f"hf:{tmp_path / 'set'}?image=jpg")
    assert (found.data, found.caption) == (picture(0), "x")
    for query, match in (
        ("", "0 columns of pictures; say image=COLUMN, of jpg, n, note"),
        ("?image=n", "the column 'n' holds Value.*; pictures or their bytes are needed"),
        ("?image=png", "no column 'png'; it has jpg, n, note"),
    ):
        with pytest.raises(ValueError, match=match):
            read(f"hf:{tmp_path / 'set'}{query}")


def test_what_must_be_chosen(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = rows(2, title=["a", "b"], body=["c", "d"])
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"which column has the captions\? say caption=COLUMN, of title, body"):
        read(tmp_path / "two")
    assert [p.caption for p in read(f"hf:{tmp_path / 'two'}?caption=body")] == ["c", "d"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows(0))
    for item, match in (
        (f"hf:{folder}?colour=red", "has 'colour'; hf:NAME.KEY=VALUE takes config, split, image, caption, revision"),
        ("hf:", "has no name"),
        (f"hf:{folder}?split=train", "has no splits"),
        (f"hf:{folder}?revision=abc", "is a folder, which has no revision"),
        ("hf:some/empty", "has no rows"),
    ):
        with pytest.raises(ValueError, match=match):
            read(item)
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))} is no dataset"):
        read(f"hf:{tmp_path}")
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match="set cannot be read"):
        read(folder)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise missing_package(name, name)

    monkeypatch.setattr(dataset_source, "import_package", missing)
    with pytest.raises(ModuleNotFoundError, match="needs the package datasets; pip install datasets"):
        read("hf:some/set")
    assert not is_dataset("data") and not is_dataset("http://x")


def test_extraction(folder: Path, tmp_path: Path) -> None:
    def side(name: str, dim: int) -> Encoder:
        torch.manual_seed(dim)
        preprocess = Preprocessing(32, (127.0,) * 3, (128.0,) * 3, crop=True)
        return Encoder(EncoderInfo(name, dim), preprocess, nn.Conv2d(3, dim, 4, 4), lambda model, x: model(x))

    given = {"condition_encoder": side("a", 4), "target_encoder": side("b", 3), "quiet": True}
    assert extract(f"hf:{folder}", tmp_path / "out", **given).pictures == 5
    found = read_shards(tmp_path / "out")
    assert (found.keys[4], found.captions[4]) == ("000000004", "caption 4")
    again = extract(str(folder), tmp_path / "out", **given)
    assert (again.pictures, again.reused) == (0, 5)
    index = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert {row["source"] for row in index} == {"set[0:]"}
