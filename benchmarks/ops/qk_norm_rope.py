"""qk_norm_rope of q1, k1 and q2: stock's LayerNorms and complex rotation, torch.compile of them, and ours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import SIZES, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.models.eager import _rotate
from blip3o_fast.ops.qk_norm_rope import BACKENDS

SMALL = {"grid": (2, 2), "heads": (2, 1, 2), "head_dim": 8}
# As autocast makes them: half-precision projection, fp32 norm parameters.
MIXED = {"norm": torch.float32}


def eager(x: Tensor, rope: Tensor | None, *, heads: Sequence[int], head_dim: int, **norms: Tensor) -> Tensor:
    """Stock: LayerNorm of each projection, view as heads, complex rotation, cast back."""
    groups = []
    for i, z in enumerate(x.split([h * head_dim for h in heads], dim=-1)):
        weight, bias = norms.get(f"weight{i}"), norms.get(f"bias{i}")
        z = z if weight is None else F.layer_norm(z, z.shape[-1:], weight, bias, 1e-5)
        group = z.unflatten(-1, (-1, head_dim))
        group = group if rope is None else _rotate(group, torch.view_as_complex(rope).unsqueeze(0))
        groups.append(group.to(x.dtype))
    return torch.cat(groups, dim=2)


def _packed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op with its lists of weights and biases given by name: weight0, bias0, ..."""

    def run(x: Tensor, rope: Tensor | None, *, heads: Sequence[int], head_dim: int, **norms: Tensor) -> Tensor:
        weights, biases = ([norms.get(f"{name}{i}") for i in range(len(heads))] for name in ("weight", "bias"))
        return function(x, weights, biases, rope, heads=heads, head_dim=head_dim)

    return run


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    grid: tuple[int, int] = (8, 8),
    heads: Sequence[int] = (28, 28, 28),
    head_dim: int = 64,
    normed: Sequence[bool] = (True,),
    rotated: bool = True,
) -> Case:
    """normed: which groups have a norm, repeated to the number of groups."""
    draw, tokens, columns = Draw(dtype, device, seed, dtypes), grid[0] * grid[1], sum(heads) * head_dim
    # a column slice of a wider projection, as in the model, where v1 follows
    x = draw("x", batch, tokens, columns + heads[1 % len(heads)] * head_dim, scale=2, shift=0.5)[..., :columns]
    inputs: dict[str, Any] = {"x": x}
    for i, count in enumerate(heads):
        if normed[i % len(normed)]:
            inputs[f"weight{i}"] = draw("norm", count * head_dim, scale=0.1, shift=1)
            inputs[f"bias{i}"] = draw("norm", count * head_dim, scale=0.1)
    rope = ops.rope_table(*grid, head_dim, device="cpu").to(device) if rotated else None
    elements, table = batch * tokens * columns, 0 if rope is None else rope.numel() * 4
    parameters = sum(t.numel() for name, t in inputs.items() if name != "x")
    return Case(
        op="qk_norm_rope",
        sizes={"batch": batch, "tokens": tokens, "heads": "+".join(map(str, heads)), "head_dim": head_dim},
        inputs=inputs,
        given={"rope": rope},
        settings={"heads": tuple(heads), "head_dim": head_dim},
        upstream=(draw("x", batch, tokens, sum(heads), head_dim),),
        eager=eager,
        ours=_packed(ops.qk_norm_rope),
        reference=_packed(ops.qk_norm_rope_ref),
        # forward: x, parameters, table -> y. backward: dy, x, weights, statistics, table -> dx, dweights, dbiases
        bytes_moved=modes(
            (2 * elements + parameters) * dtype.itemsize + table,
            (3 * elements + 3 * parameters // 2) * dtype.itemsize + table + 8 * batch * tokens * len(heads),
        ),
        flops=modes(13 * elements, 25 * elements),
        chosen=BACKENDS.choose(x, *list(inputs.values())[1:], rope),
    )


@SIZES
def bench_qk_norm_rope(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
