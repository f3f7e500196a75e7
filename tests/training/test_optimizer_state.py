"""A run begun with diffusers' network and torch's AdamW goes on here, and back, as if nothing had happened: in fp64."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training.optimizer_state import (
    load_named_state,
    named_state,
    read_named_state,
    save_named_state,
)
from blip3o_fast.training.stream import SampleOrder

RATE = 1e-3
# Stock's RMSNorm takes the mean square in fp32, also of an fp64 network; so a thousandth of one step of the optimizer.
CLOSE = 1e-3 * RATE


def train_stock(stock, network, optimizer, data, seed, steps):
    """A plain loop over diffusers' network with torch's AdamW, on the samples that a run with this seed sees."""
    conditions, targets = data
    loss_function = loss_of(stock)
    order = SampleOrder(len(conditions), seed)
    model = stock.as_sequence(network).train()
    for step in range(steps):
        pictures = order.pictures(4 * step, 4)
        loss, _ = loss_function(model, targets[pictures], conditions[pictures], seed=seed, sample_index=4 * step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def loss_of(stock):
    return FlowMatchingLoss.from_config(BLIP3oDiT({**stock.sizes, "context_projection": False}).config)


def adamw(network):
    return torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.0)


def difference(ours, theirs):
    return max(float((ours[name].double() - theirs[name]).abs().max()) for name in theirs)


def test_three_steps_there_and_three_here_are_six_there_and_back_again(tmp_path, make_trainer, stock):
    torch.manual_seed(1)
    data = tuple(features[:40].double() for features in stock.data)  # what make_trainer trains on
    network = stock.network().double()
    optimizer = adamw(network)
    train_stock(stock, network, optimizer, data, seed=7, steps=3)
    network.save_pretrained(tmp_path / "stock")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    begun = {name: value.clone() for name, value in network.state_dict().items()}

    def here(name, init_optimizer):
        model = BLIP3oDiT.from_pretrained(tmp_path / "stock", torch_dtype=torch.float64)
        changes = {"learning_rate": RATE, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler": "constant"}
        trainer = make_trainer(
            tmp_path / name, model=model, max_steps=3, seed=42, ema_decay=0.0, save_steps=3, eval_steps=99,
            init_optimizer=init_optimizer, loss_function=loss_of(stock), **changes,
        )  # fmt: skip
        trainer.conditions, trainer.targets = data
        trainer.validation = None
        trainer.train()
        return trainer

    trainer = here("here", tmp_path / "optimizer.pt")
    forgetful = here("forgetful", None)

    train_stock(stock, network, optimizer, data, seed=42, steps=3)
    six = {name: value.clone() for name, value in network.state_dict().items()}
    moved = difference(six, begun)
    assert moved > RATE
    assert difference(trainer.model.state_dict(), six) <= CLOSE
    assert difference(forgetful.model.state_dict(), six) > 0.1 * moved  # the test would notice a lost state

    # and back: diffusers' class opens our checkpoint, torch's AdamW its optimizer
    from diffusers import LuminaNextDiT2DModel

    folder = tmp_path / "here" / "checkpoint-3"
    back = LuminaNextDiT2DModel.from_pretrained(folder, torch_dtype=torch.float64)
    again = adamw(back)
    load_named_state(back, again, read_named_state(folder, back))
    train_stock(stock, back, again, data, seed=8, steps=3)
    train_stock(stock, network, optimizer, data, seed=8, steps=3)
    assert difference(back.state_dict(), network.state_dict()) <= CLOSE


def test_a_named_state_is_written_read_and_taken_up_bit_for_bit(tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    state = named_state(model, optimizer)
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    save_named_state(state, tmp_path / "optimizer.safetensors")
    assert set(load_file(tmp_path / "optimizer.safetensors")) >= {"0.weight/exp_avg", "1.bias/step"}
    # Two groups in another order, another rate: those stay the optimizer's own.
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.5},
              {"params": [p for p in model.parameters() if p.ndim < 2]}]  # fmt: skip
    other = torch.optim.AdamW(groups, 0.7, fused=True)
    load_named_state(model, other, read_named_state(tmp_path / "optimizer.safetensors", model))
    for parameter in model.parameters():
        for slot, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][slot], value)
            assert other.state[parameter][slot] is not value
    assert [group["lr"] for group in other.param_groups] == [0.7, 0.7] and other.param_groups[0]["weight_decay"] == 0.5
    # torch numbers them in the groups' order; a file with names of its own says them
    torch.save(other.state_dict(), tmp_path / "two_groups.pt")
    named = torch.optim.AdamW(reversed(list(model.named_parameters())), 0.1)
    load_named_state(model, named, state)
    torch.save(named.state_dict(), tmp_path / "named.pt")
    for file in ("two_groups.pt", "named.pt"):
        again = read_named_state(tmp_path / file, model)
        assert set(again) == set(state)
        assert all(torch.equal(again[name][slot], state[name][slot]) for name in state for slot in state[name])


def test_what_does_not_fit_is_named(tmp_path):
    model, other = nn.Linear(2, 3), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(1, 2)).sum().backward()
    optimizer.step()
    state = named_state(model, optimizer)
    with pytest.raises(ValueError, match=r"exp_avg of weight is \[3, 2\], the parameter \[2, 3\]"):
        load_named_state(other, torch.optim.AdamW(other.parameters()), state)
    with pytest.raises(ValueError, match=r"it has \['odd'\], which the model has not"):
        load_named_state(model, optimizer, {"odd": {}})
    with pytest.raises(ValueError, match="that is not the model's"):
        named_state(other, optimizer)
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        read_named_state(tmp_path / "nowhere", model)
    (tmp_path / "text.pt").write_text("no pickle")
    with pytest.raises(ValueError, match=r"text.pt is no state_dict\(\) of a torch optimizer"):
        read_named_state(tmp_path / "text.pt", model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt is of another model: it has 2 parameters, the model 1"):
        read_named_state(tmp_path / "optimizer.pt", nn.Linear(2, 3, bias=False))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="was not written by save_named_state"):
        read_named_state(tmp_path / "weights.safetensors", model)
