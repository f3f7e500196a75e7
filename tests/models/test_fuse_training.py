"""Training through a fused network: inside another model, under both checkpointing protocols, across two processes."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from blip3o_fast import fuse, unfuse
from blip3o_fast.models.fuse import FusedNetwork, obstacles

# Where the exact gradient is zero, Adam, which divides by its size, walks on rounding alone: an equal shift of all
# keys changes no softmax.
NO_GRADIENT = ("attn2.norm_k.bias", "pad_token")
BLOCK = "FSDPLuminaNextDiTBlock"


# ---- inside another model --------------------------------------------------------------------------------------------


class Around(PreTrainedModel):
    """A stand-in of BLIP3-o on transformers' base class: a frozen backbone, learned queries, and the network."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, dit: nn.Module, rope: Tensor) -> None:
        super().__init__(PretrainedConfig())
        self.backbone = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True).requires_grad_(False)
        self.queries = nn.Parameter(torch.randn(8, 24))
        self.dit, self.rope = dit, rope
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The tests' own weights stay."""

    def forward(self, prompt: Tensor, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([prompt, self.queries.expand(prompt.shape[0], -1, -1)], dim=1)
        context = self.backbone(tokens)[:, -len(self.queries) :]
        context.retain_grad()
        mask = torch.ones(context.shape[:2], dtype=torch.bool)
        return self.dit(x, timestep, context, mask, self.rope, {}).sample, context


@pytest.fixture
def around(build_lumina: Any, lumina_call: Any) -> Callable[[], Around]:
    def build() -> Around:
        dit = build_lumina()
        return Around(dit, lumina_call(dit)[4]).train()

    return build


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(torch.randn(2, 5, 24), torch.randn(2, 6, 4, 4), torch.rand(2) * 1000) for _ in range(count)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)


def train(model: Any, optimizer: torch.optim.Optimizer, data: Any) -> list[tuple[float, Tensor]]:
    """Each step's loss and the gradient of the network's encoder_hidden_states."""
    run = []
    for prompt, x, timestep in data:
        optimizer.zero_grad()
        out, context = model(prompt, x, timestep)
        loss = (out - x).square().mean()
        loss.backward()
        optimizer.step()
        run.append((loss.item(), context.grad))
    return run


def assert_same_run(run: Any, expected: Any) -> None:
    for (loss, grad), (wanted, wanted_grad) in zip(run, expected, strict=True):
        assert abs(loss - wanted) <= 1e-5
        assert (grad - wanted_grad).norm() <= 1e-4 * wanted_grad.norm()


