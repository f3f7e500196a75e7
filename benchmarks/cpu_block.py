"""One block's inference on a CPU: stock eager, torch.compile, Inductor's freezing, and ours with packed weights.

The frozen compile is the rival: freezing lets Inductor pack the weights for oneDNN. In half precision fp32 eager runs
along, since a speed-up over bf16 alone says little where bf16 is slow.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import machine, model_block
from benchmarks.work import Absent, Inputs, Values, Verdict, Work, error_bound
from blip3o_fast import _ext
from blip3o_fast.models import BLIP3oConfig
from blip3o_fast.models.packed import PackedBlock, run_blocks
from blip3o_fast.models.workspace import Workspace
from blip3o_fast.testing import contract_violation, relative_l2

INT8_ERROR = 0.1  # relative L2 of a block with every large product in 8 bits


class Stock(nn.Module):
    """Stock's sequence as a module: freezing packs the parameters of one."""

    def __init__(self, block: nn.Module, config: BLIP3oConfig, batch: int) -> None:
        super().__init__()
        self.block = block
        self.run = model_block.eager_provider(block, config, batch, "cpu")

    def forward(self, x: Tensor, context: Tensor, temb: Tensor) -> Tensor:
        return self.run(x, context, temb)


def compiled(module: nn.Module, *, freeze: bool) -> Callable[..., Tensor] | Absent:
    """torch.compile of a stock block for one shape, with Inductor's freezing or without."""
    if machine.compiler() is None:
        return Absent("no C++ compiler: torch.compile needs g++ or clang++ on a CPU")
    torch._dynamo.reset()
    run = torch.compile(module.eval(), dynamic=False, fullgraph=True)

    def call(*args: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=freeze):  # read when the first call compiles
            return run(*args)

    return call


def packed(block: nn.Module, config: BLIP3oConfig, storage: str) -> Callable[..., Tensor] | Absent:
    """Our block over packed weights, as `blip3o_fast.sampling.prepare` runs it."""
    if _ext.C is None:
        return Absent(_ext.ERROR)
    grid, packed_block = model_block.make_grid(config, "cpu"), PackedBlock(block, storage, Workspace())

    def run(x: Tensor, context: Tensor, temb: Tensor) -> Tensor:
        packed_block.renew()
        return run_blocks([block], [packed_block], x, temb, context, grid, nn.functional.silu(temb), None)

    return run


def cast(run: Callable[..., Tensor] | Absent, dtype: torch.dtype) -> Callable[..., Tensor] | Absent:
    return run if isinstance(run, Absent) else lambda *args: run(*(a.to(dtype) for a in args))


def exact(block: nn.Module, config: BLIP3oConfig, given: Inputs) -> Values:
    """The gold: stock's sequence in fp64."""
    double = copy.deepcopy(block).double()
    args = [arg.detach().double() for arg in given.args]
    with model_block.Doubled(), torch.no_grad():
        return {"y": model_block.eager_provider(double, config, len(args[0]), "cpu")(*args)}


def judge(given: Values, baseline: Values, gold: Values) -> Verdict:
    """The contract against the first provider; what computes in fewer bits is right within its own bound."""
    y = given["y"]
    error = relative_l2(y, gold["y"])
    wrong = None if error <= max(INT8_ERROR, error_bound(y.dtype)) else f"y: relative L2 error {error:.3e}"
    violation = contract_violation(y, baseline["y"].to(y.dtype), gold["y"])
    return Verdict(wrong, violation and f"y: {violation}", {"y": error})


def work(batch: int, dtype: torch.dtype, config: BLIP3oConfig | None = None) -> Work:
    config = BLIP3oConfig(num_layers=1) if config is None else config
    generator = torch.Generator().manual_seed(0)
    wide = model_block.make_block(config, generator).requires_grad_(False)
    block = wide if dtype == torch.float32 else copy.deepcopy(wide).to(dtype)

    def inputs() -> Inputs:
        x = torch.randn(batch, config.num_tokens, config.hidden_size, generator=generator).to(dtype)
        context = torch.randn(batch, model_block.CONTEXT_TOKENS, config.context_dim, generator=generator).to(dtype)
        temb = torch.randn(batch, config.conditioning_dim, generator=generator).to(dtype)
        return Inputs((x, context, temb), {"x": x, "context": context, "temb": temb}, x)

    stock = Stock(block, config, batch)
    providers: dict[str, Any] = {
        "eager": stock,
        "compile": compiled(stock, freeze=False),
        "frozen": compiled(Stock(block, config, batch), freeze=True),
        "ours": model_block.our_provider(block, config, "cpu"),
    }
    if dtype == torch.float32:
        providers |= {storage: packed(block, config, storage) for storage in ("fp32", "bf16", "int8")}
    else:
        providers["eager_fp32"] = cast(Stock(wide, config, batch), torch.float32)
        providers |= {storage: packed(block, config, storage) for storage in ("bf16", "int8")}
        providers["fp32"] = cast(packed(wide, config, "fp32"), torch.float32)
    return Work(
        suite="cpu_block",
        case={"batch": batch, "dtype": str(dtype).removeprefix("torch.")},
        inputs=inputs,
        providers=providers,
        gold=lambda given: exact(block, config, given),
        judge=judge,
        bytes_moved=model_block.bytes_moved(block, inputs()),
        flops=model_block.flops(config, batch),
        modes=("forward",),
        rotate=False,  # the weights alone are several times the caches
        peers=frozenset({"compile", "frozen", "int8", *(["bf16"] if dtype == torch.float32 else [])}),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def bench_cpu_block(compare: Callable[[Work], None], batch: int, dtype: torch.dtype) -> None:
    compare(work(batch, dtype))
