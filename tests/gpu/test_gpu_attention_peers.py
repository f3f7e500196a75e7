"""flash-attn and xformers themselves by the numerics contract. Where one cannot run, its tests are left out."""

import pytest
import torch

from benchmarks.cases import assert_case, module_of
from blip3o_fast.ops import use_attention
from blip3o_fast.testing import with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*determinis")]

OPS = ("flash_attention", "dual_attention")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TAKES = {"flash-attn": ("bf16", "fp16"), "xformers": ("fp32", "bf16", "fp16")}
# the model's own heads, those of diffusers' class, and a length and head size that need padding
SIZES = [
    {"heads": 28, "head_dim": 64},
    {"tokens": 256, "context": 77, "heads": 32, "key_heads": 8, "head_dim": 72},
    {"tokens": 5, "context": 9, "heads": 3, "key_heads": 1, "head_dim": 20},
]


@pytest.fixture(autouse=True)
def asked_for(attention, cuda_only):
    with use_attention(attention):
        yield


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: " ".join(map(str, s.values())))
@pytest.mark.parametrize("attention", TAKES)
@pytest.mark.parametrize("op", OPS)
def test_contract(attention, op, sizes, masked):
    for kind in TAKES[attention]:
        assert_case(module_of(op).case(3, DTYPES[kind], "cuda", **sizes, masked=masked))


@pytest.mark.parametrize("attention", TAKES)
@pytest.mark.parametrize("op", OPS)
def test_a_sample_that_sees_nothing_gets_zero(attention, op):
    case = module_of(op).case(3, torch.bfloat16, "cuda", **SIZES[1], masked=True)
    case.given["mask"][1] = False
    results = with_gradients(case.bound(case.ours), case.inputs, *case.upstream)
    for name in {"flash_attention": ("y", "dq", "dk", "dv"), "dual_attention": ("dk2", "dv2")}[op]:
        assert results[name][1].count_nonzero() == 0, name
    assert all(value.isfinite().all() for value in results.values())
