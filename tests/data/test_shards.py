"""Shards: whole or absent, continued only by the same encoders, and every damage named."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_fast.data import stored
from blip3o_fast.data.reader import open_conditions
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter, read_index, read_meta, read_shards, shard_name

META = Meta(
    EncoderInfo("eva", 6, revision="abc", tower="vision", preprocessing="224 bicubic", pooling="16x16 -> 8x8"),
    EncoderInfo("clip", 3),
    tokens=4,
)


def features(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 6, generator=generator), torch.randn(count, 4, 3, generator=generator)


def make(folder: Path, counts: tuple[int, ...] = (3, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    writer = ShardWriter(folder, META)
    made = [features(count, number) for number, count in enumerate(counts)]
    for number, (condition, target) in enumerate(made):
        keys = [f"{number}-{i}" for i in range(len(condition))]
        captions = [f'caption "{key}"\n🐸' for key in keys]
        writer.write(number, condition, target, keys, captions, f"{number:05d}.tar", {"note": str(number)})
    return torch.cat([c for c, _ in made]), torch.cat([t for _, t in made])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    condition, target = make(tmp_path / "new" / "folder")
    read = read_shards(tmp_path / "new" / "folder")
    assert torch.equal(read.condition, condition) and torch.equal(read.target, target)
    assert read.keys == ["0-0", "0-1", "0-2", "1-0", "1-1"]
    assert read.captions[0] == 'caption "0-0"\n🐸'
    assert read.meta == META
    found = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert found == ["index.jsonl", "meta.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert [asdict(row) for row in read_index(tmp_path / "new" / "folder")][3] == {
        "key": "1-0",
        "caption": 'caption "1-0"\n🐸',
        "shard": "shard-00001.safetensors",
        "row": 0,
        "source": "00001.tar",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_on_disk_and_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    condition, target = features(2)
    ShardWriter(tmp_path, META).write(0, condition.to(dtype), target.to(dtype), ["a", "b"], ["", ""], "x")
    assert load_file(tmp_path / shard_name(0))["eva"].dtype == dtype
    read = read_shards(tmp_path)
    assert read.condition.dtype == torch.float32
    assert torch.equal(read.condition, condition.to(dtype).float())


def test_shards_of_older_versions_are_read(tmp_path: Path) -> None:
    condition, target = make(tmp_path)
    for path in sorted(tmp_path.glob("shard-*")):
        old = {"condition": load_file(path)["eva"], "target": load_file(path)["clip"]}
        save_file(old, tmp_path / path.name.replace("-", "_"))
        path.unlink()
    index = tmp_path / "index.jsonl"
    index.write_text(index.read_text().replace("shard-", "shard_"))
    read = read_shards(tmp_path)
    assert torch.equal(read.condition, condition) and torch.equal(read.target, target)
    assert torch.equal(open_conditions(tmp_path).read(1, 4), condition[1:4])


def test_both_sides_may_be_one_tensor(tmp_path: Path) -> None:
    condition, _ = features(2)
    meta = Meta(META.condition, META.condition, 4)
    ShardWriter(tmp_path, meta).write(0, condition, condition, ["a", "b"], ["", ""], "s")
    assert torch.equal(read_shards(tmp_path).target, condition)


def test_rows_may_be_listed_in_any_order(tmp_path: Path) -> None:
    condition, _ = make(tmp_path)
    lines = (tmp_path / "index.jsonl").read_text().splitlines()
    order = [4, 0, 3, 2, 1]
    (tmp_path / "index.jsonl").write_text("".join(lines[i] + "\n" for i in order))
    read = read_shards(tmp_path)
    assert torch.equal(read.condition, condition[torch.tensor(order)])
    assert read.keys[0] == "1-1"


def test_continuing(tmp_path: Path) -> None:
    make(tmp_path, (3,))
    writer = ShardWriter(tmp_path, META)
    header = writer.header(shard_name(0))
    assert header is not None and header["note"] == "0"
    assert writer.header(shard_name(1)) is None
    condition, target = features(2, 5)
    writer.write(1, condition, target, ["x", "y"], ["", ""], "s")
    assert read_shards(tmp_path).keys == ["0-0", "0-1", "0-2", "x", "y"]
    writer.write(0, condition, target, ["p", "q"], ["", ""], "s")  # writing again replaces
    assert read_shards(tmp_path).keys == ["p", "q", "x", "y"]


def test_an_interruption_leaves_only_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, (3,))
    condition, target = features(2, 5)
    real = os.replace
    for survives in range(3):  # interrupted before each rename: the shard's, the index's, then none
        left = [survives]

        def replace_some(a, b, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(a, b)

        monkeypatch.setattr(stored.os, "replace", replace_some)
        writer = ShardWriter(tmp_path, META)
        if survives < 2:
            with pytest.raises(KeyboardInterrupt):
                writer.write(1, condition, target, ["x", "y"], ["", ""], "s")
            assert len(read_shards(tmp_path).keys) == 3
            assert ShardWriter(tmp_path, META).header(shard_name(1)) is None
        else:
            writer.write(1, condition, target, ["x", "y"], ["", ""], "s")
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert len(read_shards(tmp_path).keys) == 5


def test_a_truncated_shard_is_not_whole(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:-5])
    assert ShardWriter(tmp_path, META).header(shard_name(1)) is None
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: not a whole safetensors file"):
        read_shards(tmp_path)
    path.unlink()
    assert ShardWriter(tmp_path, META).header(shard_name(1)) is None
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors: no such file, but the index lists 2"):
        read_shards(tmp_path)


def test_other_encoders_do_not_mix(tmp_path: Path) -> None:
    make(tmp_path)
    for other in (
        replace(META, condition=replace(META.condition, revision="def")),
        replace(META, target=replace(META.target, pooling="none")),
        replace(META, tokens=16),
    ):
        with pytest.raises(ValueError, match=r"holds features of .* asked for .* choose another output folder"):
            ShardWriter(tmp_path, other)
    assert len(read_shards(tmp_path).keys) == 5
    other = replace(META, target=replace(META.target, pooling="none"))
    writer = ShardWriter(tmp_path, other, overwrite=True)
    assert os.listdir(tmp_path) == ["meta.json"] and read_meta(tmp_path) == other and writer.rows == {}


def test_dropping_shards(tmp_path: Path) -> None:
    make(tmp_path)
    ShardWriter(tmp_path, META).drop([shard_name(0)])
    assert read_shards(tmp_path).keys == ["1-0", "1-1"]
    assert sorted(os.listdir(tmp_path)) == ["index.jsonl", "meta.json", "shard-00001.safetensors"]


def test_bad_features_are_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, META)
    condition, target = features(2)
    bad = condition.clone()
    bad[1, 2, 3] = float("nan")

    def refused(match: str, c: torch.Tensor, t: torch.Tensor, keys: tuple[str, ...] = ("a", "b")) -> None:
        with pytest.raises(ValueError, match=match):
            writer.write(0, c, t, list(keys), list(keys), "s")

    refused("condition has NaN or Inf in row 1", bad, target)
    refused(r"target has the shape \(2, 4, 6\); \[n, 4, 3\] is needed", condition, condition)
    refused(
        "condition is torch.float64; allowed are torch.float32, torch.float16, torch.b",
        condition.double(),
        target,
    )
    refused(r"\(2, 2, 1, 1\) conditions, targets, keys", condition, target, ("a",))
    assert os.listdir(tmp_path) == ["meta.json"]


def test_damaged_folders(tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=match):
            read_shards(tmp_path)

    refused("meta.json: no such file; a folder of features has", FileNotFoundError)
    ShardWriter(tmp_path, META)
    refused("index.jsonl: no such file", FileNotFoundError)
    (tmp_path / "index.jsonl").write_text("")
    refused("index.jsonl: lists no picture")
    condition, target = make(tmp_path)
    index, path = tmp_path / "index.jsonl", tmp_path / shard_name(0)
    good = index.read_text()
    lines = good.splitlines()

    index.write_text(good + "{oops\n")
    refused("index.jsonl, line 6: not JSON")
    index.write_text(good + '{"key": "a"}\n')
    refused('index.jsonl, line 6: found {"key": "a"}; needed are key, caption, shard, row, source')
    for name in ("../secret.safetensors", "/etc/passwd", "shard_0.safetensors", "shard-00000.pkl"):
        index.write_text(json.dumps({**json.loads(lines[0]), "shard": name}) + "\n")
        refused("shard-00000.safetensors is allowed")
    index.write_text("\n".join([lines[0], *lines]) + "\n")
    refused(r"rows of shard-00000.safetensors are not 0..3, each once")
    index.write_text("\n".join(lines[:2]) + "\n")
    refused("condition has 3 pictures; the index lists 2")
    index.write_text(good)

    def put(**tensors: torch.Tensor) -> None:
        save_file(tensors, path)

    put(condition=condition[:3])
    refused(r"holds the tensors \['condition'\]; eva and clip \(or condition and target")
    put(condition=condition[:3], target=target[:3], more=target[:3].clone())
    refused("'more', 'target'")
    put(condition=condition[:3], target=target[:2])
    refused("target has 2 pictures; the index lists 3")
    put(condition=condition[:3].long(), target=target[:3])
    refused("condition is torch.int64")
    put(condition=condition[:3, :3].contiguous(), target=target[:3])
    refused(r"condition has the shape \(3, 3, 6\); \[n, 4, 6\]")
    put(condition=torch.full((3, 4, 6), torch.inf), target=target[:3])
    refused("condition has NaN or Inf in row 0")


def test_damaged_meta(tmp_path: Path) -> None:
    good = asdict(META)

    def refused(match: str, data: object) -> None:
        (tmp_path / "meta.json").write_text(data if isinstance(data, str) else json.dumps(data))
        with pytest.raises(ValueError, match=match) as caught:
            read_meta(tmp_path)
        assert "meta.json" in str(caught.value)

    refused("not JSON", "{")
    refused("found a list", [])
    refused("format_version 2; this version reads 1", {**good, "format_version": 2})
    refused("tokens is 0", {**good, "tokens": 0})
    refused("'target' has a NoneType", {**good, "target": None})
    refused("needed are name and dim", {**good, "target": {"name": "x"}})
    refused("allowed also revision, tower", {**good, "target": {**good["target"], "extra": ""}})
    for dim in (0, 1.5, True, "6"):
        refused("target.dim is", {**good, "target": {"name": "x", "dim": dim}})
    refused("target.name is 7", {**good, "target": {"name": 7, "dim": 6}})
