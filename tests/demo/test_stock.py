"""The demo's stock side holds our weights exactly, and its plain sampler agrees with ours."""

import pytest
import torch

from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.demo.stock import StockBLIP3o, sample_stock


def tiny(context_projection: bool) -> BLIP3oDiT:
    config = BLIP3oConfig(
        in_channels=6, hidden_size=32, num_layers=2, num_attention_heads=2, multiple_of=16, cross_attention_dim=10,
        context_projection=context_projection,
    )  # fmt: skip
    model = BLIP3oDiT(config, generator=torch.Generator().manual_seed(0)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):  # zero at the start, and then cross-attention would say nothing
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("context_projection", [True, False])
def test_samples_agree(context_projection):
    model = tiny(context_projection)
    stock = StockBLIP3o.with_weights(model.config, model.state_dict())
    condition, noise = torch.randn(3, 64, 10), torch.randn(3, 64, 6)
    theirs = sample_stock(stock, condition, noise, num_steps=5, guidance_scale=2.0)
    ours = sample(model, condition, num_steps=5, guidance_scale=2.0, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    shuffled = sample(model, condition.roll(1, 0), num_steps=5, guidance_scale=2.0, noise=noise)
    assert (shuffled - theirs).abs().max() > 1e-3, "the condition must matter for the comparison to mean anything"


def test_a_missing_weight_is_an_error():
    model = tiny(True)
    state = dict(model.state_dict())
    del state["layers.1.norm2.weight"]
    with pytest.raises(RuntimeError, match="layers.1.norm2.weight"):
        StockBLIP3o.with_weights(model.config, state)
