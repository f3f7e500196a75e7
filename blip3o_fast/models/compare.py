"""Two models that should be the same, side by side: what `fuse` changed on the user's own model.

Rounding differs between any two orders of the same sums, so the difference alone says little: both are also held
against an fp64 copy of the first, and the second should be no further from it than the first is.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_fast.models.compare_layers import in_order, seen_parts
from blip3o_fast.models.peak import peak_bytes
from blip3o_fast.timing import interleaved

# A copy in fp64 holds the weights and, for a while, a block's activations beside them.
_HEADROOM = 1.25


@dataclass(frozen=True)
class Distance:
    """How far a result is from another. relative_l2 is in units of the other's norm; a NaN in either gives NaN."""

    max_abs: float
    relative_l2: float
    cosine: float


@dataclass(frozen=True)
class PartComparison:
    """As in `Comparison`, of what one part of the network gave out: a block, an embedder or the head."""

    name: str
    difference: Distance
    stock_error: Distance | None
    fast_error: Distance | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `print` it, or `to_dict()` for JSON.

    difference: fast against stock. stock_error, fast_error: each against stock in fp64, None where `note` says why.
    stock_seconds, fast_seconds: of one call, medians of `rounds` calls in turn. speedup: the median of their ratios
    within a round. stock_peak_bytes, fast_peak_bytes: allocated by one call at its height (`models.peak`), None where
    that cannot be told. layers: of every block, the embedders and the head, where they were asked for.
    """

    difference: Distance
    stock_error: Distance | None
    fast_error: Distance | None
    stock_seconds: float
    fast_seconds: float
    speedup: float
    rounds: int
    device: str
    dtype: str
    note: str = ""
    stock_peak_bytes: int | None = None
    fast_peak_bytes: int | None = None
    layers: tuple[PartComparison, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'':24}{'max abs':>12}{'relative L2':>14}{'cosine':>14}"]
        for name, distance in (
            ("fast - stock", self.difference),
            ("stock - stock in fp64", self.stock_error),
            ("fast - stock in fp64", self.fast_error),
        ):
            if distance is not None:
                numbers = f"{distance.max_abs:>12.2e}{distance.relative_l2:>14.2e}{distance.cosine:>14.9f}"
                lines.append(f"{name:24}{numbers}")
        if self.note:
            lines.append(f"no comparison with fp64: {self.note}")
        lines.append(
            f"stock {_seconds(self.stock_seconds)}, fast {_seconds(self.fast_seconds)}: {self.speedup:.2f} times as "
            f"fast ({self.device}, {self.dtype}, median of {self.rounds} rounds in turn)"
        )
        if self.stock_peak_bytes is not None and self.fast_peak_bytes is not None:
            stock, fast = (f"{peak / 2**20:.2f} MiB" for peak in (self.stock_peak_bytes, self.fast_peak_bytes))
            lines.append(f"allocated at the height of a call, beside the weights: stock {stock}, fast {fast}")
        if self.layers:
            lines += ["", f"{'':24}{'fast - stock':>40}{'to fp64: stock':>16}{'fast':>12}"]
            lines.append(f"{'':24}{'max abs':>12}{'relative L2':>14}{'cosine':>14}{'max abs':>16}{'max abs':>12}")
        for part in self.layers:
            d, errors = part.difference, (part.stock_error, part.fast_error)
            stock, fast = ("-" if error is None else f"{error.max_abs:.2e}" for error in errors)
            numbers = f"{d.max_abs:>12.2e}{d.relative_l2:>14.2e}{d.cosine:>14.9f}{stock:>16}{fast:>12}"
            lines.append(f"{part.name:24}{numbers}")
        return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Distance:
    """Over all the tensors of a result together, in fp64."""
    a, b = (torch.cat([t.detach().double().flatten() for t in side]) for side in (ours, theirs))
    norm_a, norm_b, error = a.norm(), b.norm(), a - b
    if norm_b == 0:
        return Distance(error.abs().max().item(), error.norm().item(), float(norm_a == 0))
    return Distance(
        error.abs().max().item(), (error.norm() / norm_b).item(), (a @ b / (norm_a * norm_b).clamp_min(1e-300)).item()
    )


def _tensors(result: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a tensor, tuple, list, dict or diffusers' output, in order."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from _tensors(value)


def _in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_double(v) for name, v in value.items()}
    return type(value)(map(_in_double, value)) if type(value) in (tuple, list) else value


def _no_room(model: nn.Module, device: torch.device) -> str:
    """Why a copy in fp64 does not fit, or ''."""
    needed = int(_HEADROOM * 8 * sum(p.numel() for p in [*model.parameters(), *model.buffers()]))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return f"a device of kind {device.type} has no fp64 or does not tell its free memory"
    return f"it needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free" if needed > free else ""


def _gold(stock: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """stock's outputs in fp64, and those of its parts."""
    double = copy.deepcopy(stock).double()
    with torch.autocast(next(stock.parameters()).device.type, enabled=False), seen_parts(double) as seen:
        return list(_tensors(double(*_in_double(list(inputs)), **_in_double(dict(kwargs))))), seen


