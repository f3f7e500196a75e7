"""The network on the triton backend against stock's sequence, outputs and gradients; sampling; torch.compile."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_timing import capture
from benchmarks.model_block import Doubled, as_trained, judge_half
from blip3o_fast import ops
from blip3o_fast.flow.loss import network_output
from blip3o_fast.flow.solvers import SOLVERS
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.sampling import Sampler, sample
from blip3o_fast.testing import assert_contract

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*determinis")]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TINY = {"sample_size": 2, "num_attention_heads": 8}  # 4 tokens, for the interpreter; heads for a gradient per head


class Stock(nn.Module):
    """The model's weights under stock's sequence of operations."""

    def __init__(self, model: BLIP3oDiT) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_mask=None) -> Tensor:
        return eager_forward(self.model, hidden_states, timestep, encoder_hidden_states, encoder_mask)


def trained(config: BLIP3oConfig, device: str, dtype: torch.dtype = F32) -> BLIP3oDiT:
    model = BLIP3oDiT(config)
    as_trained(model, torch.Generator().manual_seed(0))
    return model.to(device, dtype)


def configuration(name: str, dry: bool) -> BLIP3oConfig:
    if dry:
        return BLIP3oConfig.preset("tiny", num_layers=1 if name == "one block" else 2, **TINY)
    return BLIP3oConfig(num_layers=1) if name == "one block" else BLIP3oConfig.preset("small", num_attention_heads=8)


def arguments(config: BLIP3oConfig, batch: int, device: str, dtype: torch.dtype, masked: bool) -> tuple:
    x = torch.randn(batch, config.num_tokens, config.in_channels, device=device).to(dtype)
    context = torch.randn(batch, 9, config.cross_attention_dim, device=device).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, 9, device=device) < 0.6
        mask[:, 4] = True
    return x, 1000 * torch.rand(batch, device=device), context, mask


def outcome(call, model: nn.Module, given: tuple, upstream: Tensor, autocast=None) -> dict[str, Tensor]:
    """Output and the gradient of every weight and of both inputs."""
    x, time, context, mask = given
    x, context = (t.detach().requires_grad_() for t in (x, context))
    leaves = {"x": x, "context": context} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    with nullcontext() if autocast is None else torch.autocast(x.device.type, autocast):
        y = call(x, time, context, mask)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_like_stock(ours, model: BLIP3oDiT, given: tuple, autocast=None) -> None:
    """|value - gold| at most twice stock's, for the output and every gradient (benchmarks/model_block.py)."""
    upstream = torch.randn_like(given[0])
    with ops.use_backend("triton"):
        results = outcome(ours, model, given, upstream, autocast)
    stock = outcome(Stock(model), model, given, upstream, autocast)
    double = copy.deepcopy(model).double()
    wide = tuple(t.double() if t is not None and t.is_floating_point() else t for t in given)
    with Doubled():
        gold = outcome(Stock(double), double, wide, upstream.double())
    verdict = judge_half(results, stock, gold, dtype=autocast or model.dtype)
    assert verdict.wrong is None and verdict.inexact is None, verdict.wrong or verdict.inexact
    assert_contract(results["y"], stock["y"].to(results["y"].dtype), gold["y"])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast bf16", "autocast fp16"])
