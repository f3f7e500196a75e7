"""Training over the fused ops is training diffusers' own network, and it can learn a set by heart."""

import pytest
import torch
from torch import nn

from blip3o_fast import _ext, ops
from blip3o_fast.evaluation.metrics import token_cosine
from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.sampling.sample import sample
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.run import train
from blip3o_fast.training.stream import SampleOrder

ON_CPU = pytest.param("cpu", 100, marks=pytest.mark.skipif(_ext.C is None, reason=str(_ext.ERROR)))
AT_LENGTH = pytest.param("reference", 100, marks=pytest.mark.slow)
# Interpreted, a step takes 10 seconds.
INTERPRETED = pytest.param("triton", 3, marks=pytest.mark.slow)


def loss_curve(model, loss_function, data, steps):
    conditions, targets = data
    order = SampleOrder(len(conditions), seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    losses = []
    for step in range(steps):
        pictures = order.pictures(4 * step, 4)
        loss, _ = loss_function(
            model.train(), targets[pictures], conditions[pictures], seed=3, sample_index=4 * step, condition_dropout=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


@pytest.mark.parametrize(("backend", "steps"), [("reference", 20), AT_LENGTH, ON_CPU, INTERPRETED])
def test_fused_and_eager_training_have_the_same_loss_curve(stock, backend, steps):
    network = stock.network()
    ours = BLIP3oDiT({**stock.sizes, "context_projection": False})
    ours.load_state_dict(network.state_dict())
    loss_function = FlowMatchingLoss.from_config(ours.config)
    with ops.use_backend("reference"):  # the loss's own ops, the same for both
        eager = loss_curve(stock.as_sequence(network), loss_function, stock.data, steps)
    with ops.use_backend(backend):
        fused = loss_curve(ours, loss_function, stock.data, steps)
    assert (fused - eager).abs().max() <= 1e-4
    if steps == 100:
        assert eager[-10:].mean() < 0.8 * eager[:10].mean()  # it has gone somewhere


@pytest.mark.slow
def test_a_tiny_set_is_learned_by_heart(tmp_path):
    from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter

    conditions, targets = torch.randn(4, 16, 12), torch.randn(4, 16, 6)
    (tmp_path / "embeddings").mkdir()
    meta = Meta(EncoderInfo("condition-net", 12), EncoderInfo("target-net", 6), tokens=16)
    names = [f"picture_{i}" for i in range(4)]
    ShardWriter(tmp_path / "embeddings", meta).write(0, conditions, targets, names, names, "made up")
    settings = TrainSettings(
        tmp_path / "embeddings", tmp_path / "run", model_dim=64, num_layers=2, num_heads=2, multiple_of=8,
        batch_size=16, max_steps=300, learning_rate=5e-3, warmup_steps=0, weight_decay=0.0, ema_decay=0.0,
        condition_dropout=0.0, eval_split=0.0, save_steps=300, device="cpu", no_wandb=True, progress=False,
    )  # fmt: skip
    train(settings)
    model = BLIP3oDiT.from_pretrained(tmp_path / "run").eval()
    stored = conditions.half().float()  # as shards keep them
    drawn = sample(model, stored, num_steps=20, guidance_scale=1.0, generator=torch.Generator().manual_seed(1))
    assert token_cosine(drawn, targets) >= 0.99
    wrong = sample(
        model, stored.roll(1, 0), num_steps=20, guidance_scale=1.0, generator=torch.Generator().manual_seed(1)
    )
    assert token_cosine(wrong, targets) < 0.5  # it is the condition that says which


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_optimizers_see_the_stock_matrices(stock):
    """Per-matrix optimizers (Muon) orthogonalise one projection at a time, not a merged buffer."""
    network = stock.network()
    ours = BLIP3oDiT({**stock.sizes, "context_projection": False})
    ours.load_state_dict(network.state_dict())
    loss_function = FlowMatchingLoss.from_config(ours.config)
    loss_curve(ours, loss_function, stock.data, 2)  # also after the fused ops have run

    def shapes(model):
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    assert shapes(ours) == shapes(network)
    ours.load_state_dict(network.state_dict())
    twins = {"ours": ours, "stock": stock.as_sequence(network)}
    conditions, targets = stock.data
    losses, weights = {}, {}
    for name, model in twins.items():
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".attn" in n]
        others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".attn" in n)]
        assert len(hidden) == 2 * 7  # q, k, v, k2, v2, out of both: as in stock, of each block
        optimizers = torch.optim.Muon(hidden, 1e-3), torch.optim.AdamW(others, 1e-3)
        losses[name] = []
        for _ in range(6):
            model.zero_grad()
            loss, _ = loss_function(model.train(), targets[:8], conditions[:8], seed=0, sample_index=0)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses[name].append(float(loss.detach()))
        weights[name] = hidden
    assert losses["ours"][-1] < losses["ours"][0]
    # Muon works in bf16 inside: after six orthogonalised steps still the same matrices to its rounding.
    assert losses["ours"] == pytest.approx(losses["stock"], abs=1e-4)