def _part_by_part(
    stock: nn.Module, fast: nn.Module, run: Callable[[nn.Module], Any], gold: dict[str, Tensor]
) -> tuple[PartComparison, ...]:
    """run: calls a model. gold: the parts' outputs in fp64, or empty."""
    with seen_parts(stock) as expected:
        run(stock)
    with seen_parts(fast) as out:
        run(fast)

    def error(name: str, side: dict[str, Tensor]) -> Distance | None:
        return distance([side[name]], [gold[name]]) if name in gold else None

    found = in_order(stock, expected, out)
    if not found:
        raise ValueError(
            "layers must be False: stock and fast have no blocks in common (a network with layers, norm_out)"
        )
    return tuple(
        PartComparison(name, distance([out[name]], [expected[name]]), error(name, expected), error(name, out))
        for name in found
    )


@torch.no_grad()
def compare(
    stock: nn.Module, fast: nn.Module, *inputs: Any, rounds: int = 5, layers: bool = False, **kwargs: Any
) -> Comparison:
    """Call both models with the same arguments and compare their outputs, their times and their peak memory.

    stock, fast: modules that take `*inputs, **kwargs` and return tensors (or tuples, dicts, diffusers' outputs of
        them). They may share their parameters.
    rounds: timed calls of each, in turn, after one that is not counted.
    layers: also compare what every block, the embedders and the head give out, in one more call of each; the fused path
        is not left for that (`models.compare_layers`).

    The fp64 copy is stock's own forward in fp64 (diffusers still takes the variance of its RMSNorms in fp32 then, which
    costs about 1e-7); it is left out where memory does not allow it. Runs without gradients, in whatever mode (train,
    eval) the models are. Raises ValueError where the outputs cannot be compared.
    """
    for name, model in (("stock", stock), ("fast", fast)):
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    first = next(stock.parameters(), None)
    if first is None:
        raise ValueError("stock has no parameters: there is nothing to compare")
    expected, out = (list(_tensors(model(*inputs, **kwargs))) for model in (stock, fast))
    if not expected or [t.shape for t in expected] != [t.shape for t in out]:
        shapes = [[tuple(t.shape) for t in side] for side in (expected, out)]
        raise ValueError(f"the outputs must be tensors of the same shapes, got {shapes[0]} and {shapes[1]}")
    note, stock_error, fast_error = _no_room(stock, first.device), None, None
    gold_parts: dict[str, Tensor] = {}
    if not note:
        gold, gold_parts = _gold(stock, inputs, kwargs)
        stock_error, fast_error = distance(expected, gold), distance(out, gold)

    def run(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(*inputs, **kwargs)

    def wait() -> None:
        if first.device.type == "cuda":
            torch.cuda.synchronize(first.device)

    parts = _part_by_part(stock, fast, lambda model: run(model)(), gold_parts) if layers else ()
    stock_peak, fast_peak = (peak_bytes(run(model), first.device) for model in (stock, fast))
    times = interleaved({"stock": run(stock), "fast": run(fast)}, rounds=rounds, synchronize=wait)
    return Comparison(
        difference=distance(out, expected),
        stock_error=stock_error,
        fast_error=fast_error,
        stock_seconds=times["stock"].median,
        fast_seconds=times["fast"].median,
        speedup=times["fast"].speedups(times["stock"]).median,
        rounds=rounds,
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        note=note,
        stock_peak_bytes=stock_peak,
        fast_peak_bytes=fast_peak,
        layers=parts,
    )
