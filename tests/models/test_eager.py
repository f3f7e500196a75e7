"""`models/eager.py` is diffusers' own sequence: bit for bit, gradient for gradient, dispatch for dispatch."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.eager import eager_block, eager_forward
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.rope import kept_rope_table

CASES: dict[str, dict[str, Any]] = {
    "blip3o": {},
    "stock": {"context_projection": False},
    "gqa": {"num_attention_heads": 4, "num_kv_heads": 2},
    "no-qk-norm": {"qk_norm": False},
    "patch-2-sigma": {"patch_size": 2, "in_channels": 4, "learn_sigma": True},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_bit_for_bit(case: str, masked: bool, stock_pair: Any, inputs: Any) -> None:
    config = BLIP3oConfig.preset("tiny", **CASES[case])
    stock, ours = stock_pair(config)
    hidden_states, timestep, context = inputs(config, context=7, height=4, width=6)
    mask = (torch.arange(7) < torch.tensor([[3], [7]])) if masked else None
    for base in (None, 16):
        arguments = (hidden_states, timestep, context, mask)
        expected = stock(*arguments, base_sequence_length=base)
        out = eager_forward(ours, *arguments, base_sequence_length=base)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(expected)
        theirs = {name: p for name, p in stock.named().items() if name != "pad_token"}
        mine = [ours.get_parameter(name) for name in theirs]
        expected_grads = torch.autograd.grad(expected, list(theirs.values()), upstream)
        for name, grad, expected_grad in zip(
            theirs, torch.autograd.grad(out, mine, upstream), expected_grads, strict=True
        ):
            assert torch.equal(grad, expected_grad), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_equals_diffusers_in_other_dtypes(dtype: torch.dtype, stock_pair: Any, inputs: Any) -> None:
    config = BLIP3oConfig.preset("tiny")
    stock, ours = stock_pair(config, dtype)
    arguments = inputs(config, dtype=dtype)
    assert torch.equal(eager_forward(ours, *arguments), stock(*arguments))


def test_equals_diffusers_under_autocast(stock_pair: Any, inputs: Any) -> None:
    config = BLIP3oConfig.preset("tiny")
    stock, ours = stock_pair(config)
    arguments = inputs(config)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(eager_forward(ours, *arguments), stock(*arguments))


def test_takes_diffusers_rotary_table(stock_pair: Any, inputs: Any) -> None:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    config = BLIP3oConfig.preset("tiny")
    stock, ours = stock_pair(config)
    arguments = inputs(config)
    stock.rope = get_2d_rotary_pos_embed_lumina(config.head_dim, 16, 16, linear_factor=2.0, ntk_factor=3.0)
    expected = stock(*arguments)
    assert torch.equal(eager_forward(ours, *arguments, image_rotary_emb=stock.rope), expected)
    error = (ours(*arguments, image_rotary_emb=stock.rope) - expected).abs().max().item()
    assert error <= 1e-5
    assert not (ours(*arguments) - expected).abs().max().item() <= 1e-3, "the table made no difference"


class _Count(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd, and apart from that what computes instead of viewing."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatched: Counter[str] = Counter()
        self.computing: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.dispatched[str(func)] += 1
        if not views and func is not torch.ops.aten._unsafe_view.default:
            self.computing[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(block: Callable[..., Tensor], arguments: tuple[Tensor, ...], upstream: Tensor | None) -> _Count:
    with _Count() as counter:
        out = block(*arguments)
        if upstream is not None:
            out.backward(upstream)
    for argument in arguments:
        argument.grad = None  # the next backward should not find one to add to
    return counter


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(
    "dtype, expected", [(torch.float64, (107, 278)), (torch.float32, (94, 247)), (torch.bfloat16, (122, 305))]
)
def test_dispatches_as_diffusers(dtype: torch.dtype, expected: tuple[int, int], backward: bool) -> None:
    """Operation for operation the same, on meta tensors, where SDPA is counted as the operations it consists of.

    The dtypes differ by their casts: stock computes some steps in fp32 whatever it is given. The gradients are those
    of the parameters, the residual and the context.
    """
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock

    config = BLIP3oConfig(num_layers=1, context_projection=False)
    with torch.device("meta"):
        stock = LuminaNextDiTBlock(1792, 28, 28, 256, None, 1e-5, True, 1280).to(dtype)
        ours = BLIP3oDiT(config).to(dtype).layers[0]
        hidden_states = torch.randn(2, 64, 1792, dtype=dtype, requires_grad=backward)
        mask = torch.ones(2, 64, dtype=torch.int32)
        context = torch.randn(2, 64, 1280, dtype=dtype, requires_grad=backward)
        context_mask = torch.ones(2, 64, dtype=torch.bool)
        temb = torch.randn(2, 1024, dtype=dtype)
        upstream = torch.empty(2, 64, 1792, dtype=dtype) if backward else None
    rope = torch.view_as_complex(kept_rope_table(8, 8, 64, torch.device("cpu"))).unsqueeze(0).to("meta")
    arguments = (hidden_states, mask, rope, context, context_mask, temb)
    theirs = count(lambda *a: stock(*a, cross_attention_kwargs={}), arguments, upstream)
    mine = count(lambda *a: eager_block(ours, *a), arguments, upstream)
    assert mine.computing == theirs.computing
    assert sum(mine.computing.values()) == expected[backward]
    assert mine.dispatched == theirs.dispatched


def test_needs_no_diffusers() -> None:
    code = """
import sys
sys.modules["diffusers"] = None
import torch
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT, eager_forward
model = BLIP3oDiT(BLIP3oConfig.preset("tiny"))
out = eager_forward(model, torch.randn(1, 64, 16), torch.tensor([500.0]), torch.randn(1, 5, 24))
assert out.shape == (1, 64, 16)
assert "transformers" not in sys.modules and "accelerate" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
