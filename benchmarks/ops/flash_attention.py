"""flash_attention: stock's call of PyTorch's attention, its torch.compile, ours, and what others have made of it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.cases import SIZES, TOKENS, Case, Draw, modes, work
from benchmarks.work import Work
from blip3o_fast import ops
from blip3o_fast.ops import _attention
from blip3o_fast.ops.flash_attention import BACKENDS

SMALL = {"tokens": 4, "context": 6, "heads": 2, "key_heads": 1, "head_dim": 8}
# As autocast makes them where the context was made outside of it.
MIXED = {"k": torch.float32}


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Stock's attention [B, T, H, d]: key heads repeated, the mask expanded to every head and query, one call."""
    repeats, dtype = q.shape[2] // k.shape[2], torch.promote_types(q.dtype, k.dtype)
    k, v = (t.to(dtype).unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3) for t in (k, v))
    mask = seen.bool().view(k.shape[0], 1, 1, k.shape[1]).expand(-1, q.shape[2], q.shape[1], -1)
    q, k, v = (t.transpose(1, 2) for t in (q.to(dtype), k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
    """seen: int [B, Tk], which stock makes and hands over also where nothing is hidden."""
    return attend(q, k, v, seen).to(q.dtype)


def ours(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
    return ops.flash_attention(q, k, v, mask=mask)


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
    return ops.flash_attention_ref(q, k, v, mask=mask)


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
    q = draw("q", batch, tokens, heads, head_dim)
    k, v = (draw(name, batch, context, key_heads, head_dim) for name in ("k", "v"))
    mask = draw.mask(batch, context) if masked else None
    seen = torch.ones(batch, context, dtype=torch.int32, device=device) if mask is None else mask.int()
    queries, keys = q.numel() * dtype.itemsize, k.numel() * dtype.itemsize
    products = 2 * batch * heads * tokens * context * head_dim
    return Case(
        op="flash_attention",
        sizes={
            "batch": batch,
            "tokens": tokens,
            "context": context,
            "heads": f"{heads}/{key_heads}",
            "head_dim": head_dim,
            "masked": masked,
        },  # fmt: skip
        inputs={"q": q, "k": k, "v": v},
        given={"seen": seen, "mask": mask},
        upstream=(draw("q", batch, tokens, heads, head_dim),),
        eager=eager,
        ours=ours,
        reference=reference,
        # forward: q, k, v -> out. backward: dout, q, k, v -> dq, dk, dv; the probabilities are made again
        bytes_moved=modes(2 * (queries + keys), 3 * queries + 4 * keys),
        # QK and PV; then QK again, dP, dV, dQ, dK
        flops=modes(2 * products, 5 * products),
        chosen=_attention.choose(BACKENDS, q, k, v, mask, dtype=dtype, differentiable=True),
        peers=peers.attentions(dtype, grouped=heads != key_heads, masked=masked),
    )


@SIZES
def bench_flash_attention(compare: Callable[[Work], None], bench_device: str, batch: int, dtype: torch.dtype) -> None:
    compare(work(case, batch, dtype, bench_device))
