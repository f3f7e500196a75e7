"""The written cost of a data set against counts by hand; the loading benchmark runs, small, and its readers agree."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data_cost, loading


def test_bytes_and_hours_follow_from_the_assumptions():
    assert data_cost.sample_bytes("bf16") == 64 * 2048 * 2 == 262_144
    assert data_cost.sample_bytes("int8") == 64 * 2048 + 2 * 64 * 4
    c = data_cost.costs(60_000_000, 8, "bf16", 0.55, 0.5)
    assert c.disk_bytes / 1e12 == pytest.approx(15.74, abs=0.01)
    assert 1150 < c.samples_per_second < 1250 and 9 < c.ratio < 11
    twice = data_cost.costs(60_000_000, 16, "bf16", 0.55, 0.5)
    assert twice.epoch_hours == pytest.approx(c.epoch_hours / 2) and twice.feed == pytest.approx(2 * c.feed)
    assert "15.7" in "\n".join(data_cost.table(60_000_000, 8, 0.55, 0.5))


@pytest.mark.slow
def test_two_flops_a_weight_and_token_is_what_torch_counts():
    """Of a small vision transformer of transformers' CLIP, but for attention's own products, a few percent."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4
    )
    model = CLIPVisionModel(config).eval()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "position" not in n)
    written = 2 * weights * 65
    assert written <= counted.get_total_flops() * 1.01 and counted.get_total_flops() < 1.15 * written


@pytest.mark.parametrize("bad", [["--samples", "0"], ["--mfu", "1.5"]])
def test_costs_of_nothing_are_refused(bad, capsys):
    with pytest.raises(SystemExit):
        data_cost.main(bad)
    assert "at least 1" in capsys.readouterr().err


def test_readers_deliver_the_same_samples(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(loading, "BATCH", 4)
    monkeypatch.setattr(loading, "TOKENS", 2)
    shards = loading.write(tmp_path / "shards", 40, (2, 6, 4), 16)
    (tmp_path / "pickle").mkdir()
    loading.write_pickle(shards, tmp_path / "pickle")
    readers = [
        lambda: loading.ours(shards, 40),
        lambda: loading.loader(shards, 40, 0),
        lambda: loading.whole_files(shards),
        lambda: loading.from_pickle(tmp_path / "pickle"),
    ]
    sums = []
    for read in readers:
        batches = [(c.double().sum(), t.double().sum()) for c, t in read()]
        assert loading.timed(read, started=False)[0] == 40 and loading.timed(read, started=True)[0] == 36
        sums.append([float(sum(side)) for side in zip(*batches, strict=True)])
    assert all(given == pytest.approx(sums[0], abs=1e-9) for given in sums[1:])
    loading.forget(shards)
    assert torch.get_num_threads() == threads


def test_memory_and_shuffle_print_what_they_measured(capsys, tmp_path):
    loading.memory(tmp_path, 2000)
    loading.shuffle(16_384)
    printed = capsys.readouterr().out
    assert "after   2,000 of 2,000 samples" in printed and "peak RSS" in printed and "| 32 x 256 |" in printed


@pytest.mark.slow
def test_memory_is_flat_over_100_000_samples(capsys, tmp_path):
    loading.memory(tmp_path, 100_000)
    held = [float(line.split()[-3]) for line in capsys.readouterr().out.splitlines() if line.startswith("after")]
    assert len(held) == 3 and held[2] - held[1] < 8