def reentrant(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 renames it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def non_reentrant(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def by_diffusers(model: Any) -> None:
    assert isinstance(model.dit, ModelMixin)
    model.dit.enable_gradient_checkpointing()


PROTOCOLS = {"diffusers": by_diffusers, "transformers": non_reentrant, "transformers-reentrant": reentrant}


def test_twenty_steps_are_stocks(around: Any) -> None:
    """Stock's class refuses to checkpoint, so one run of it stands beside ours without and under each protocol."""
    stock = around()
    start, data = copy.deepcopy(stock), batches(20)
    expected = train(stock, adamw(stock), data)
    for protocol, switch in {"none": None, **PROTOCOLS}.items():
        fast, runs = fuse(copy.deepcopy(start)), []
        assert isinstance(fast.dit, FusedNetwork) and type(fast) is Around
        if switch is not None:
            switch(fast)
            assert fast.dit.is_gradient_checkpointing
        fast.dit.layers[0].attn1.to_q.register_forward_hook(lambda *_, runs=runs: runs.append(0))
        assert_same_run(train(fast, adamw(fast), data), expected)
        assert len(runs) == (20 if switch is None else 40), f"{protocol}: a block runs twice where it is checkpointed"
        assert fast.queries.grad is not None and fast.backbone.linear1.weight.grad is None
        if protocol.startswith("transformers"):
            fast.activation_checkpointing_disable()
            assert not fast.dit.is_gradient_checkpointing
            assert not isinstance(unfuse(fast).dit, FusedNetwork)


@pytest.mark.parametrize("first", [fuse, unfuse], ids=["fuse-after-20", "unfuse-after-20"])
def test_one_optimizer_across_the_change(first: Any, around: Any) -> None:
    """20 steps one way and 20 the other, with one optimizer, are 40 steps of stock."""
    stock = around()
    start = {name: p.detach().clone() for name, p in stock.named_parameters()}
    other, data = copy.deepcopy(stock), batches(40)
    expected = train(stock, adamw(stock), data)
    if first is unfuse:
        fuse(other)
    optimizer = adamw(other)
    run = train(other, optimizer, data[:20])
    first(other)
    assert isinstance(other.dit, FusedNetwork) == (first is fuse)
    run += train(other, optimizer, data[20:])
    assert_same_run(run, expected)
    assert expected[-1][0] < expected[0][0], "nothing was learned"
    (ours, _), (theirs, _) = other(*data[0]), stock(*data[0])
    assert (ours - theirs).abs().max() <= 1e-5
    for name, p in stock.named_parameters():
        if p.requires_grad and not name.endswith(NO_GRADIENT):
            moved = (p - start[name]).norm()
            assert moved > 0 and (other.get_parameter(name) - p).norm() <= 1e-2 * moved, name


# ---- gradient checkpointing of the network alone ---------------------------------------------------------------------


def test_checkpointing_changes_no_gradient(build_lumina: Any, lumina_call: Any) -> None:
    """Every parameter, the tokens and the context, masked, in training mode; nothing is run twice in eval mode."""
    model = fuse(build_lumina(num_layers=3, num_attention_heads=4, num_kv_heads=2)).train()
    call = lumina_call(model)
    upstream = torch.randn_like(model(*call).sample)

    def gradients() -> dict[str, Tensor]:
        x, context = (call[i].clone().requires_grad_() for i in (0, 2))
        model.zero_grad()
        model(x, call[1], context, *call[3:]).sample.backward(upstream)
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {**named, "x": x.grad, "context": context.grad}

    expected = gradients()
    assert set(expected) == {name for name, _ in model.named_parameters()} - {"pad_token"} | {"x", "context"}
    model.enable_gradient_checkpointing()
    given = gradients()
    largest = max(g.norm() for g in expected.values())
    for name, grad in expected.items():
        assert (given[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name
    model.disable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(gradients().values(), expected.values(), strict=True))


# ---- two processes ---------------------------------------------------------------------------------------------------


def _worker(rank: int, body: Callable[..., None], folder: Path, *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        body(rank, *args)
    finally:
        dist.destroy_process_group()


def on_two_ranks(body: Callable[..., None], folder: Path, *args: Any) -> None:
    mp.start_processes(_worker, (body, folder, *args), nprocs=2, start_method="fork")


def plain_steps(stock: Any, call: list[Any], upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output of one process over the whole batch, and the parameters after two steps of SGD."""
    model = copy.deepcopy(stock)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    outs = []
    for _ in range(2):
        optimizer.zero_grad()
        outs.append(model(*call).sample)
        outs[-1].backward(upstream)
        optimizer.step()
    return outs[0].detach(), {name: p.detach() for name, p in model.named_parameters()}


def two_steps_of_half(rank: int, model: Any, call: list[Any], upstream: Tensor) -> Tensor:
    """On this rank's half; the ranks' gradients are averaged, so the upstream gradient is doubled."""
    mine = slice(2 * rank, 2 * rank + 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    outs = []
    for _ in range(2):
        optimizer.zero_grad()
        outs.append(model(*(value[mine] for value in call[:4]), *call[4:]).sample)
        outs[-1].backward(2 * upstream[mine])
        optimizer.step()
    return outs[0].detach()


def _ddp(rank: int, stock: Any, call: list[Any], upstream: Tensor, expected: Tensor, after: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    for fused_last in (False, True):
        model = copy.deepcopy(stock)
        wrapped = DistributedDataParallel(model if fused_last else fuse(model))
        fuse(wrapped)
        assert isinstance(model, FusedNetwork) and obstacles(wrapped) == {}
        out = two_steps_of_half(rank, wrapped, call, upstream)
        torch.testing.assert_close(out, expected[2 * rank : 2 * rank + 2], atol=1e-5, rtol=0)
        for name, p in model.named_parameters():
            assert (p - after[name]).norm() <= 1e-5 * after[name].norm(), name


def _fully_shard(rank: int, stock: Any, call: list[Any], upstream: Tensor, expected: Tensor, after: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, called = init_device_mesh("cpu", (2,)), set()
    seen = nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.add(type(module).__name__))
    for layers_too, checkpointing in ((False, False), (True, False), (True, True)):
        model = fuse(copy.deepcopy(stock))
        for layer in model.layers if layers_too else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if checkpointing:
            model.enable_gradient_checkpointing()
        called.clear()
        out = two_steps_of_half(rank, model.train(), call, upstream)
        # A block that is sharded by itself must be called, so it runs its own forward; else all are read.
        assert {name for name in called if name.endswith("Block")} == ({BLOCK} if layers_too else set())
        torch.testing.assert_close(out, expected[2 * rank : 2 * rank + 2], atol=1e-5, rtol=0)
        for name, p in model.named_parameters():
            assert (p.full_tensor() - after[name]).norm() <= 1e-5 * after[name].norm(), name
        with pytest.raises(ValueError, match="was sharded"):
            unfuse(model)
    seen.remove()
    sharded = fully_shard(copy.deepcopy(stock), mesh=mesh)
    with pytest.raises(ValueError, match="is sharded .fully_shard.: fuse it first"):
        fuse(sharded)


@pytest.mark.parametrize("body", [_ddp, _fully_shard], ids=["ddp", "fully_shard"])
def test_two_processes(body: Any, build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    """Two steps over halves of a batch are two steps of stock over all of it."""
    stock = build_lumina()
    stock.pad_token.requires_grad_(False)  # it takes part in nothing, for which DDP would wait, with stock too
    call = lumina_call(stock, batch=4)
    upstream = torch.randn(4, 6, 4, 4)
    expected, after = plain_steps(stock, call, upstream)
    on_two_ranks(body, tmp_path, stock, call, upstream, expected, after)
