"""bf16 and fp16: what runs in half precision, what stays fp32, and the state of the loss scaler."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT

HALVES = [torch.bfloat16, torch.float16]


class Outputs(TorchDispatchMode):
    """The dtypes of what the network's ops return, by op."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, torch.Tensor):
            self.dtypes.setdefault(op.name().removesuffix("_fwd"), set()).add(first.dtype)
        return result


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", num_layers=2), generator=generator).train()
    with torch.no_grad():
        for block in net.layers:
            block.gate.normal_(generator=generator)
    return net


def loss_of(model, dtype=None, sample_index=0):
    generator = torch.Generator().manual_seed(1)
    target, condition = torch.randn(4, 64, 16, generator=generator), torch.randn(4, 5, 24, generator=generator)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss_function = FlowMatchingLoss.from_config(model.config, condition_dropout=0.0)
        return loss_function(model, target, condition, seed=1, sample_index=sample_index)[0]


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("mode", [None, "block", "selective"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ops_run_in_half_and_weights_and_gradients_stay_fp32(model, dtype, mode):
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    if mode:
        model.gradient_checkpointing_enable({"mode": mode})
    with Outputs() as seen:
        loss = loss_of(model, dtype)
    for op in ("merged_linear", "rms_norm_modulate", "qk_norm_rope", "dual_attention", "swiglu", "gated_residual"):
        assert seen.dtypes[f"blip3o_fast::{op}"] == {dtype}, op
    # the patch embedding and the time's layers are Linears of torch
    assert seen.dtypes["aten::addmm"] == {dtype}
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    error = (gradients(model) - expected).norm() / expected.norm()
    assert 0 < error < (0.05 if dtype == torch.bfloat16 else 0.005), error


def test_a_scaler_halves_its_scale_where_fp16_overflows_and_goes_on(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before, scale, skipped, taken = gradient_free_copy(model), scaler.get_scale(), 0, 0
    for step in range(60):
        scaler.scale(loss_of(model, torch.float16, sample_index=step)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < scale:
            assert not torch.isfinite(norm)
            skipped += 1
            if not taken:
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        else:
            assert torch.isfinite(norm)
            taken += 1
        scale = scaler.get_scale()
        if taken == 3:
            break
    assert skipped >= 10 and taken == 3 and 1 < scale < 2.0**50
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def gradient_free_copy(model):
    return [p.detach().clone() for p in model.parameters()]


def test_the_trainer_keeps_weights_and_average_in_fp32_under_bf16(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert set(trainer.model.dtypes) == {torch.bfloat16}  # of what its last Linear returned
    state = trainer.optimizer.state_dict()["state"].values()
    values = [*trainer.model.parameters(), *trainer.ema.average.values(), *(moments["exp_avg"] for moments in state)]
    assert {value.dtype for value in values} == {torch.float32}
