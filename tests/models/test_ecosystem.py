"""The model under the tools that people put around it: FSDP2, DDP, DCP, accelerate, PEFT, optimizers."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import adjacent, projection_groups
from blip3o_fast.models.nextdit import BLIP3oDiT

TINY = BLIP3oConfig.preset("tiny")


def build(seed: int = 0, **overrides: Any) -> BLIP3oDiT:
    generator = torch.Generator().manual_seed(seed)
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", **overrides), generator=generator)
    with torch.no_grad():
        for block in model.layers:
            block.gate.normal_(generator=generator)
    return model


def batch(seed: int = 1, samples: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states, timestep, context and an upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, 64, 16, generator=g),
        torch.rand(samples, generator=g) * 1000,
        torch.randn(samples, 5, 24, generator=g),
        torch.randn(samples, 64, 16, generator=g),
    )


def reference(model: BLIP3oDiT, steps: int = 1) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of one process over the whole batch, and the parameters after that many steps of SGD."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    *call, upstream = batch()
    out = model(*call)
    for step in range(steps):
        if step:
            optimizer.zero_grad()
        model(*call).backward(upstream)
        if step == 0:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return out.detach(), grads, {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(given: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert set(given) == set(expected)
    largest = max(value.norm().item() for value in expected.values())
    for name, value in expected.items():
        error = (given[name] - value).norm().item()
        assert error <= relative * value.norm().item() + 1e-6 * largest, f"{name}: {error:.2e}"


# ---- two processes -------------------------------------------------------------------------------------------------


def _worker(rank: int, body: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        body(rank, folder)
    finally:
        dist.destroy_process_group()


def on_two_ranks(body: Callable[[int, Path], None], folder: Path) -> None:
    mp.start_processes(_worker, (body, folder), nprocs=2, start_method="fork")


def half(rank: int) -> tuple[list[Tensor], Tensor]:
    """This rank's half of the batch; the upstream gradient is doubled since the ranks' gradients are averaged."""
    *call, upstream = (value[2 * rank : 2 * rank + 2] for value in batch())
    return call, 2 * upstream


def _ddp(rank: int, folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    for overrides in ({}, {"context_projection": False}):
        model = build(**overrides)
        expected_out, grads, after = reference(model, steps=2)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        call, upstream = half(rank)
        for step in range(2):  # the second forward fails where a parameter had no gradient in the first
            optimizer.zero_grad()
            out = wrapped(*call)
            if step == 0:
                torch.testing.assert_close(out, expected_out[2 * rank : 2 * rank + 2], atol=1e-5, rtol=0)
            out.backward(upstream)
            if step == 0:
                assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, grads)
            optimizer.step()
        assert_close(dict(model.named_parameters()), after)


def test_ddp(tmp_path: Path) -> None:
    on_two_ranks(_ddp, tmp_path)


def _fully_shard(rank: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for layers_too, checkpointing in ((True, False), (True, True), (False, False)):
        model = build(num_layers=3)
        expected_out, grads, after = reference(model, steps=2)
        initial = copy.deepcopy(model.state_dict())
        mesh = init_device_mesh("cpu", (2,))
        if layers_too:
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert all(isinstance(p, DTensor) for p in model.parameters())
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for name, value in whole.items():
            assert torch.equal(value, initial[name]), name
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        call, upstream = half(rank)
        for step in range(2):
            optimizer.zero_grad()
            out = model(*call)
            if step == 0:
                torch.testing.assert_close(out, expected_out[2 * rank : 2 * rank + 2], atol=1e-5, rtol=0)
            out.backward(upstream)
            assert all(isinstance(p.grad, DTensor) for p in model.parameters())
            if step == 0:
                assert_close({n: p.grad.full_tensor() for n, p in model.named_parameters()}, grads)
            optimizer.step()
        assert_close({n: p.full_tensor() for n, p in model.named_parameters()}, after)
        model.eval()
        with torch.no_grad():
            assert torch.isfinite(model(*call)).all()


def test_fully_shard(tmp_path: Path) -> None:
    on_two_ranks(_fully_shard, tmp_path)


def _mixed_precision(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build()
    *call, _ = batch()
    mesh, policy = init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # the policy casts the time too; these have no rounding
    call[1] = torch.tensor([1.0, 2.0, 512.0, 640.0])
    expected = build().bfloat16()(call[0].bfloat16(), call[1], call[2].bfloat16())
    out = model(*call)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm().item() <= 2e-2 * expected.norm().item()
    out.backward(torch.randn_like(out))
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_fully_shard_with_mixed_precision(tmp_path: Path) -> None:
    on_two_ranks(_mixed_precision, tmp_path)


# ---- one process ---------------------------------------------------------------------------------------------------


def test_distributed_checkpoint_state_dict() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
    )

    model = build()
    state = get_model_state_dict(model)
    assert list(state) == list(model.state_dict())
    other = build(seed=5)
    set_model_state_dict(other, state)
    *call, upstream = batch()
    assert torch.equal(other(*call), model(*call))
    assert all(adjacent([l.weight for l in group]) for group in projection_groups(other.layers[0]))
    optimizer = torch.optim.AdamW(model.parameters())
    model(*call).backward(upstream)
    optimizer.step()
    names = get_optimizer_state_dict(model, optimizer)["state"]
    assert set(names) == set(model.state_dict())


def test_cpu_offload() -> None:
    from accelerate import cpu_offload

    model = build()
    *call, _ = batch()
    with torch.no_grad():
        expected = model(*call)
        offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu", offload_buffers=True)
        assert all(p.is_meta for p in offloaded.parameters()), "nothing was offloaded"
        out = offloaded(*call)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert all(p.is_meta for p in offloaded.parameters())


@pytest.mark.parametrize("targets", [["to_q"], ["to_q", "to_v", "linear_1"], ["to_out.0", "linear"]], ids="-".join)
def test_lora(targets: list[str], stock_pair: Any, inputs: Any) -> None:
    """An adapter on ours gives what the same adapter on diffusers' own model gives."""
    from peft import LoraConfig, inject_adapter_in_model

    stock, ours = stock_pair(TINY)
    call = inputs(TINY)
    expected_without = stock(*call)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = inject_adapter_in_model(config, stock)
        ours = inject_adapter_in_model(config, ours)
    theirs = {name.removeprefix("backbone."): p for name, p in stock.named_parameters()}
    adapters = {name: p for name, p in ours.named_parameters() if "lora" in name}
    assert adapters and all(p.requires_grad for p in adapters.values())
    with torch.no_grad():
        for name, parameter in adapters.items():
            theirs[name].copy_(parameter)
    out, expected = ours(*call), stock(*call)
    assert (out - expected).abs().max().item() <= 1e-5
    assert not (expected - expected_without).abs().max().item() <= 1e-3, "the adapter does nothing"
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(adapters.values()), upstream)
    expected_grads = torch.autograd.grad(expected, [theirs[name] for name in adapters], upstream)
    assert_close(
        dict(zip(adapters, grads, strict=True)), dict(zip(adapters, expected_grads, strict=True)), relative=1e-4
    )


def test_a_run_of_stock_continues_here(stock_pair: Any, inputs: Any) -> None:
    """Two steps of stock and AdamW; or one, then its weights and optimizer state in ours, and one more."""
    config = BLIP3oConfig.preset("tiny", context_projection=False)
    stock, ours = stock_pair(config)
    call, upstream = inputs(config), torch.randn(2, 16, 8, 8)
    optimizer = torch.optim.AdamW(stock.backbone.parameters(), lr=1e-2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(*call).backward(upstream)
        optimizer.step()

    step(stock, optimizer)
    ours.load_state_dict(stock.backbone.state_dict())
    mine = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(stock, optimizer)
    step(ours, mine)
    theirs = stock.named()
    for name, parameter in ours.named_parameters():
        # Adam divides by the gradient's own size, so a gradient that is zero but for rounding moves by the full step.
        if name != "pad_token" and not name.endswith("attn2.norm_k.bias"):
            assert (parameter - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name
    back = mine.state_dict()
    optimizer.load_state_dict(back)
