"""dual_attention: stock's two attentions, gate and sum, torch.compile of them, ours, and two calls of others."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import SIZES, TOKENS, Case, Draw, modes, work
from benchmarks.ops import flash_attention as single
from benchmarks.work import Absent, Work
from blip3o_fast import ops
from blip3o_fast.ops import _attention
from blip3o_fast.ops.dual_attention import BACKENDS

SMALL = {"tokens": 4, "context": 6, "heads": 2, "key_heads": 1, "head_dim": 8}
# As autocast makes them: half-precision projections, the gate an fp32 parameter.
MIXED = {"gate": torch.float32}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _stock(attend: Attend) -> Callable[..., Tensor]:
    """Stock's mixture of two attentions, each by `attend(q, k, v, seen)`."""

    def run(
        qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor,
        seen_self: Tensor, seen: Tensor, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        heads, key_heads = gate.shape[0], v1.shape[2]
        q1, k1, q2 = qkq.split([heads, key_heads, heads], dim=2)
        own = attend(q1, k1, v1, seen_self).to(qkq.dtype)
        cross = attend(q2, k2, v2, seen).to(qkq.dtype)
        return (own + cross * gate.tanh().view(1, 1, -1, 1)).flatten(-2)

    return run


eager = _stock(single.attend)


def ours(
    qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor,
    seen_self: Tensor, seen: Tensor, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    return ops.dual_attention(qkq, v1, k2, v2, gate, mask=mask)


def reference(
    qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor,
    seen_self: Tensor, seen: Tensor, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    return ops.dual_attention_ref(qkq, v1, k2, v2, gate, mask=mask)


def _twice(peer: Callable[..., Any] | Absent) -> Callable[..., Any] | Absent:
    if isinstance(peer, Absent):
        return peer
    return _stock(lambda q, k, v, seen: peer(q, k, v, seen, None))


def case(
    batch: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tokens: int = TOKENS,
    context: int = TOKENS,
    heads: int = 28,
    key_heads: int | None = None,
    head_dim: int = 64,
    masked: bool = False,
) -> Case:
    key_heads = heads if key_heads is None else key_heads
    draw = Draw(dtype, device, seed, dtypes)
    # as the model has them: v1 and v2 the last columns of wider projections
    inputs = {
        "qkq": draw("qkq", batch, tokens, 2 * heads + key_heads, head_dim),
        "v1": draw("v1", batch, tokens, 2 * heads + 2 * key_heads, head_dim)[:, :, -key_heads:],
        "k2": draw("k2", batch, context, key_heads, head_dim),
        "v2": draw("v2", batch, context, 2 * key_heads, head_dim)[:, :, key_heads:],
        "gate": draw("gate", heads),
    }
    mask = draw.mask(batch, context) if masked else None
    ones = [torch.ones(batch, n, dtype=torch.int32, device=device) for n in (tokens, context)]
    read = sum(t.numel() for t in inputs.values()) * dtype.itemsize
    out = batch * tokens * heads * head_dim * dtype.itemsize
    products = 2 * batch * heads * tokens * (tokens + context) * head_dim
    longer = inputs["k2"] if context > tokens else inputs["v1"]
    return Case(
        op="dual_attention",
        sizes={
            "batch": batch,
            "tokens": tokens,
            "context": context,
            "heads": f"{heads}/{key_heads}",
            "head_dim": head_dim,
            "masked": masked,
        },  # fmt: skip
        inputs=inputs,
        given={"seen_self": ones[0], "seen": ones[1] if mask is None else mask.int(), "mask": mask},
        upstream=(draw("qkq", batch, tokens, heads * head_dim),),
        eager=eager,
        ours=ours,
        reference=reference,
        # forward: all inputs -> out. backward: dout and all inputs -> all gradients
        bytes_moved=modes(read + out, 2 * read + out),
        # of both: QK and PV; then QK again, dP, dV, dQ, dK
        flops=modes(2 * products, 5 * products),
        sums=frozenset({"dgate"}),  # a number per head, summed over everything
        chosen=_attention.choose(
            BACKENDS, inputs["qkq"], longer, *inputs.values(), mask, dtype=dtype, differentiable=True
        ),
        peers={n: _twice(p) for n, p in peers.attentions(dtype, grouped=heads != key_heads, masked=masked).items()},
    )


@SIZES
def bench_dual_attention(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
