"""Who is held out: stable by hash when data is added, the original's order for pickles, one rule for all readers."""

from pathlib import Path

import pytest
import torch

from blip3o_fast.data import EmbeddingDataset, splits
from blip3o_fast.data.reader import open_conditions
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.data.splits import default_rule, hash_split, held_out_by_hash


def test_a_picture_keeps_its_side_when_data_is_added() -> None:
    keys = [f"picture-{i}" for i in range(20_000)]
    before = {keys[i] for i in hash_split(keys, 0.1)[1].tolist()}
    mixed = [keys[i] for i in torch.randperm(len(keys)).tolist()] + [f"new-{i}" for i in range(5000)]
    after = {mixed[i] for i in hash_split(mixed, 0.1)[1].tolist()}
    assert before == {key for key in after if not key.startswith("new")}
    assert 0.09 < len(before) / len(keys) < 0.11
    assert before < {key for key in keys if held_out_by_hash(key, 0.2)}  # a larger share only adds


def test_the_hash_is_blake2b_for_ever() -> None:
    # python3 -c "import hashlib; print(hashlib.blake2b(b'a', digest_size=8).hexdigest())" -> 40f89e395b66422f
    share = 0x40F89E395B66422F / 2**64
    assert held_out_by_hash("a", share + 1e-9) and not held_out_by_hash("a", share - 1e-9)


def folder(path: Path, rule: str | None) -> Path:
    path.mkdir()
    writer = ShardWriter(path, Meta(EncoderInfo("c", 3), EncoderInfo("t", 2), 1))
    keys = [f"k{i}" for i in range(60)]
    writer.write(0, torch.arange(180.0).view(60, 1, 3), torch.zeros(60, 1, 2), keys, keys, "made up")
    if rule is not None:
        (path / "split.json").write_text(rule)
    return path


def test_every_reader_follows_the_rule_of_the_set(tmp_path: Path) -> None:
    wanted = hash_split([f"k{i}" for i in range(60)], 0.3)[1].tolist()
    hashed = folder(tmp_path / "hash", '{"rule": "hash"}')
    assert EmbeddingDataset(hashed, split="eval", eval_split=0.3).indices.tolist() == wanted
    assert open_conditions(hashed, split="eval", eval_split=0.3).indices.tolist() == wanted
    train, held_out = EmbeddingDataset.splits(hashed, eval_split=0.3)
    assert held_out is not None and not set(train.keys) & set(held_out.keys)
    plain = folder(tmp_path / "random", None)
    assert default_rule(plain) == "random"
    assert EmbeddingDataset(plain, split="eval", eval_split=0.3).indices.tolist() != wanted
    assert EmbeddingDataset(plain, split="eval", eval_split=0.3, split_by="hash").indices.tolist() == wanted


def test_a_large_folder_is_split_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = folder(tmp_path / "set", None)
    monkeypatch.setattr(splits, "LARGE", 100)
    assert default_rule(plain) == "hash"


@pytest.mark.parametrize("text", ['{"rule": "hsah"}', "[]", "{", '{"rules": "hash"}'])
def test_a_bad_rule_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    bad = folder(tmp_path / "set", text)
    with pytest.raises(ValueError, match=r"split\.json"):
        EmbeddingDataset(bad)
    with pytest.raises(ValueError, match="split_by"):
        EmbeddingDataset(bad, split_by="sorted")
