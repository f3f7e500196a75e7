"""`EmbeddingDataset` over shards and over the original project's pickle."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from blip3o_fast.data import EmbeddingDataset, UnsafePickleError, collate
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.data.splits import split_indices
from blip3o_fast.models.normalizer import FeatureNormalizers

COUNT, TOKENS, E, C = 23, 4, 6, 5


@pytest.fixture(scope="module")
def raw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    condition = torch.randn(COUNT, TOKENS, E, generator=generator) * torch.arange(1.0, E + 1) + 3
    target = torch.randn(COUNT, TOKENS, C, generator=generator) @ torch.randn(C, C, generator=generator)
    return condition, target


@pytest.fixture(scope="module", params=["shards", "pickle of arrays", "pickle of tensors"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, raw) -> Path:
    condition, target = raw
    folder = tmp_path_factory.mktemp("features")
    keys, captions = [f"k{i}" for i in range(COUNT)], [f"caption {i}" for i in range(COUNT)]
    if request.param == "shards":
        writer = ShardWriter(folder, Meta(EncoderInfo("eva", E), EncoderInfo("clip", C), TOKENS))
        for number, (a, b) in enumerate(((0, 10), (10, COUNT))):
            writer.write(number, condition[a:b], target[a:b], keys[a:b], captions[a:b], "s")
        return folder
    sides = (condition, target) if "tensors" in request.param else (condition.numpy(), target.double().numpy())
    data = {
        "eva_blip3o_embeddings": sides[0],
        "clip_blip3o_embeddings": sides[1],
        "captions": captions,
        "keys": keys,
        "config": {"pooling": "avg"},
        "clip_grid_embeddings": np.zeros((COUNT, 2, 2, C), np.float32),
        "total_samples": COUNT,
    }
    (folder / "grid.pkl").write_bytes(pickle.dumps(data))
    return folder / "grid.pkl"


def test_items(path: Path, raw) -> None:
    condition, target = raw
    dataset = EmbeddingDataset(path)
    assert len(dataset) == COUNT
    item = dataset[7]
    assert torch.equal(item["encoder_hidden_states"], condition[7]) and torch.equal(item["target"], target[7])
    assert (item["index"], item["key"], item["caption"]) == (7, "k7", "caption 7")
    assert item["target"].dtype == torch.float32
    assert torch.equal(dataset.conditions, condition) and torch.equal(dataset.targets, target)
    assert dataset.config is not None


def test_split_is_the_original_scripts(path: Path, raw) -> None:
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(42))
    cut = COUNT - int(COUNT * 0.3)
    train = EmbeddingDataset(path, split="train", eval_split=0.3)
    held_out = EmbeddingDataset(path, split="eval", eval_split=0.3)
    assert train.indices.tolist() == order[:cut].tolist()
    assert held_out.indices.tolist() == order[cut:].tolist()
    assert torch.equal(held_out.targets, raw[1][order[cut:]])
    assert [held_out[i]["key"] for i in range(len(held_out))] == [f"k{i}" for i in order[cut:].tolist()]
    other = EmbeddingDataset(path, split="eval", eval_split=0.3, seed=1)
    assert other.indices.tolist() != held_out.indices.tolist()


def test_subset_comes_after_the_split(path: Path) -> None:
    train = EmbeddingDataset(path, split="train")
    some = EmbeddingDataset(path, split="train", subset=5)
    second = torch.randperm(len(train), generator=torch.Generator().manual_seed(42))[:5]
    assert some.indices.tolist() == train.indices[second].tolist()
    assert len(some) == len(some.keys) == len(some.captions) == len(some.targets) == 5


@pytest.mark.parametrize("spec", ["standardize", "l2", "pca:2"])
def test_statistics_come_from_the_train_split_only(path: Path, raw, spec: str) -> None:
    condition, target = raw
    rows, held_out = split_indices(COUNT, 0.3)
    wanted = FeatureNormalizers.fit(condition[rows], target[rows], spec)
    for split, subset in (("train", None), ("train", 3), ("eval", None), ("eval", 2), ("all", None)):
        dataset = EmbeddingDataset(path, split=split, eval_split=0.3, normalize=spec, subset=subset)
        assert torch.equal(dataset.targets, wanted.target(target[dataset.indices]))
        assert torch.equal(dataset.conditions, wanted.condition(condition[dataset.indices]))
    assert dataset.targets.shape[-1] == dataset.normalizer.target.out_features
    assert dataset.normalizer.condition.spec == {"pca:2": "standardize"}.get(spec, spec)
    # and those of the held-out pictures really differ
    leaked = FeatureNormalizers.fit(condition, target, spec)
    y = wanted.target(target[held_out])
    assert not torch.allclose(leaked.target.inverse(y), wanted.target.inverse(y), atol=1e-3)


def test_splits_reads_once_and_equals_two_readings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blip3o_fast.data import dataset as module

    readings = []
    real = module._load
    monkeypatch.setattr(module, "_load", lambda p: readings.append(p) or real(p))
    train, held_out = EmbeddingDataset.splits(path, eval_split=0.3, normalize="pca:3", subset=4)
    assert len(readings) == 1 and held_out is not None
    a = EmbeddingDataset(path, split="train", eval_split=0.3, normalize="pca:3", subset=4)
    b = EmbeddingDataset(path, split="eval", eval_split=0.3, normalize="pca:3")
    assert torch.equal(train.targets, a.targets) and torch.equal(held_out.targets, b.targets)
    assert (train.keys, held_out.keys) == (a.keys, b.keys)
    assert held_out.normalizer is train.normalizer
    assert EmbeddingDataset.splits(path, eval_split=0)[1] is None


def test_a_models_own_normalizer_is_used_as_it_is(path: Path, raw) -> None:
    condition, target = raw
    pair = FeatureNormalizers.fit(condition * 2, target * 2, "pca:3")
    dataset = EmbeddingDataset(path, split="eval", normalize=pair)
    assert dataset.normalizer is pair
    assert torch.equal(dataset.targets, pair.target(target[dataset.indices]))
    with pytest.raises(ValueError, match=r"made for features of \(5, 5\) channels; .* has \(6, 5\)"):
        EmbeddingDataset(path, normalize=FeatureNormalizers.fit(target, target, "standardize"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(path: Path, raw, workers: int) -> None:
    loader = DataLoader(EmbeddingDataset(path), batch_size=10, collate_fn=collate, num_workers=workers)
    batches = list(loader)
    assert [len(b["key"]) for b in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([b["target"] for b in batches]), raw[1])
    assert torch.equal(torch.cat([b["encoder_hidden_states"] for b in batches]), raw[0])
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(COUNT))
    assert batches[0]["index"].dtype == torch.int64
    with pytest.raises(ValueError, match="items: got none"):
        collate([])


def test_bad_arguments_are_refused_before_the_file_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for arguments, match in (
        ({"split": "test"}, "split: got 'test'; allowed are 'all', 'train', 'eval'"),
        ({"eval_split": 1.0}, r"eval_split: got 1.0; a share in \[0, 1\)"),
        ({"eval_split": -0.1}, "eval_split: got -0.1"),
        ({"eval_split": "0.1"}, "eval_split: got '0.1'"),
        ({"normalize": "zscore"}, "normalize: got 'zscore'; allowed are 'none'"),
        ({"subset": 0}, "subset: got 0"),
        ({"subset": 2.5}, "subset: got 2.5"),
    ):
        with pytest.raises(ValueError, match=match):
            EmbeddingDataset(missing, **arguments)
    with pytest.raises(FileNotFoundError, match="missing: no such file or folder; allowed are a folder made by"):
        EmbeddingDataset(missing)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    with pytest.raises(FileNotFoundError, match=r"a folder without meta.json \(it holds a.png\)"):
        EmbeddingDataset(tmp_path / "pictures")


def test_impossible_splits_and_subsets(path: Path) -> None:
    with pytest.raises(ValueError, match="'eval' of the 23 pictures .* is empty with eval_split=0.01"):
        EmbeddingDataset(path, split="eval", eval_split=0.01)
    with pytest.raises(ValueError, match="subset: got 24; the 'all' split of .* has only 23"):
        EmbeddingDataset(path, subset=24)


def test_bad_pickles(tmp_path: Path) -> None:
    file = tmp_path / "bad.pkl"
    good = {
        "eva_blip3o_embeddings": np.ones((2, 3, 4), np.float32),
        "clip_blip3o_embeddings": np.ones((2, 3, 5), np.float32),
    }

    def refused(data: object, match: str, kind: type[Exception] = ValueError) -> None:
        file.write_bytes(pickle.dumps(data))
        with pytest.raises(kind, match=match) as caught:
            EmbeddingDataset(file)
        assert "bad.pkl" in str(caught.value)

    refused([1], "holds a list; a dict with 'eva_blip3o_embeddings'")
    refused({"eva": 1}, r"holds \['eva'\]")
    refused({**good, "clip_blip3o_embeddings": "text"}, "clip_blip3o_embeddings is a str")
    refused({**good, "clip_blip3o_embeddings": np.array(["a"])}, "is a array of <U1")
    refused({**good, "clip_blip3o_embeddings": np.ones((2, 3), np.float32)}, r"has the shape \(2, 3\)")
    refused({**good, "clip_blip3o_embeddings": np.ones((3, 3, 5), np.float32)}, "2 conditions and 3 targets")
    refused({**good, "clip_blip3o_embeddings": np.full((2, 3, 5), np.nan)}, "NaN or Inf in row 0")
    refused({**good, "captions": ["a"]}, "captions has 1 entries; a list of 2")
    refused({**good, "keys": "ab"}, "keys has a str; a list of 2")
    shared: list = ["a"]
    for _ in range(60):
        shared = [shared, shared]  # as text, 2^60 letters
    refused({**good, "captions": [shared, shared]}, "captions holds a list; text or numbers are needed")
    refused({**good, "captions": print}, "it asks for 'builtins.print'", UnsafePickleError)
    file.write_bytes(pickle.dumps(good))
    dataset = EmbeddingDataset(file)
    assert (dataset.keys, dataset.captions) == (["key_0", "key_1"], ["sample_0", "sample_1"])
    dataset.targets[0] = 7.0  # the features are the dataset's own memory
