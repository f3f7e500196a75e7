"""How many launches the model takes, stock beside ours, counted on tensors without data: no GPU is needed.

    python scripts/launch_report.py                  table of block, forward, training step and sampling step
    python scripts/launch_report.py --json rows.json the same as data

From outside, a `TorchDispatchMode` counts what reaches the dispatcher and computes (no views, no allocations); each of
our ops is one such call there. Inside, the launcher counts the kernels of each op, finalising ones included. A block's
count is the difference between a model with one layer more and one without. Attention by PyTorch counts as the one
launch that it is at best. Bytes are those of the tensors that every launch reads and writes.
"""

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import ops
from blip3o_fast.files import replacing
from blip3o_fast.kernels._launch import assumed_capability, bytes_of, recording, recording_calls
from blip3o_fast.models.condition import prepare
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.models.forward import Grid, block_forward, modulate
from blip3o_fast.models.launches import fake_model
from blip3o_fast.models.rope import kept_rope_table

_LINEAR = importlib.import_module("blip3o_fast.ops.merged_linear")  # the package's name is the function
_MERGED_LINEAR = {"merged_linear_fwd": _LINEAR._forward, "merged_linear_bwd": _LINEAR._backward}
_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "alias",
}


class Counting(TorchDispatchMode):
    """Counts what computes (views and allocations launch nothing) and the bytes of its tensors.

    outside: by name, each of our ops as the one call that it is. inside: PyTorch's own operations, those that
    merged_linear consists of too; the kernels of our other ops are counted where they are launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside: Counter[str] = Counter()
        self.inside = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _MERGED_LINEAR:
            self.outside[str(func)] += 1
            inner = Counting()
            with inner:
                result = _MERGED_LINEAR[name](*args, **(kwargs or {}))
            self.inside += inner.inside
            self.bytes += inner.bytes
            return result
        result = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        # What returns no numbers launches nothing: questions about dtypes, empty tensors, the profiler's marks.
        if not views and bytes_of(result) and name not in _ALLOCATIONS:
            self.outside[str(func)] += 1
            if func.namespace != "blip3o_fast":
                self.inside += 1
                self.bytes += bytes_of(args) + bytes_of(result)
        return result


@dataclass(frozen=True)
class Cost:
    """dispatched: what the dispatcher sees, our ops as one each; launches: with each op's kernels; bytes: moved."""

    dispatched: int
    launches: int
    bytes: int

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.dispatched - other.dispatched, self.launches - other.launches, self.bytes - other.bytes)


def cost(run: Callable[[], Any]) -> Cost:
    # The mode for counting is the inner one: it sees the calls before the fake tensors swallow them.
    with recording_calls() as calls, Counting() as counting:
        run()
    return Cost(
        dispatched=sum(counting.outside.values()),
        launches=counting.inside + sum(len(call.launches) for call in calls),
        bytes=counting.bytes + sum(call.moved_bytes for call in calls),
    )


