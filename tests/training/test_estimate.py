"""The estimate of what a run needs: against what a step really keeps, and the refusal where it is too much."""

import pytest
import torch

from blip3o_fast.data.shards import read_meta
from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.peak import peak_bytes
from blip3o_fast.training import estimate
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.prepare import config_for, load_data
from blip3o_fast.training.run import train

CPU = torch.device("cpu")
CONFIG = BLIP3oConfig.preset("small", num_layers=3, cross_attention_dim=96)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [None, "block", "selective"])
def test_the_estimate_is_what_a_step_takes(checkpointing, bf16):
    """Gradients and activations together, at the height of a forward and a backward."""
    flags = {"gradient_checkpointing": True, "checkpointing_mode": checkpointing} if checkpointing else {}
    settings = TrainSettings("e", "o", batch_size=6, bf16=bf16, **flags)
    found = estimate.needs(settings, CONFIG, 0, 64)
    model = BLIP3oDiT(CONFIG).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"mode": checkpointing})
    assert found.parameters == sum(p.numel() for p in model.parameters())
    target, condition = torch.randn(6, 64, 64), torch.randn(6, 64, 96)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = FlowMatchingLoss.from_config(CONFIG)(model, target, condition, seed=0, sample_index=0)
        loss.backward()

    step()
    model.zero_grad()
    peak = peak_bytes(step, CPU)
    assert peak <= found.activations + found.gradients - found.shared <= (2.0 if bf16 else 1.4) * peak


def test_what_does_not_fit_is_refused_with_the_preset_that_does(embeddings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1 << 30)
    flags = {"batch_size": 4, "progress": False, "max_steps": 1, "no_wandb": True}
    with pytest.raises(ValueError, match="this run needs about .* GB and this machine has 1.0 GB free") as error:
        train(TrainSettings(embeddings, tmp_path / "run", **flags))
    assert "--preset small would fit; --force begins anyway" in str(error.value)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1 << 10)
    with pytest.raises(ValueError, match="no preset fits with this --batch_size"):
        train(TrainSettings(embeddings, tmp_path / "run", preset="tiny", **flags))
    done = train(TrainSettings(embeddings, tmp_path / "run", preset="tiny", force=True, **flags))
    assert done["status"] == "finished"


def test_reading_is_counted_as_stored_whatever_the_normalisation_leaves(embeddings, tmp_path):
    def reading(normalize):
        settings = TrainSettings(embeddings, tmp_path / "run", preset="tiny", batch_size=4, normalize=normalize)
        data = load_data(settings)
        text = estimate.plan(settings, data, config_for(settings, data), CPU, 10, 1, 1e-3)
        return next(line for line in text.splitlines() if line.startswith("reading"))

    assert reading("pca:2") == reading("none")


def test_a_dry_run_prints_the_plan(embeddings, tmp_path, capsys):
    settings = TrainSettings(embeddings, tmp_path / "run", preset="tiny", batch_size=4, dry_run=True, save_steps=50)
    assert train(settings)["status"] == "dry run"
    text = capsys.readouterr().out
    made_by = read_meta(embeddings)
    assert f"features    condition: {made_by.condition.name}\n            target: {made_by.target.name}\n" in text
    for word in ("memory      about", "s a step here", "disk        up to", "MB/s of half-precision features"):
        assert word in text
    assert not (tmp_path / "run").exists()


def test_fp16_on_a_cpu_warns_and_trains_in_fp32(embeddings, tmp_path, capsys):
    settings = TrainSettings(embeddings, tmp_path / "run", preset="tiny", batch_size=4, fp16=True, device="cpu",
                             max_steps=1, no_wandb=True, progress=False)  # fmt: skip
    assert train(settings)["status"] == "finished"
    text = capsys.readouterr().out
    assert "--fp16 has no effect on a CPU" in text and "--bf16 is real" in text and "fp32 (neither" in text


def test_backends_that_cannot_run_are_refused_before_the_data_is_read(tmp_path):
    missing = {"device": "cpu", "no_wandb": True}
    with pytest.raises(ValueError, match="--backend cuda, --attention_backend auto on cpu: backend 'cuda' cannot run"):
        train(TrainSettings(tmp_path / "nowhere", tmp_path / "run", backend="cuda", **missing))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(TrainSettings(tmp_path / "nowhere", tmp_path / "run", backend="reference", **missing))


def test_an_empty_held_out_split_is_refused(embeddings, tmp_path):
    with pytest.raises(ValueError, match="--eval_split 0.01: none of the 48 pictures"):
        train(TrainSettings(embeddings, tmp_path / "run", preset="tiny", eval_split=0.01, no_wandb=True))
