"""Every argument of `sample` that cannot be, and results that are not finite."""

import functools
import re
import warnings

import pytest
import torch

from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.sampling import Sampler


def network(**overrides) -> BLIP3oDiT:
    return BLIP3oDiT(BLIP3oConfig.preset("tiny", sample_size=2, in_channels=8, num_layers=1, **overrides)).eval()


C, G = torch.zeros(3, 5, 24), torch.Generator()
BAD = [
    ({"model": torch.nn.Linear(2, 2)}, "model must have a config (BLIP3oDiT has one), got Linear without"),
    ({"encoder_hidden_states": [1.0]}, "encoder_hidden_states must be a floating tensor of shape (N, L, 24), got list"),
    ({"encoder_hidden_states": C.long()}, "must be a floating tensor of shape (N, L, 24), got torch.int64"),
    ({"encoder_hidden_states": C[0]}, "encoder_hidden_states must have shape (N, L, 24), got (5, 24)"),
    ({"encoder_hidden_states": C[..., :23]}, "encoder_hidden_states must have shape (N, L, 24), got (3, 5, 23)"),
    ({"encoder_hidden_states": C[:, :0]}, "encoder_hidden_states must have shape (N, L, 24), got (3, 0, 24)"),
    ({"encoder_hidden_states": C.to("meta")}, "encoder_hidden_states must be on the model's device cpu, got meta"),
    ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
    ({"num_steps": True}, "num_steps must be an integer >= 1, got True"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
    ({"guidance_scale": torch.tensor(3.0)}, "guidance_scale must be a finite number, got tensor(3.)"),
    ({"guidance_scale": "3"}, "guidance_scale must be a finite number, got '3'"),
    ({"solver": "dopri5"}, "solver must be one of euler, midpoint, heun, ab2, got 'dopri5'"),
    ({"encoder_mask": torch.ones(3, 5)}, "encoder_mask must be bool of shape (N, L) = (3, 5), got torch.float32"),
    ({"encoder_mask": torch.ones(3, 4).bool()}, "encoder_mask must be bool of shape (N, L) = (3, 5), got torch.bool"),
    ({"encoder_mask": [True]}, "encoder_mask must be bool of shape (N, L) = (3, 5), got list"),
    ({"encoder_mask": torch.ones(3, 5, device="meta").bool()}, "encoder_mask must be on cpu, got meta"),
    ({"generator": 42}, "generator must be a torch.Generator or a list of them, got int"),
    ({"generator": [G, 42, G]}, "generator must be a torch.Generator or a list of them, got a list with int"),
    ({"generator": [G, G]}, "generator must have one element per result row = 3, got 2"),
    ({"generator": [G] * 3, "noise": torch.zeros(3, 4, 8)}, "noise and generator exclude each other"),
    ({"guidance_start": 1.5}, "guidance_start must be a noise level between 0 and 1, got 1.5"),
    ({"guidance_end": -0.1}, "guidance_end must be a noise level between 0 and 1, got -0.1"),
    ({"guidance_end": float("nan")}, "guidance_end must be a noise level between 0 and 1, got nan"),
    ({"guidance_start": "1"}, "guidance_start must be a noise level between 0 and 1, got '1'"),
    ({"guidance_start": 0.2, "guidance_end": 0.4}, "guidance_start must be at least guidance_end, as noise"),
    ({"num_samples_per_condition": 0}, "num_samples_per_condition must be an integer >= 1, got 0"),
    ({"noise": torch.zeros(3, 4, 7)}, "noise must be a floating tensor of shape (N * n, T, C) = (3, 4, 8), got"),
    ({"noise": torch.zeros(3, 4, 8).long()}, "noise must be a floating tensor of shape (N * n, T, C) = (3, 4, 8), got"),
    ({"noise": 1.0}, "noise must be a floating tensor of shape (N * n, T, C) = (3, 4, 8), got float"),
    ({"noise": torch.zeros(3, 4, 8, device="meta")}, "noise must be on the model's device cpu, got meta"),
    ({"noise": torch.zeros(3, 4, 8), "generator": torch.Generator()}, "noise and generator exclude each other"),
    ({"sigmas": [1.0, 0.0]}, "sigmas must be a float32 or float64 tensor, got list"),
    ({"sigmas": torch.tensor([1.0, 0.5, 0.0])}, "sigmas must have num_steps + 1 = 4 elements, got 3"),
    ({"sigmas": torch.tensor([1.0, 0.5, 0.2, 0.1])}, "sigmas must fall from at most 1.0 (v_prediction) to 0, got 1.0"),
    ({"sigmas": torch.tensor([0.0, 0.2, 0.5, 1.0])}, "sigmas must fall from at most 1.0 (v_prediction) to 0, got 0.0"),
    ({"sigmas": torch.tensor([1.0, 0.5, 0.5, 0.0])}, "sigmas must be strictly monotone"),
    ({"truncate_time": True, "model": "lumina"}, "truncate=True needs time_convention='blip3o'"),
    ({"sigmas": torch.tensor([1.0, 0.5, 0.2, 0.0]), "model": "epsilon"}, "sigmas must fall from at most 0.999"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = {"model": None, "encoder_hidden_states": C, "num_steps": 3} | change
    model = call.pop("model")
    if not isinstance(model, torch.nn.Module):
        settings = {None: {}, "lumina": {"time_convention": "lumina"}, "epsilon": {"prediction_type": "epsilon"}}
        model = network(**settings[model])
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(model, call.pop("encoder_hidden_states"), **call)


def test_what_is_not_finite_is_named(monkeypatch):
    """By argument and sample, before the network is called."""
    model, broken = network(), torch.zeros(14, 5, 24)
    broken[1, 0, 0], broken[4, 4, 23] = float("nan"), float("inf")
    noise = torch.zeros(14, 4, 8)
    noise[:12, 0, 0] = -float("inf")
    with monkeypatch.context() as patch:
        patch.setattr(BLIP3oDiT, "_predict", lambda *args, **kwargs: pytest.fail("the network was called"))
        with pytest.raises(ValueError, match="encoder_hidden_states must be finite, got .* in 2 of 14 samples: 1, 4$"):
            sample(model, broken, num_steps=1)
        with pytest.raises(ValueError, match="noise must be finite, got .* in 12 of 14 samples: 0, .*, 9 and 2 more$"):
            sample(model, broken.nan_to_num(0, 0), noise=noise, num_steps=1)
    with torch.no_grad():
        model.norm_out.linear_2.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"infinity in 3 of 3 samples \(0, 1, 2\) although condition and"):
        sample(model, C, num_steps=1)


@pytest.mark.parametrize("make", [lambda model: model, Sampler], ids=["sample", "Sampler"])
def test_guidance_of_a_network_that_knows_no_null_condition(make):
    """Once per model, and only where both passes are run."""

    def warned(dropout, scale, times=1, **interval):
        model = make(network(condition_dropout=dropout))
        call = model if isinstance(model, Sampler) else functools.partial(sample, model)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(times):
                call(C, num_steps=2, guidance_scale=scale, **interval)
        return [str(one.message) for one in found if one.category is UserWarning]

    found = warned(0.0, 3.0, times=2)
    assert len(found) == 1 and "guidance_scale 3 moves" in found[0] and "guidance_scale=1, or train" in found[0]
    assert len(warned(0, -1.0)) == 1, "another model is another warning"
    for quiet in ((0.0, 1.0), (0.0, 0), (0.1, 3.0), (None, 3.0)):
        assert warned(*quiet) == [], quiet
    assert warned(0.0, 3.0, guidance_start=0.1) == [], "no step lies in the interval"
