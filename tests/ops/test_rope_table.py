"""rope_table against diffusers' table, bit for bit, and against what a rotary embedding is for."""

import re

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from blip3o_fast.ops import qk_norm_rope, rope_table


@pytest.mark.parametrize(
    ("height", "width", "head_dim", "factors"),
    [
        (8, 8, 64, {}),
        (8, 8, 72, {}),
        (3, 7, 16, {}),
        (1, 1, 4, {}),
        (5, 4, 48, {"linear_factor": 2.5}),
        (4, 6, 32, {"ntk_factor": 4.0, "linear_factor": 0.5}),
    ],
)
def test_is_the_corner_of_diffusers_table(height, width, head_dim, factors):
    stock = get_2d_rotary_pos_embed_lumina(head_dim, 33, 40, **factors)[:height, :width].flatten(0, 1)
    ours = rope_table(height, width, head_dim, **factors)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, torch.view_as_real(stock))


def test_far_positions_of_the_whole_table():
    stock = get_2d_rotary_pos_embed_lumina(64, 384, 384).flatten(0, 1)
    assert torch.equal(rope_table(384, 384, 64), torch.view_as_real(stock))


def test_theta_is_the_base_of_the_frequencies():
    # diffusers multiplies its fixed base 10000 by ntk_factor
    assert torch.equal(rope_table(4, 4, 16, theta=500.0), rope_table(4, 4, 16, ntk_factor=0.05))


def test_products_depend_on_the_offset_alone():
    """q at one place times k at another depends on how far apart they are: that is the purpose of the rotation."""
    q, k = torch.randn(2, 1, 1, 16).double()
    q, k = (qk_norm_rope(t.expand(1, 30, 16), [None], [None], rope_table(5, 6, 16), heads=(1,), head_dim=16)
            for t in (q, k))  # fmt: skip
    products = (q[0, :, 0] @ k[0, :, 0].T).unflatten(0, (5, 6)).unflatten(-1, (5, 6))
    torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2], rtol=0, atol=1e-5)
    assert not torch.allclose(products[0, 0, 1, 0], products[0, 0, 0, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height must be at least 1 token, got 0"),
        ({"width": -1}, "width must be at least 1 token, got -1"),
        ({"head_dim": 6}, "head_dim must be a positive multiple of 4"),
        ({"head_dim": 0}, "head_dim must be a positive multiple of 4"),
        ({"theta": 0.0}, "theta must be > 0, got 0.0"),
        ({"linear_factor": -2.0}, "linear_factor must be > 0, got -2.0"),
        ({"ntk_factor": float("nan")}, "ntk_factor must be > 0, got nan"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rope_table(**({"height": 2, "width": 2, "head_dim": 8} | change))


def test_device_is_honoured():
    assert rope_table(2, 3, 8, device="meta").shape == (6, 4, 2)
    assert rope_table(2, 3, 8, device="meta").device.type == "meta"