@pytest.mark.parametrize("name", ["small", "one block"])
def test_outputs_and_gradients_are_stocks(device, dry, sized, name, kind, masked):
    config = configuration(name, dry)
    model = trained(config, device, BF16 if kind == "bf16" else F32)
    given = arguments(config, sized(8, 2), device, model.dtype, masked)
    autocast = {"autocast bf16": BF16, "autocast fp16": F16}.get(kind)
    assert_like_stock(model, model, given, autocast)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_compiled_whole(device, dry, dtype):
    """`torch.compile(fullgraph=True)`, forward and backward; on a device by inductor."""
    torch._dynamo.reset()
    model = trained(configuration("small", dry), device, dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if dry else "inductor")
    assert_like_stock(compiled, model, arguments(model.config, 2, device, dtype, masked=True))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_sampling_run(device, dry, sized, dtype, guidance):
    model = trained(configuration(sized("small", "one block"), dry), device, dtype).eval()
    config = model.config
    condition = torch.randn(3, 9, config.cross_attention_dim, device=device)
    noise = torch.randn(3, config.num_tokens, config.in_channels, device=device)
    settings = {"num_steps": sized(3, 2), "guidance_scale": guidance}
    with ops.use_backend("triton"):
        ours = sample(model, condition, noise=noise, **settings)
        again = sample(model, condition, noise=noise, **settings)
    assert torch.equal(ours, again)
    stock = sample(Stock(model), condition, noise=noise, **settings)
    double = copy.deepcopy(model).double()
    # The condition is rounded to the network's dtype; the gold starts from the same numbers.
    gold = sample(double, condition.to(dtype).double(), noise=noise.double(), **settings)
    assert ours.dtype == F32
    assert_contract(ours, stock, gold)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_sampling_step_in_a_graph(cuda_only, device, dtype):
    """Captured once, replayed for other states and noise levels: the bits of the same step outside of the graph."""
    model = trained(configuration("small", False), device, dtype).eval()
    config = model.config
    context = torch.randn(3, 9, config.cross_attention_dim, device=device).to(dtype)
    x = torch.randn(3, config.num_tokens, config.in_channels, device=device)
    sigma, dsigma, guidance = (torch.full((), value, device=device) for value in (1.0, -1 / 30, 3.0))

    with torch.no_grad(), ops.use_backend("triton"):
        made = model.prepare_condition(torch.cat([torch.zeros_like(context), context]))

        def step() -> dict[str, Tensor]:
            with torch.no_grad():
                x_t = torch.cat([x, x]).to(dtype)
                output = network_output(model, x_t, sigma, made, time_convention=config.time_convention)
                null, conditional = output.chunk(2)
                return {"y": ops.ode_step(x, conditional, null, guidance, dsigma)}

        replay = capture(lambda: step, device)
        for level in (1.0, 0.7, 0.03):
            sigma.fill_(level)
            x.normal_()
            expected = step()["y"]
            replay.result["y"].fill_(torch.nan)
            replay.run()
            torch.cuda.synchronize()
            assert torch.equal(replay.result["y"], expected), level


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_samplers_graphs(cuda_only, device, dtype, solver, masked):
    """Whole runs by replay: the bits of the same runs without graphs, after a change of weights too."""
    model = trained(configuration("small", False), device, dtype).eval()
    config, weight = model.config, model.norm_out.linear_2.weight
    sampler, eager = Sampler(model), Sampler(model, max_graphs=0)
    mask = (torch.arange(9, device=device) < 6).expand(3, 9) if masked else None
    results = []

    def compare(**call) -> int:
        """Graphs that were captured for it."""
        before = sampler.graphs.captures
        call |= {"num_steps": 4, "solver": solver, "encoder_mask": mask}
        call["noise"] = torch.randn(3, config.num_tokens, config.in_channels, device=device)
        condition = torch.randn(3, 9, config.cross_attention_dim, device=device)
        expected, ours = eager(condition, **call), sampler(condition, **call)
        assert sampler.graphs.reason is None, sampler.graphs.describe()
        assert torch.equal(ours, expected)
        results.append((ours, expected))
        return sampler.graphs.captures - before

    sampler.warmup((3,), num_steps=4, solver=solver, context_tokens=9)
    kinds = sampler.graphs.captures
    assert kinds == (2 if solver == "ab2" else 1), sampler.graphs.describe()
    assert compare() == (kinds if masked else 0)
    assert compare(guidance_scale=5.0) == 0
    assert compare(guidance_scale=1.0) == kinds
    assert compare(guidance_start=0.8, guidance_end=0.3) >= 1
    with torch.no_grad():
        weight.mul_(1.5)
    assert compare() == 0
    weight.data = 1.5 * weight.data
    assert compare() == kinds
    assert all(torch.equal(ours, expected) for ours, expected in results)  # the caller's own
