"""Every op that is no matrix product on a CPU, at the batch sizes of sampling, as a block calls it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from benchmarks import cases
from benchmarks.work import Work

OPS = [op for op in cases.OPS if op not in cases.WITHOUT_KERNELS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("op", OPS)
def bench_cpu_ops(compare: Callable[[Work], None], op: str, batch: int, dtype: torch.dtype) -> None:
    work = cases.work(cases.module_of(op).case, batch, dtype, "cpu")
    # Stock's sequence and ours: compiling 88 cases takes longer than all the rest (`--op <op>` has torch.compile too).
    providers = {name: work.providers[name] for name in ("eager", "ours")}
    # The op before has just written what this one reads: the inputs stay where they are.
    compare(dataclasses.replace(work, providers=providers, rotate=False, modes=("forward", "both")))
