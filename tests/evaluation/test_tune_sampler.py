"""`blip3o-fast tune-sampler` from the command line to `sampler.json`, on a small network."""

import re

import pytest
import torch

from blip3o_fast.cli import main
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.evaluation import tune_sampler as module
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling import sample
from blip3o_fast.sampling.settings import SamplerSettings
from blip3o_fast.sampling.tune import relative_l2

E, C, TOKENS = 10, 4, 4
FLAGS = ["--num_samples", "3", "--reference_steps", "100", "--device", "cpu", "--eval_split", "0.2", "--seed", "5"]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    condition, target = (torch.randn(20, TOKENS, width, generator=generator) for width in (E, C))
    names = [str(i) for i in range(20)]
    meta = Meta(EncoderInfo("c", E), EncoderInfo("t", C), tokens=TOKENS)
    ShardWriter(tmp_path / "embeddings", meta).write(0, condition, target, names, names, "made up")
    config = BLIP3oConfig.preset(
        "tiny", in_channels=C, cross_attention_dim=E, sample_size=2, hidden_size=16, num_layers=1
    )
    model = BLIP3oDiT(config, generator=generator)
    with torch.no_grad():
        model.norm_out.linear_2.weight.normal_(generator=generator)  # untrained it answers zero
        model.layers[0].gate.normal_(generator=generator)
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def command(folder, *more):
    return main(["tune-sampler", str(folder / "model"), "--embeddings_path", str(folder / "embeddings"), *FLAGS, *more])


def test_it_writes_what_keeps_its_word(folder, capsys):
    """The file's error is that of a `sample` with its arguments, against the run that it is said to be against."""
    assert command(folder, "--error", "0.05") == 0
    said = capsys.readouterr().out
    found = SamplerSettings.read(folder / "model")
    dataset = EmbeddingDataset(folder / "embeddings", split="eval", eval_split=0.2)
    model = BLIP3oDiT.from_pretrained(folder / "model").eval()
    noise = normal_noise_at(5, dataset.indices[:3], (TOKENS, C))
    condition = dataset.conditions[:3]
    reference = sample(model, condition, noise=noise, num_steps=100, guidance_scale=2.0)
    error = relative_l2(sample(model, condition, noise=noise, **found.arguments()), reference)
    assert error == pytest.approx(found.error, rel=1e-3) and 1e-3 < found.error <= 0.05
    assert found.reference_steps == 100 and found.passes < 60

    assert re.search(rf"^ +{found.passes} .*<- found$", said, re.MULTILINE)
    assert re.search(r"^ +60 +30 .*euler, 30 steps, linear grid, guidance 2  <- the default$", said, re.MULTILINE)
    assert re.search(r"^30 Euler steps: 60 passes, error 0\.\d{4}, \d+\.\d{3} s$", said, re.MULTILINE)
    assert f"sampler.json: {found}" in said


def test_where_nothing_is_within_the_error_nothing_is_written(folder, capsys, monkeypatch):
    monkeypatch.setattr(module, "MOST", 8)
    assert command(folder, "--error", "1e-7") == 1
    said = capsys.readouterr()
    assert said.err.startswith("nothing is within --error 1e-07: the last row of the table is the nearest")
    assert "note: that is more than half of --error 1e-07; give more --reference_steps" in said.out
    assert not (folder / "model" / "sampler.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--error", "0"], "--error must be a number above 0 and below 1, got 0.0"),
        (["--error", "nan"], "--error must be a number above 0 and below 1, got nan"),
        (["--guidance_scale", "nan"], "--guidance_scale must be a number between -100 and 100, got nan"),
        (["--num_samples", "0"], "--num_samples must be a whole number >= 1, got 0"),
        (["--seed", "-1"], "--seed must be a whole number >= 0, got -1"),
        (["--reference_steps", "99"], "--reference_steps must be a whole number >= 100, got 99"),
        (["--split", "test"], "--split must be one of "),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_bad_flags_are_named_before_anything_is_loaded(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    assert command(tmp_path, *flags) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_model_that_is_no_folder_is_named(tmp_path, capsys):
    assert main(["tune-sampler", "some/hub-name", "--embeddings_path", str(tmp_path)]) == 2
    assert "MODEL some/hub-name: no such folder; sampler.json is written beside the weights" in capsys.readouterr().err
