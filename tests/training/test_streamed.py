"""Training on a folder that is never taken into memory: same numbers on the device, same batches, same end."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from blip3o_fast.data.mapped import BadShardError
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.training import checkpoints, prepare, streamed
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.run import train

PICTURES, PER_SHARD, TOKENS, CONDITION, TARGET = 80, 16, 4, 6, 5
SMALL = {
    "model_dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "batch_size": 4, "learning_rate": 1e-2,
    "max_steps": 6, "save_steps": 3, "logging_steps": 1, "eval_steps": 6, "eval_generation_samples": 2,
    "num_inference_steps": 2, "normalize": "standardize", "no_wandb": True, "device": "cpu", "loading": "stream",
    "split": "hash",
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards in bfloat16."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    condition = (1 + torch.randn(PICTURES, TOKENS, CONDITION, generator=generator)).bfloat16()
    target = (5 + 3 * torch.randn(PICTURES, TOKENS, TARGET, generator=generator)).bfloat16()
    writer = ShardWriter(folder, Meta(EncoderInfo("c", CONDITION), EncoderInfo("t", TARGET), TOKENS))
    for number, start in enumerate(range(0, PICTURES, PER_SHARD)):
        part = slice(start, start + PER_SHARD)
        names = [f"picture-{i}" for i in range(PICTURES)[part]]
        writer.write(number, condition[part], target[part], names, names, "made up")
    return folder


@pytest.fixture
def settings(shards, tmp_path):
    def make(**changes):
        changes = SMALL | changes
        return TrainSettings(changes.pop("embeddings_path", shards), tmp_path / changes.pop("name", "run"), **changes)

    return make


def test_the_views_hold_what_memory_would(settings):
    view = prepare.load_data(settings())
    memory = prepare.load_data(settings(loading="memory"))
    assert len(view.held_out_conditions) and view.describe()["train"] == memory.describe()["train"]
    # In memory, too, the hash split leaves the pictures in the order of the file.
    for side in ("conditions", "targets", "held_out_conditions", "held_out_targets"):
        mine, theirs = getattr(view, side), getattr(memory, side)
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine[torch.arange(len(theirs))], theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(view.raw_mean, memory.raw_mean)
    assert view.checksum == memory.checksum
    other = prepare.load_data(settings(), normalizer=memory.normalizer)
    assert other.normalizer is memory.normalizer


def make_batches(data, settings, world_size, batch_size):
    order = streamed.order_for(data.conditions, settings.seed)
    return [
        streamed.batches(data.conditions, data.targets, order, batch_size, rank=r, world_size=world_size, workers=0)
        for r in range(world_size)
    ]


def test_stored_bytes_travel_and_become_the_networks_numbers_on_the_device(settings):
    data = prepare.load_data(settings())
    (stream,) = make_batches(data, settings(), 1, 8)
    batch = stream[3]
    assert batch["encoder_hidden_states"].dtype == batch["target"].dtype == torch.bfloat16
    target, condition = streamed.to_network(batch, data.conditions, data.targets)
    pictures = stream.order.pictures(24, 8)
    assert target.dtype == torch.float32 and batch["sample_index"] == 24
    torch.testing.assert_close(target, data.targets[pictures])
    torch.testing.assert_close(condition, data.conditions[pictures])


def test_ranks_share_one_stream(settings):
    data = prepare.load_data(settings())
    (alone,), both = make_batches(data, settings(), 1, 8), make_batches(data, settings(), 2, 4)
    for step in (0, 7, 31):
        halves = torch.cat([stream[step]["target"] for stream in both])
        assert torch.equal(halves, alone[step]["target"])
    with pytest.raises(ValueError, match="too few for 9 processes of 4 pictures"):
        make_batches(data, settings(), 9, 4)


def test_a_streamed_run_cut_off_goes_on_to_the_same_end_with_and_without_workers(settings, tmp_path):
    whole = settings()
    train(whole)
    cut = settings(name="cut", num_workers=1)
    for name in ("run.json", "metrics.jsonl", "checkpoint-3"):
        source = whole.output_dir / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, _made(cut.output_dir) / name)
    run = json.loads((cut.output_dir / "run.json").read_text())
    (cut.output_dir / "run.json").write_text(json.dumps(run | {"status": "running"}))
    cut.resume_from_checkpoint = "auto"
    train(cut)
    first, second = (load_file(s.output_dir / "model.safetensors") for s in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [e["loss"] for e in checkpoints.read_metrics(whole.output_dir / "metrics.jsonl") if "loss" in e]
    assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_a_bad_shard_stops_the_run_or_is_skipped_and_counted(settings, shards, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged, ignore=shutil.ignore_patterns("statistics"))
    path = damaged / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadShardError, match="shard-00002.safetensors: expected a whole safetensors file"):
        train(settings(embeddings_path=damaged))
    with pytest.warns(UserWarning, match="its pictures are skipped"):
        train(settings(embeddings_path=damaged, name="skipping", on_bad_shard="skip"))
    entries = checkpoints.read_metrics(tmp_path / "skipping" / "metrics.jsonl")
    assert [e["replaced_pictures"] for e in entries if "replaced_pictures" in e][-1] > 0
    assert not (damaged / "statistics").exists()  # those of a damaged set are not kept


def test_only_a_folder_is_streamed_and_only_a_large_one_by_itself(settings, shards, tmp_path, monkeypatch):
    assert not streamed.is_streamed(settings(loading="auto"))
    monkeypatch.setattr("blip3o_fast.data.splits.LARGE", 100)
    assert streamed.is_streamed(settings(loading="auto")) and not streamed.is_streamed(settings(loading="memory"))
    assert settings(split="auto").split_rule() == "hash"
    with pytest.raises(ValueError, match="--loading stream: .* is not a folder of shards"):
        prepare.load_data(settings(embeddings_path=tmp_path / "some.pkl"))
    with pytest.raises(ValueError, match="--loading must be one of auto, memory, stream"):
        settings(loading="disk").check()


@pytest.mark.parametrize("loading", ["stream", "memory"])
def test_a_rule_of_ones_own_is_told(settings, capsys, loading):
    prepare.load_data(settings(loading=loading))
    assert "note: --split hash, but the set's own rule is random" in capsys.readouterr().out
    data = prepare.load_data(settings(split="random", subset_size=20, loading=loading, on_bad_shard="skip"))
    told = capsys.readouterr().out
    assert len(data.conditions) == 20 and "note: --split" not in told
    assert ("--on_bad_shard skip has no effect" in told) == (loading == "memory")


def test_a_streamed_run_that_diverges_names_pictures_and_the_op(settings):
    """The step that is computed again goes through the same normalisation as the one that was bad."""
    diverging = settings(normalize="pca:3", learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0, max_bad_steps=1)
    with pytest.raises(ValueError, match="computed again") as error:
        train(diverging)
    message = str(error.value)
    assert "not possible" not in message and "op: first" in message
    assert "samples: picture-" in message
