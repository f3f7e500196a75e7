"""Conditions read a batch at a time are those of the data set that holds all, and bad files are named."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.reader import fingerprint, open_conditions
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter

T, E, C, COUNT = 4, 6, 3, 50


def write(folder, dtype=torch.float32):
    condition, target = torch.randn(COUNT, T, E).to(dtype), torch.randn(COUNT, T, C).to(dtype)
    writer = ShardWriter(folder, Meta(EncoderInfo("c", E), EncoderInfo("t", C), tokens=T))
    for number, rows in enumerate(torch.arange(COUNT).split(20)):
        names = [f"p{i}" for i in rows.tolist()]
        writer.write(number, condition[rows], target[rows], names, names, "made up")
    return folder


def gathered(reader, batch):
    count = len(reader.indices)
    return torch.cat([reader.read(start, min(start + batch, count)) for start in range(0, count, batch)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["all", "train", "eval"])
@pytest.mark.parametrize("num_samples", [None, 4])
def test_they_are_those_of_the_data_set_in_the_order_of_the_file(tmp_path, dtype, split, num_samples):
    folder = write(tmp_path / "e", dtype)
    data = EmbeddingDataset(folder, split=split, eval_split=0.3)
    reader = open_conditions(folder, split=split, eval_split=0.3, num_samples=num_samples)
    order = data.indices[:num_samples].argsort()
    assert torch.equal(reader.indices, data.indices[order])
    assert reader.keys == [data.keys[i] for i in order.tolist()] and reader.width == E
    for batch in (1, 7, 64):
        assert torch.equal(gathered(reader, batch), data.conditions[order])


def test_a_pickle_gives_the_same_pictures(tmp_path):
    data = EmbeddingDataset(write(tmp_path / "e"))
    arrays = {"eva_blip3o_embeddings": data.conditions.numpy(), "clip_blip3o_embeddings": data.targets.numpy()}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(arrays))
    shards, whole = (open_conditions(tmp_path / name, split="eval", eval_split=0.3) for name in ("e", "e.pkl"))
    assert torch.equal(shards.indices, whole.indices) and torch.equal(gathered(shards, 4), gathered(whole, 4))


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    folder = write(tmp_path / "e")
    before = fingerprint(folder)
    assert fingerprint(folder.rename(tmp_path / "moved")) == before
    shard = tmp_path / "moved" / "shard-00001.safetensors"
    tensors = load_file(shard)
    tensors["eva"][3, 0, 0] += 1
    save_file(tensors, shard)
    changed = fingerprint(tmp_path / "moved")
    index = tmp_path / "moved" / "index.jsonl"
    index.write_text(index.read_text().replace('"p1"', '"q1"'))
    assert len({before, changed, fingerprint(tmp_path / "moved")}) == 3


def test_bad_files_are_named(tmp_path):
    folder = write(tmp_path / "e")
    for split, eval_split, message in (("test", 0.1, "split: got 'test'"), ("eval", 0.01, "'eval' of the 50 pictures")):
        with pytest.raises(ValueError, match=message):
            open_conditions(folder, split=split, eval_split=eval_split)
    shard = folder / "shard-00001.safetensors"
    tensors = load_file(shard)
    save_file(tensors | {"eva": tensors["eva"].clone().index_fill_(0, torch.tensor(3), torch.nan)}, shard)
    reader = open_conditions(folder)
    reader.read(0, 23)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: condition has NaN or Inf in row 3"):
        reader.read(20, 30)
    save_file({"eva": tensors["eva"][:5].clone(), "clip": tensors["clip"]}, shard)
    with pytest.raises(ValueError, match=r"condition is F32 \[5, 4, 6\]; meta\.json and index\.jsonl say \[20, 4, 6\]"):
        open_conditions(folder).read(20, 30)
    shard.write_bytes(b"torn")
    with pytest.raises(ValueError, match="has no whole condition"):
        open_conditions(folder).read(0, 30)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors: no such file, but .* lists pictures of it"):
        open_conditions(folder)
    index = folder / "index.jsonl"
    index.write_text(index.read_text().replace('"row": 7', '"row": 6'))
    with pytest.raises(ValueError, match=r"rows of shard-00000\.safetensors are not 0\.\.19, each once"):
        open_conditions(folder)
