"""Every op again and again: the same bits in each run, on another stream, compiled, and in a CUDA graph."""

import pytest
import torch

from benchmarks.cases import OPS, WITHOUT_KERNELS, Case, module_of
from benchmarks.gpu_timing import capture, prepared, written
from benchmarks.work import Inputs
from blip3o_fast.ops import use_backend
from blip3o_fast.testing import assert_deterministic, assert_same, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*determinis")]
F32, BF16 = torch.float32, torch.bfloat16


def make(op: str, dtype: torch.dtype, batch: int, device: str, sized) -> Case:
    masked = {"masked": True} if op in ("flash_attention", "dual_attention") else {}
    return module_of(op).case(batch, dtype, device, **sized({}, module_of(op).SMALL), **masked)


def run(case: Case) -> dict[str, torch.Tensor]:
    return with_gradients(case.bound(case.ours), case.inputs, *case.upstream)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_twenty_runs_have_the_same_bits(device, sized, op, backend, dtype):
    """A race between programs shows as a run that differs."""
    case = make(op, dtype, sized(32, 2), device, sized)
    with use_backend(backend):
        first = run(case)
        assert all(value.isfinite().all() for value in first.values())
        for _ in range(sized(19, 1)):
            assert_same(run(case), first)


@pytest.mark.parametrize("op", OPS)
def test_deterministic_with_and_without_pytorchs_switch(device, sized, op, backend):
    case = make(op, F32, sized(3, 1), device, sized)
    with use_backend(backend):
        assert_deterministic(case.bound(case.ours), case.inputs, *case.upstream)


# not a vendor's GEMM, which may take another kernel, nor a loss, which is a number of the whole batch
@pytest.mark.parametrize("op", [op for op in OPS if op not in (*WITHOUT_KERNELS, "flow_matching_loss")])
def test_a_sample_does_not_depend_on_its_batch(device, sized, op, backend):
    """Row b of the output is the same alone and among others."""
    case = make(op, BF16, sized(32, 3), device, sized)
    batch = sized(32, 3)
    per_sample = [n for n, t in case.inputs.items() if t is not None and t.dim() > 1]
    with use_backend(backend), torch.no_grad():
        whole = case.bound(case.ours)(**case.inputs)
        part = {n: t[1:2] if n in per_sample else t for n, t in case.inputs.items()}
        rest = {n: t[1:2] if t is not None and t.dim() and len(t) == batch and n != "rope" else t
                for n, t in case.given.items()}  # fmt: skip
        alone = Case(**{**vars(case), "given": rest}).bound(case.ours)(**part)
    for y, x in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (whole, alone)), strict=True):
        assert torch.equal(y[1:2], x)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_compiled_whole(device, dry, sized, op, backend, dtype):
    """`torch.compile(fullgraph=True)`, forward and backward; on a device by inductor."""
    torch._dynamo.reset()
    case = make(op, dtype, sized(8, 2), device, sized)
    function = case.bound(case.ours)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if dry else "inductor")
    with use_backend(backend):
        results = with_gradients(compiled, case.inputs, *case.upstream)
        assert_same(results, run(case))


@pytest.mark.parametrize("op", OPS)
def test_on_another_stream(cuda_only, device, sized, op, backend):
    case = make(op, BF16, 32, device, sized)
    stream = torch.cuda.Stream()
    with use_backend(backend):
        expected = run(case)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = run(case)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
    assert_same(results, expected)


@pytest.mark.parametrize("mode", ["forward", "backward", "both", "inference"])
@pytest.mark.parametrize("op", OPS)
def test_a_replayed_graph_writes_the_same_bits(device, sized, op, backend, mode):
    """What `scripts/gpu_check.py` times; in a dry run without the graph."""
    case = make(op, BF16, sized(8, 2), device, sized)
    names = (*case.inputs, *case.given)
    wrt = {n: t.requires_grad_() for n, t in case.inputs.items() if t is not None}
    upstream = case.upstream if len(case.upstream) > 1 else case.upstream[0]
    inputs = Inputs((*case.inputs.values(), *case.given.values()), wrt, upstream)
    ours = case.bound(case.ours)

    def provider(*tensors):
        with use_backend(backend):
            return ours(**{n: t for n, t in zip(names, tensors, strict=True) if n in case.inputs})

    replay = capture(prepared(provider, inputs, mode), device)
    results = written(replay, inputs)
    with use_backend(backend):
        expected = run(case)
    assert results and set(results) <= set(expected)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name
