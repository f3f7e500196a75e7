"""The average of the weights, against its recurrence in float64."""

import pytest
import torch
from torch import nn

from blip3o_fast.training.ema import EMA


def test_average_follows_the_recurrence():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().double().clone()
    for t in range(1, 41):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3) * 0.1)
        ema.update(model)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert ema.updates == 40
    assert (ema.average["weight"].double() - expected).abs().max() <= 1e-6


def test_a_bf16_model_has_a_float32_average_that_moves():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, 0.9999)
    ema.updates = 10**6  # past the rise of the decay: an increment of 1e-4 is lost in bf16
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(2000):
        ema.update(model)
    assert ema.average["weight"].dtype == torch.float32
    assert abs(float(ema.average["weight"]) - (2 - 0.9999**2000)) <= 1e-3


def test_applied_lends_the_average_and_gives_everything_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
    ema = EMA(model, 0.5)
    ema.update(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        assert torch.equal(model[0].weight, ema.average["0.weight"].bfloat16())
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The storage must not move: parameters may be views of a packed buffer, and optimizers hold them.
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model = nn.Linear(5, 5)
    ema = EMA(model, 0.99)
    with torch.no_grad():
        model.weight.mul_(3)
    ema.update(model)
    ema.save(tmp_path)
    again = EMA(nn.Linear(5, 5), 0.99)
    again.load(tmp_path)
    assert again.updates == 1
    assert all(torch.equal(again.average[name], value) for name, value in ema.average.items())
    assert [path.name for path in tmp_path.iterdir()] == ["ema.safetensors"]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"ema_decay must be in \(0, 1\), got 1.0"):
        EMA(nn.Linear(1, 1), 1.0)
    ema = EMA(nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match=r"ema.safetensors is missing.*--ema_decay 0"):
        ema.load(tmp_path)
    ema.save(tmp_path)
    with pytest.raises(ValueError, match=r"another model.*bias"):
        EMA(nn.Linear(2, 2, bias=False), 0.9).load(tmp_path)
    with pytest.raises(ValueError, match=r"weight is \[2, 2\], the model has \[2, 3\]"):
        EMA(nn.Linear(3, 2), 0.9).load(tmp_path)


def test_an_update_is_one_foreach_pass():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "detach" not in str(func):
                self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    ema = EMA(model, 0.9)
    with Count() as count:
        ema.update(model)
    assert count.seen == ["aten._foreach_lerp_.Scalar"]
