"""flash_attention and dual_attention name every bad input: the argument, what was given, what is allowed."""

import re

import pytest
import torch

from blip3o_fast.ops import dual_attention, flash_attention

FLASH = {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 5, 2, 8), "v": torch.zeros(2, 5, 2, 8)}
BAD_FLASH = [
    ({"q": torch.zeros(2, 3, 32)}, "q must have 4 dimensions (B, Tq, H, d), got shape (2, 3, 32)"),
    ({"k": None}, "k must be a tensor of shape (B, Tk, K, d), got NoneType"),
    ({"k": torch.zeros(3, 5, 2, 8)}, "k must have shape (B, Tk, K, d) = (2, 5, 2, 8), got (3, 5, 2, 8)"),
    ({"k": torch.zeros(2, 5, 2, 4)}, "k must have shape (B, Tk, K, d) = (2, 5, 2, 8), got (2, 5, 2, 4)"),
    ({"v": torch.zeros(2, 6, 2, 8)}, "v must have shape (B, Tk, K, d) = (2, 5, 2, 8), got (2, 6, 2, 8)"),
    ({"k": torch.zeros(2, 0, 2, 8), "v": torch.zeros(2, 0, 2, 8)}, "k must have at least 1 token, got shape (2, 0, 2,"),
    ({"q": torch.zeros(2, 3, 5, 8)}, "the number of query heads must be a multiple of the key heads, got 5 and 2"),
    ({"k": torch.zeros(2, 5, 0, 8), "v": torch.zeros(2, 5, 0, 8)}, "must be a multiple of the key heads, got 4 and 0"),
    ({"v": torch.zeros(2, 5, 2, 8).long()}, "v must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"k": torch.zeros(2, 5, 2, 8).double()}, "k is torch.float64 and q is torch.float32"),
    ({"v": torch.zeros(2, 5, 2, 8, device="meta")}, "v must be on cpu like q, got meta"),
    ({"scale": float("nan")}, "scale must be a finite number or None for head_dim^-0.5, got nan"),
    ({"scale": "0.5"}, "scale must be a finite number or None for head_dim^-0.5, got 0.5"),
    ({"mask": torch.ones(2, 5)}, "mask must be a bool tensor (True = attend), got torch.float32"),
    ({"mask": [True]}, "mask must be a bool tensor (True = attend), got list"),
    ({"mask": torch.ones(2, 3, 5).bool()}, "mask must have shape (B, Tk) = (2, 5), got (2, 3, 5)"),
    ({"mask": torch.ones(2, 5, device="meta").bool()}, "mask must be on cpu like the queries, got meta"),
]  # fmt: skip
DUAL = {
    "qkq": torch.zeros(2, 3, 10, 8),
    "v1": torch.zeros(2, 3, 2, 8),
    "k2": torch.zeros(2, 5, 2, 8),
    "v2": torch.zeros(2, 5, 2, 8),
    "gate": torch.zeros(4),
}
BAD_DUAL = [
    ({"qkq": torch.zeros(2, 3, 80)}, "qkq must have 4 dimensions (B, T, H+K+H, d), got shape (2, 3, 80)"),
    ({"v1": 1.0}, "v1 must be a tensor of shape (B, T, K, d), got float"),
    ({"qkq": torch.zeros(2, 3, 11, 8)}, "qkq must hold H+K+H heads with K = 2 as in v1, got 11"),
    ({"qkq": torch.zeros(2, 3, 2, 8)}, "qkq must hold H+K+H heads with K = 2 as in v1, got 2"),
    ({"v1": torch.zeros(2, 4, 2, 8)}, "v1 must have shape (B, T, K, d) = (2, 3, 2, 8), got (2, 4, 2, 8)"),
    ({"k2": torch.zeros(2, 5, 4, 8)}, "k2 must have shape (B, L, K, d) = (2, 5, 2, 8), got (2, 5, 4, 8)"),
    ({"k2": torch.zeros(2, 5, 16)}, "k2 must have 4 dimensions (B, L, K, d), got shape (2, 5, 16)"),
    ({"v2": torch.zeros(2, 6, 2, 8)}, "v2 must have shape (B, L, K, d) = (2, 5, 2, 8), got (2, 6, 2, 8)"),
    ({"gate": torch.zeros(2)}, "gate must have shape (H) = (4), got (2,)"),
    ({"k2": torch.zeros(2, 0, 2, 8), "v2": torch.zeros(2, 0, 2, 8)}, "k2 must have at least 1 token, got 0"),
    ({"qkq": torch.zeros(2, 0, 10, 8), "v1": torch.zeros(2, 0, 2, 8)}, "qkq must have at least 1 token, got 0"),
    ({"qkq": torch.zeros(2, 3, 8, 8), "gate": torch.zeros(3)}, "must be a multiple of the key heads, got 3 and 2"),
    ({"gate": torch.zeros(4).int()}, "gate must be float32, bfloat16, float16 or float64, got torch.int32"),
    ({"v2": torch.zeros(2, 5, 2, 8).double()}, "v2 is torch.float64 and qkq is torch.float32"),
    ({"k2": torch.zeros(2, 5, 2, 8, device="meta")}, "k2 must be on cpu like qkq, got meta"),
    ({"scale": float("inf")}, "scale must be a finite number or None for head_dim^-0.5, got inf"),
    ({"mask": torch.ones(2, 5)}, "mask must be a bool tensor (True = attend), got torch.float32"),
    ({"mask": torch.ones(2, 1, 5).bool()}, "mask must have shape (B, L) = (2, 5), got (2, 1, 5)"),
    ({"mask": torch.ones(2, 3).bool()}, "mask must have shape (B, L) = (2, 5), got (2, 3)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FLASH, ids=[m for _, m in BAD_FLASH])
def test_flash_attention(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention(**(FLASH | change))


@pytest.mark.parametrize(("change", "message"), BAD_DUAL, ids=[m for _, m in BAD_DUAL])
def test_dual_attention(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dual_attention(**(DUAL | change))
