"""A training step: noise and x_t, forward, loss, backward, AdamW. Stock and its torch.compile beside ours.

All providers have the same weights, batch, noise levels and noise; ours also with gradient checkpointing, which runs
every block again in the backward and keeps only its input, and with its selective mode, which keeps the products'
results too. The first call of each starts from the initial weights: its
loss, gradients and updated weights are compared with the same step of diffusers' network in fp64.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.model_block import CONTEXT_TOKENS, Doubled, as_trained, flops, judge_half, on_triton, saved_bytes
from benchmarks.work import Absent, Inputs, Values, Verdict, Work, compiled
from blip3o_fast import ops
from blip3o_fast.demo.stock import StockBLIP3o
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT

ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}
UNREAD = "dit.pad_token"  # a parameter of stock's that no forward reads


def stock_loss(network: nn.Module, data: Tensor, condition: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """BLIP3-o's objective as its code writes it: a straight path, the velocity noise - data, its mean squared error."""
    level = sigma[:, None, None].to(data.dtype)
    x_t = (1 - level) * data + level * noise
    velocity = network(x_t, 1000 * sigma, condition)
    return F.mse_loss(velocity.to(sigma.dtype), (noise - data).to(sigma.dtype))


def our_loss(network: nn.Module, data: Tensor, condition: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """`FlowMatchingLoss` with the noise and its levels given, as the others have them."""
    x_t = ops.flow_interpolate(data, sigma, noise=noise)
    velocity = network(x_t, 1000 * sigma, condition)
    return ops.flow_matching_loss(velocity, data, sigma, noise=noise)[0]


class Step:
    """One provider: the whole step, over parameters that all providers of a case share, with an optimizer of its own.

    The first call starts from `initial` and returns (loss, every gradient, every updated weight); later ones train on
    and return the loss.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: dict[str, Tensor], initial: dict[str, Tensor]) -> None:
        self.loss, self.parameters, self.initial = loss, parameters, initial
        self.optimizer = torch.optim.AdamW(list(parameters.values()), **ADAMW)  # type: ignore[arg-type]
        self.first = True

    def __call__(self, *batch: Tensor) -> Any:
        checked, self.first = self.first, False
        if checked:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.initial[name])
            self.optimizer.state.clear()
        with torch.enable_grad():
            loss = self.loss(*batch)
            loss.backward()
        gradients = [p.grad.clone() for p in self.parameters.values()] if checked else []  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weights = [p.detach().clone() for p in self.parameters.values()] if checked else []
        return (loss.detach(), *gradients, *weights) if checked else loss.detach()


def judge(
    given: Values, baseline: Values, gold: Values, names: list[str], initial: dict[str, Tensor], dtype: torch.dtype
) -> Verdict:
    """The loss and gradients by the rules for whole models, the update by its distance.

    Wrong: a gradient (fp32) with |g - gold| > 1e-4 |gold| + 1e-6 G, G the largest gradient's norm; an update off by
    more than a hundredth of its norm. Adam's first step is nearly the gradient's sign, so where the exact gradient is
    zero (attn2.norm_k.bias: softmax ignores a constant) the update is that of rounding, and is not judged.
    """
    count = len(names)
    if set(given) != set(gold):
        return Verdict("not the loss, gradients and weights of a first step", None, {})
    gradients = {f"d{name}": f"y{1 + i}" for i, name in enumerate(names)}
    renamed = [{"loss": v["y0"], **{n: v[key] for n, key in gradients.items()}} for v in (given, baseline, gold)]
    verdict = judge_half(*renamed, dtype=dtype)
    loss_error = (given["y0"].double() - gold["y0"]).abs().item() / gold["y0"].abs().item()
    wrong, errors = verdict.wrong, {"loss": loss_error}
    if not loss_error <= 64 * torch.finfo(torch.float32).eps:
        wrong = wrong or f"loss: off by {loss_error:.3e}"
    largest = max(gold[key].norm().item() for key in gradients.values())
    for i, name in enumerate(names):
        exact, key = gold[f"y{1 + i}"].norm().item(), f"y{1 + count + i}"
        distance = (given[f"y{1 + i}"].double() - gold[f"y{1 + i}"]).norm().item()
        if not distance <= 1e-4 * exact + 1e-6 * largest:
            wrong = wrong or f"d{name}: |g - gold| = {distance:.3e} where |gold| = {exact:.3e}"
        if exact > 1e-6 * largest:
            errors[f"d{name}"] = distance / exact
            update = (gold[key] - initial[name].double()).norm().item()
            off = (given[key].double() - gold[key]).norm().item()
            if not off <= 1e-2 * update:
                wrong = wrong or f"{name}: the update is off by {off:.3e} of {update:.3e}"
    return Verdict(wrong, verdict.inexact, errors)


def share(stock: StockBLIP3o, model: BLIP3oDiT) -> StockBLIP3o:
    """Stock over the very parameters of `model`."""
    parameters = dict(model.named_parameters())
    for name, _ in list(stock.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if name != UNREAD:
            setattr(stock.get_submodule(owner), leaf, parameters[name.removeprefix("dit.")])
    return stock


def exact(model: BLIP3oDiT, initial: dict[str, Tensor], given: Inputs) -> Values:
    """The gold: the step of diffusers' modules in fp64."""
    double = copy.deepcopy(model).double()
    parameters = {name: dict(double.named_parameters())[name] for name in initial}
    stock = share(StockBLIP3o.with_weights(model.config, double.state_dict()).double(), double)
    with Doubled():
        first = {name: value.double() for name, value in initial.items()}
        made = Step(functools.partial(stock_loss, stock), parameters, first)(*(a.double() for a in given.args))
    return {f"y{i}": value for i, value in enumerate(made)}


def work(
    batch: int, config: BLIP3oConfig, device: str = "cpu", *, triton: bool | None = None, compile: bool = True
) -> Work:
    """fp32 weights. The batch is given (data [B, T, C], condition [B, L, E], sigma [B], noise [B, T, C])."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        model = BLIP3oDiT(config).train()
        as_trained(model, generator)
        stock = share(StockBLIP3o.with_weights(config, model.state_dict()), model).to(device).train()
    stock.requires_grad_(True)
    slim = copy.copy(model)  # the same layers and parameters, with a switch of its own
    slim.gradient_checkpointing_enable()
    selective = copy.copy(model)
    selective.gradient_checkpointing_enable({"mode": "selective"})
    read = dict(model.named_parameters())
    read.pop("pad_token", None)
    initial = {name: p.detach().clone() for name, p in read.items()}

    def inputs() -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        data = draw(batch, config.num_tokens, config.in_channels)
        condition = draw(batch, CONTEXT_TOKENS, config.cross_attention_dim)
        sigma = torch.rand(batch, generator=generator, device=device)
        return Inputs((data, condition, sigma, draw(*data.shape)), {}, data)

    triton = device == "cuda" if triton is None else triton
    losses: dict[str, Callable[..., Tensor]] = {
        "eager": functools.partial(stock_loss, stock),
        "ours": on_triton(functools.partial(our_loss, model), triton),
        "ours, checkpointing": on_triton(functools.partial(our_loss, slim), triton),
        "ours, selective": on_triton(functools.partial(our_loss, selective), triton),
    }
    sample = inputs()
    # What the selective mode keeps lies beside autograd, where saved_bytes does not look: train_memory measures it.
    kept = {
        name: saved_bytes(loss, Inputs(sample.args, read, sample.upstream))
        for name, loss in losses.items()
        if name != "ours, selective"
    }
    providers: dict[str, Any] = {name: Step(loss, read, initial) for name, loss in losses.items()}
    network = compiled(stock, device, whole=False) if compile else Absent("left out of this run")
    providers["compile"] = (
        network if isinstance(network, Absent) else Step(functools.partial(stock_loss, network), read, initial)
    )
    weights = sum(p.numel() * p.element_size() for p in read.values())
    return Work(
        suite="train_step",
        case={"batch": batch, "layers": config.num_layers, "width": config.hidden_size, "dtype": "float32"},
        inputs=inputs,
        providers={name: providers[name] for name in ("eager", "compile", *list(losses)[1:])},
        gold=lambda given: exact(model, initial, given),
        judge=functools.partial(judge, names=list(read), initial=initial, dtype=torch.float32),
        # weights read twice, their gradient written and read, the two moments and the weights read and written
        bytes_moved={"whole": 10 * weights},
        flops={"whole": config.num_layers * flops(config, batch)["both"]},
        modes=("whole",),
        rotate=False,  # the weights alone are several times the caches
        details={name: f"saves {count / 1e6:.1f} MB" for name, count in kept.items()},
        items=(batch, "samples"),
    )


WIDE = {"in_channels": 1792, "cross_attention_dim": 2048}


@pytest.mark.benchmark(min_rounds=3)  # a step takes seconds
@pytest.mark.parametrize(
    ("batch", "config"),
    [
        pytest.param(4, BLIP3oConfig(num_layers=1, **WIDE), id="1 layer of 1792, 4"),
        pytest.param(16, BLIP3oConfig.preset("small"), id="small, 16", marks=pytest.mark.full),
        pytest.param(4, BLIP3oConfig(num_layers=2, **WIDE), id="2 layers of 1792, 4", marks=pytest.mark.full),
        pytest.param(32, BLIP3oConfig(num_layers=2, **WIDE), id="2 layers of 1792, 32", marks=pytest.mark.full),
    ],
)
def bench_train_step(compare: Callable[[Work], None], bench_device: str, batch: int, config: BLIP3oConfig) -> None:
    compare(work(batch, config, bench_device))
