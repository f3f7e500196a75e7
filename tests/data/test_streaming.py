"""Shards that are never read whole: mapped rows, the block shuffle, the stream's state, bad shards, statistics."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip3o_fast.data.block_shuffle import BlockOrder, quality
from blip3o_fast.data.block_stream import BlockStream
from blip3o_fast.data.mapped import BadShardError, MappedShards
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.data.statistics import FOLDER, digest, fit_shards, fit_stream, stored_or_fitted
from blip3o_fast.models.normalizer import FeatureNormalizers

TOKENS, E, C, PER_SHARD, COUNT = 4, 6, 5, 20, 90


def write(folder: Path, dtype: torch.dtype = torch.float32, count: int = COUNT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.arange(1, C + 1)
    condition = (3 + torch.randn(count, TOKENS, E, generator=generator)).to(dtype)
    target = (100 + scales * torch.randn(count, TOKENS, C, generator=generator)).to(dtype)
    writer = ShardWriter(folder, Meta(EncoderInfo("c", E), EncoderInfo("t", C), TOKENS))
    for number, start in enumerate(range(0, count, PER_SHARD)):
        names = [f"key-{i}" for i in range(start, min(start + PER_SHARD, count))]
        part = slice(start, start + PER_SHARD)
        writer.write(number, condition[part], target[part], names, names, "made up")
    return condition, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_rows_in_the_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    condition, target = write(tmp_path, dtype)
    shards = MappedShards(tmp_path)
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:50]
    for some in (rows, torch.tensor([89, 0, 89, 19, 20]), torch.arange(3, 9)):
        part = shards.gather(some)
        assert part["eva"].dtype == part["clip"].dtype == dtype
        assert torch.equal(part["eva"], condition[some]) and torch.equal(part["clip"], target[some])
    assert shards.place(41) == (tmp_path / "shard-00002.safetensors", 1)
    shards.prefetch(rows)
    shards.close()
    with pytest.raises(ValueError, match="rows 0..89"):
        shards.gather(torch.tensor([90]))


def test_int8_comes_with_its_scales(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from blip3o_fast.data.stored import quantize, to_float

    condition, _ = write(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        sides = load_file(path)
        stored = {}
        for name, value in sides.items():
            stored[name], stored[f"{name}_scale"] = quantize(value)
        save_file(stored, path)
    part = MappedShards(tmp_path).gather(torch.tensor([70, 2]))
    assert part["eva"].dtype == torch.int8 and part["eva_scale"].shape == (2, TOKENS)
    close = to_float(part["eva"], part["eva_scale"])
    assert (close - condition[[70, 2]]).abs().max() <= condition.abs().max() / 254 + 1e-6


def test_only_pages_of_wanted_rows_are_read(tmp_path: Path) -> None:
    """64 MB in one shard; what the process itself holds afterwards is the rows and little more."""
    writer = ShardWriter(tmp_path, Meta(EncoderInfo("c", 256), EncoderInfo("t", 256), 16))
    names = [str(i) for i in range(2048)]
    big = torch.zeros(2048, 16, 256)
    writer.write(0, big, big.clone(), names, names, "made up")
    del big
    shards = MappedShards(tmp_path)
    shards.gather(torch.tensor([0]))
    before = anonymous_kb()
    for row in range(0, 2048, 64):
        shards.gather(torch.tensor([row, (row * 7) % 2048]))
    assert anonymous_kb() - before < 8192


def anonymous_kb() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("memory of a process is read from /proc, which is Linux's")
    return int(next(line for line in status.read_text().splitlines() if line.startswith("RssAnon")).split()[1])


# ---- bad shards ----------------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> str:
    from safetensors.torch import load_file, save_file

    path = folder / "shard-00001.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "header":
        path.write_bytes(b"\xff" * 64)
    else:
        sides = load_file(path)
        if how == "nan":
            sides["clip"][7, 2, 1] = float("nan")
        else:
            sides["eva"] = sides["eva"][:-1].clone()
        save_file(sides, path)
    return str(path)


BAD = {
    "missing": "found no such file",
    "truncated": "cannot be opened",
    "header": "cannot be opened",
    "nan": "expected finite clip, found NaN or Inf in row 7",
    "shape": r"expected eva \[20, 4, 6\], found \[19, 4, 6\]",
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_shard_stops_or_is_skipped_and_counted(tmp_path: Path, how: str) -> None:
    condition, _ = write(tmp_path)
    path = damage(tmp_path, how)
    rows = torch.tensor([0, 27, 60])
    with pytest.raises(BadShardError, match=BAD[how]) as told:
        MappedShards(tmp_path).gather(rows)
    assert path in str(told.value)
    skipping = MappedShards(tmp_path, on_bad_shard="skip")
    with pytest.warns(UserWarning, match="skipped"):
        part = skipping.gather(rows)
    assert torch.equal(part["eva"], condition[[0, 47, 60]])  # row 7 of the next shard stands for row 7 of the bad one
    assert skipping.replaced == 1 and list(skipping.bad) == ["shard-00001.safetensors"]


def test_all_shards_bad_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    write(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(BadShardError, match="found none that is whole"):
        MappedShards(tmp_path, on_bad_shard="skip").gather(torch.tensor([3]))


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "block", "window"), [(1000, 16, 5), (96, 32, 1), (7, 32, 256), (1, 1, 1), (65, 8, 3)])
def test_an_epoch_is_every_picture_once_and_any_position_is_found_directly(n: int, block: int, window: int) -> None:
    order = BlockOrder(n, 3, block=block, window=window)
    walked = order.pictures(0, 3 * n)
    for epoch in range(3):
        assert sorted(walked[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    for start in range(0, 3 * n, max(1, n // 9)):
        there = BlockOrder(n, 3, block=block, window=window).pictures(start, 5)
        assert torch.equal(there[: 3 * n - start], walked[start : start + 5])
    if n > 60:
        assert not torch.equal(walked[:n], walked[n : 2 * n])
        assert not torch.equal(walked[:n], BlockOrder(n, 4, block=block, window=window).pictures(0, n))


def test_a_window_stays_in_its_blocks() -> None:
    order = BlockOrder(4096, 0, block=16, window=8)
    for start in range(0, 4096, 128):
        assert len((order.pictures(start, 128) // 16).unique()) == 8


def test_shuffle_quality_against_a_full_shuffle() -> None:
    n = 32768
    full = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    ours = quality(BlockOrder(n, 0).pictures(0, n), 32, 64)
    theirs, none = quality(full, 32, 64), quality(torch.arange(n), 32, 64)
    assert abs(ours.displacement - 1 / 3) < 0.02 and abs(theirs.displacement - 1 / 3) < 0.01
    assert abs(ours.correlation) < 0.05 and none.correlation > 0.99
    assert theirs.same_block < 0.1 and ours.same_block < 0.3 and none.same_block == 1


def test_the_stream_is_the_same_for_any_number_of_ranks_and_continues_in_mid_epoch(tmp_path: Path) -> None:
    condition, _ = write(tmp_path)
    kind = {"seed": 5, "block": 4, "window": 3}
    one = iter(BlockStream(tmp_path, batch_size=12, **kind))
    whole = [next(one) for _ in range(20)]  # 2.7 epochs
    assert torch.equal(whole[3]["eva"], condition[whole[3]["index"]])
    ranks = [iter(BlockStream(tmp_path, batch_size=4, rank=r, world_size=3, **kind)) for r in range(3)]
    for step in whole:
        assert torch.equal(torch.cat([next(rank)["index"] for rank in ranks]), step["index"])

    stream = BlockStream(tmp_path, batch_size=12, **kind)
    for _, batch in zip(range(4), stream, strict=False):
        last = batch
    assert torch.equal(last["index"], whole[3]["index"])
    state = stream.state_dict()
    for other in (BlockStream(tmp_path, batch_size=12, **kind), stream):
        other.load_state_dict(state)
        assert torch.equal(next(iter(other))["index"], whole[4]["index"])
    with pytest.raises(ValueError, match="seed: 5, here 6"):
        BlockStream(tmp_path, batch_size=12, **kind | {"seed": 6}).load_state_dict(state)


def test_too_few_blocks_for_the_ranks_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="90 training pictures, 3 blocks of 32 in 5 shards, are too few for 4 proc"):
        BlockStream(tmp_path, batch_size=1, rank=0, world_size=4)


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["none", "standardize", "l2", "pca:3"])
def test_streamed_statistics_equal_the_fit_in_memory(tmp_path: Path, spec: str) -> None:
    condition, target = write(tmp_path)
    rows = torch.arange(0, COUNT, 2)
    wanted = FeatureNormalizers.fit(condition[rows], target[rows], spec)
    chunks = zip(condition[rows].split(7), target[rows].split(7), strict=True)
    for given in (fit_shards(MappedShards(tmp_path), rows, spec), fit_stream(chunks, spec, (E, C))):
        for side in ("condition", "target"):
            mine, theirs = getattr(given, side).statistics, getattr(wanted, side).statistics
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)


def test_statistics_are_stored_with_the_data_and_renewed_when_it_changes(tmp_path: Path) -> None:
    write(tmp_path)
    split: dict[str, object] = {"rule": "hash", "eval_split": 0.1}
    rows = torch.arange(COUNT)
    shards = MappedShards(tmp_path)
    first = stored_or_fitted(shards, rows, "standardize", split)
    stored = tmp_path / FOLDER / digest(shards, "standardize", split) / "normalizer.safetensors"
    assert stored.is_file()
    written = stored.stat().st_mtime_ns
    again = stored_or_fitted(shards, rows, "standardize", split)
    assert torch.equal(first.target.statistics["mean"], again.target.statistics["mean"])
    assert stored.stat().st_mtime_ns == written
    names = {digest(shards, spec, split | more) for spec in ("l2", "pca:2") for more in ({}, {"eval_split": 0.2})}
    assert len(names) == 4 and digest(shards, "standardize", split) not in names

    from safetensors.torch import load_file, save_file

    path = tmp_path / "shard-00003.safetensors"
    sides = load_file(path)
    sides["clip"] += 50
    save_file(sides, path)
    other = stored_or_fitted(MappedShards(tmp_path), rows, "standardize", split)
    assert (other.target.statistics["mean"] - first.target.statistics["mean"]).min() > 5