@dataclass(frozen=True)
class Setting:
    """dtype of the weights and of autocast (None: none); batch."""

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    batch: int = 32

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=self.dtype if dtype is None else dtype)

    def context(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


SETTINGS = {
    "bfloat16": Setting("bfloat16", torch.bfloat16),
    "autocast": Setting("autocast", torch.float32, torch.bfloat16),
}


def _inputs(setting: Setting, config: BLIP3oConfig) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = setting.batch, config.num_tokens
    return (
        setting.tensor(batch, config.in_channels, config.sample_size, config.sample_size),
        setting.tensor(batch, dtype=torch.float32),
        setting.tensor(batch, tokens, config.cross_attention_dim),
    )


def model_cost(setting: Setting, layers: int, *, stock: bool, train: bool) -> Cost:
    """A forward of the whole model, or with its backward."""
    config = BLIP3oConfig(num_layers=layers)
    model = fake_model(config, setting.dtype).train(train)
    x, timestep, context = _inputs(setting, config)
    kept_rope_table(config.sample_size, config.sample_size, config.head_dim, x.device)

    def run() -> None:
        with torch.set_grad_enabled(train):
            with setting.context():
                y = eager_forward(model, x, timestep, context) if stock else model(x, timestep, context)
            if train:
                y.backward(torch.empty_like(y))

    return cost(run)


def train_step_cost(setting: Setting, layers: int, *, stock: bool) -> Cost:
    """Noise, x_t, forward, loss with its metrics, backward; the optimizer is the same for both and left out."""
    config = BLIP3oConfig(num_layers=layers)
    model = fake_model(config, setting.dtype).train()
    _, _, context = _inputs(setting, config)
    data = setting.tensor(setting.batch, config.num_tokens, config.in_channels, dtype=torch.float32)
    sigma, seed = setting.tensor(setting.batch, dtype=torch.float32), torch.empty(2, dtype=torch.int64)

    def stock_run() -> None:
        noise, level = torch.randn_like(data), sigma[:, None, None]
        x = ((1 - level) * data + level * noise).to(setting.dtype)
        image = x.transpose(1, 2).unflatten(2, (config.sample_size, config.sample_size))
        with setting.context():
            y = eager_forward(model, image, 1000 * sigma, context)
        y = y.flatten(2).transpose(1, 2).float()
        target = noise - data
        loss = torch.nn.functional.mse_loss(y, target)
        with torch.no_grad():
            torch.nn.functional.cosine_similarity(y, target, dim=-1).mean()
            (y - target).norm(dim=-1).mean(), y.norm(dim=-1).mean(), target.norm(dim=-1).mean()
            10 * torch.log10(target.square().mean() / loss)
        loss.backward()

    def our_run() -> None:
        x = ops.flow_interpolate(data, sigma, seed=seed)
        with setting.context():
            y = model(x.to(setting.dtype), 1000 * sigma, context)
        ops.flow_matching_loss(y, data, sigma, seed=seed)[0].backward()

    return cost(stock_run if stock else our_run)


def sampling_step_cost(setting: Setting, layers: int, *, stock: bool) -> Cost:
    """A guided step. Stock runs the whole network; ours has the condition and every block's modulation made before."""
    config = BLIP3oConfig(num_layers=layers)
    model = fake_model(config, setting.dtype).eval()
    x, timestep, context = _inputs(setting, config)
    half = setting.batch // 2
    latents = setting.tensor(half, *x.shape[1:], dtype=torch.float32)
    number = torch.empty((), dtype=torch.float32)
    rope = kept_rope_table(config.sample_size, config.sample_size, config.head_dim, x.device)
    tokens = setting.tensor(setting.batch, config.num_tokens, config.hidden_size)
    conditioning = setting.tensor(setting.batch, 1024)

    def stock_run() -> None:
        with setting.context():
            v = eager_forward(model, x, timestep, context)
        v_uncond, v_cond = v.float().chunk(2)
        latents + number * (v_uncond + number * (v_cond - v_uncond))

    with torch.no_grad(), setting.context():
        prepared = prepare(model, context, None)
        modulations = [modulate(block, conditioning) for block in model.layers]

    def our_run() -> None:
        h, normed, grid = tokens, torch.empty_like(tokens), Grid(rope)
        with setting.context():
            for i, block in enumerate(model.layers):
                last = i + 1 == len(model.layers)
                h, normed, _ = block_forward(
                    block, h, conditioning, context, grid, normed=normed, modulation=modulations[i],
                    following=None if last else model.layers[i + 1],
                    following_modulation=None if last else modulations[i + 1], key_value=prepared.keys_values[i],
                )  # fmt: skip
        ops.ode_step(latents, torch.empty_like(latents), torch.empty_like(latents), number, number)

    with torch.no_grad():
        return cost(stock_run if stock else our_run)


def rows() -> list[dict[str, Any]]:
    """One row per piece of work and setting: stock and ours, each a Cost."""
    works: dict[str, Callable[[Setting, int, bool], Cost]] = {
        "forward": lambda s, n, stock: model_cost(s, n, stock=stock, train=False),
        "forward and backward": lambda s, n, stock: model_cost(s, n, stock=stock, train=True),
        "training step": lambda s, n, stock: train_step_cost(s, n, stock=stock),
        "sampling step, hoisted": lambda s, n, stock: sampling_step_cost(s, n, stock=stock),
    }
    found = []
    # Recording all the while: what is prepared outside of a count has no data either.
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # a rotary table that was made before is a real tensor
    with recording(), fake, assumed_capability(90), ops.use_backend("triton"):
        for setting in SETTINGS.values():
            for work, measure in works.items():
                small, large = (
                    {kind: measure(setting, n, kind == "stock") for kind in ("stock", "ours")} for n in (2, 3)
                )
                for kind in ("stock", "ours"):
                    block = large[kind] - small[kind]
                    whole = Cost(*(small[kind].__dict__[f] + 22 * block.__dict__[f] for f in Cost.__dataclass_fields__))
                    found += [
                        {"what": f"block: {work}", "setting": setting.name, "who": kind, **asdict(block)},
                        {"what": f"24 blocks: {work}", "setting": setting.name, "who": kind, **asdict(whole)},
                    ]
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':36} {'':9} {'launches':>17} {'seen outside':>17} {'MiB moved':>19}",
        f"{'':36} {'weights':9} {'stock':>8} {'ours':>8} {'stock':>8} {'ours':>8} {'stock':>9} {'ours':>9}",
    ]
    for stock, ours in zip(found, found[2:], strict=False):
        if stock["who"] == "stock" and ours["who"] == "ours" and stock["what"] == ours["what"]:
            lines.append(
                f"{stock['what']:36} {stock['setting']:9} {stock['launches']:>8} {ours['launches']:>8} "
                f"{stock['dispatched']:>8} {ours['dispatched']:>8} "
                f"{stock['bytes'] / 2**20:>9.0f} {ours['bytes'] / 2**20:>9.0f}"
            )
    return "\n".join(lines)


def report(doc: str, rows: Callable[[], list[dict[str, Any]]], table: Callable[..., str], arguments: list[str]) -> int:
    """The command of a report: print the table of the rows; --json keeps them. doc: its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    found = rows()
    print(table(found))
    if options.json:
        with replacing(options.json) as beside:
            beside.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(report(__doc__, rows, table, sys.argv[1:]))
