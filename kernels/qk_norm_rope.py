"""Triton kernels of `qk_norm_rope`: one program per token and group forward, some tokens of one group backward.

    forward:   z  = (x - mean) * rstd * weight + bias, then every pair (a, b) of z turned by its angle
    backward:  dz = dy turned back,  g = dz * weight,  xhat = (x - mean) * rstd
               dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
               P  = sums over the program's tokens of dz * xhat and of dz, two fp32 rows, see `_sample_sums.py`

A group of one token is heads * d neighbouring columns, held whole in a block of the next power of two, the tail masked.
Up to three groups share a launch: the program's group picks sizes and parameters, so a launch is one compiled kernel.
A group without norm has mean 0, rstd 1, weight 1 and bias 0, and takes no part in the sums.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels import _sample_sums
from blip3o_fast.kernels._config import launch_config
from blip3o_fast.kernels._launch import capability_of, launch, with_unit_stride

# Groups that one launch serves; the network has one or three.
_GROUPS = 3


@triton.jit
def _of_group(group, first, second, third, GROUPS: tl.constexpr):
    """Of three numbers the one of the program's group."""
    value = first
    if GROUPS > 1:
        value = tl.where(group == 1, second, value)
    if GROUPS > 2:
        value = tl.where(group == 2, third, value)
    return value


@triton.jit
def _parameter(group, ptr0, ptr1, ptr2, at, seen, absent):
    """Weight or bias of the program's group in fp32, `absent` where it has none. Each may have its own dtype."""
    value = tl.full(at.shape, absent, tl.float32)
    if group == 0:
        if ptr0 is not None:
            value = tl.load(ptr0 + at, mask=seen, other=0.0).to(tl.float32)
    elif group == 1:
        if ptr1 is not None:
            value = tl.load(ptr1 + at, mask=seen, other=0.0).to(tl.float32)
    else:
        if ptr2 is not None:
            value = tl.load(ptr2 + at, mask=seen, other=0.0).to(tl.float32)
    return value


@triton.jit
def _turned(z, rope_ptr, token, direction, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(a, b) to (a cos - b sin, a sin + b cos) for neighbours a, b of z [BLOCK]; direction: 1.0, or -1.0 for back."""
    # A token's cos and sin lie as a and b do, so they are loaded like them: once per head, from the cache.
    angles = tl.load(rope_ptr + token * HEAD_DIM + tl.arange(0, BLOCK) % HEAD_DIM)
    cos, sin = tl.split(tl.reshape(angles, (BLOCK // 2, 2)))
    sin = sin * direction
    a, b = tl.split(tl.reshape(z, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK,))


@triton.jit
def qk_norm_rope_fwd(
    x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, rope_ptr, y_ptr, mean_ptr, rstd_ptr,
    tokens, stride_xb, stride_xt, eps: tl.float32,
    GROUPS: tl.constexpr, FIRST_GROUP: tl.constexpr, ALL_GROUPS: tl.constexpr,
    HEADS0: tl.constexpr, HEADS1: tl.constexpr, HEADS2: tl.constexpr, FIRST_HEAD: tl.constexpr,
    ALL_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 32-bit division, 64-bit offsets: a tensor may pass 2^31 elements, the number of its programs does not.
    program = tl.program_id(0)
    row, group = program // GROUPS, program % GROUPS
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    n = _of_group(group, HEADS0, HEADS1, HEADS2, GROUPS) * HEAD_DIM
    first = _of_group(group, FIRST_HEAD, FIRST_HEAD + HEADS0, FIRST_HEAD + HEADS0 + HEADS1, GROUPS) * HEAD_DIM
    normed = _of_group(group, weight0_ptr is not None, weight1_ptr is not None, weight2_ptr is not None, GROUPS)
    at = tl.arange(0, BLOCK)
    seen = at < n
    x = tl.load(x_ptr + sample * stride_xb + token * stride_xt + first + at, mask=seen, other=0.0).to(tl.float32)
    weight = _parameter(group, weight0_ptr, weight1_ptr, weight2_ptr, at, seen, 1.0)
    bias = _parameter(group, bias0_ptr, bias1_ptr, bias2_ptr, at, seen, 0.0)
    # rounded to the nearest: plain division is 2 ulp off on a GPU, and the whole group would be shifted by that
    mean = tl.where(normed, tl.div_rn(tl.sum(x), tl.zeros((), tl.float32) + n), 0.0)
    centred = tl.where(seen, x - mean, 0.0)
    rstd = tl.where(normed, tl.rsqrt(tl.sum(centred * centred) / n + eps), 1.0)
    statistic = row.to(tl.int64) * ALL_GROUPS + FIRST_GROUP + group
    tl.store(mean_ptr + statistic, mean)
    tl.store(rstd_ptr + statistic, rstd)
    z = centred * rstd * weight + bias
    if rope_ptr is not None:
        z = _turned(z, rope_ptr, token, 1.0, HEAD_DIM, BLOCK)
    y_at = row.to(tl.int64) * (ALL_HEADS * HEAD_DIM) + first
    tl.store(y_ptr + y_at + at, z.to(y_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows", "all_rows"])
def qk_norm_rope_bwd(
    dy_ptr, x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, rope_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    tokens, rows, all_rows, stride_dyb, stride_dyt, stride_xb, stride_xt,
    GROUPS: tl.constexpr, FIRST_GROUP: tl.constexpr, ALL_GROUPS: tl.constexpr,
    HEADS0: tl.constexpr, HEADS1: tl.constexpr, HEADS2: tl.constexpr, FIRST_HEAD: tl.constexpr,
    ALL_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    chunk, group = program // GROUPS, program % GROUPS
    n = _of_group(group, HEADS0, HEADS1, HEADS2, GROUPS) * HEAD_DIM
    first = _of_group(group, FIRST_HEAD, FIRST_HEAD + HEADS0, FIRST_HEAD + HEADS0 + HEADS1, GROUPS) * HEAD_DIM
    normed = _of_group(group, weight0_ptr is not None, weight1_ptr is not None, weight2_ptr is not None, GROUPS)
    at = tl.arange(0, BLOCK)
    seen = at < n
    weight = _parameter(group, weight0_ptr, weight1_ptr, weight2_ptr, at, seen, 1.0)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, tl.minimum(rows, all_rows - chunk * rows)):
        row = chunk * rows + step
        sample, token = (row // tokens).to(tl.int64), row % tokens
        # 32 bits within a sample (`_near`): 64 would spill here in fp32 on sm_120
        dy_at = sample * stride_dyb + token * stride_dyt + first
        x_at = sample * stride_xb + token * stride_xt + first
        dz = tl.load(dy_ptr + dy_at + at, mask=seen, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_at + at, mask=seen, other=0.0).to(tl.float32)
        statistic = row.to(tl.int64) * ALL_GROUPS + FIRST_GROUP + group
        mean = tl.load(mean_ptr + statistic)
        rstd = tl.load(rstd_ptr + statistic)
        if rope_ptr is not None:
            dz = _turned(dz, rope_ptr, token, -1.0, HEAD_DIM, BLOCK)
        # dz is zero where nothing is seen, so xhat may be anything there
        xhat = (x - mean) * rstd
        product = dz * xhat
        dweight += product
        dbias += dz
        g = dz * weight
        # both sums in one reduction: one exchange between the warps instead of two
        sum_g, sum_along = tl.split(tl.sum(tl.join(g, product * weight), axis=0))
        mean_g = tl.where(normed, sum_g / n, 0.0)
        along = tl.where(normed, sum_along / n, 0.0)
        dx = rstd * (g - mean_g - xhat * along)
        dx_at = row.to(tl.int64) * (ALL_HEADS * HEAD_DIM) + first
        tl.store(dx_ptr + dx_at + at, dx.to(dx_ptr.dtype.element_ty), mask=seen)
    if partial_ptr is not None:
        partial_at = chunk.to(tl.int64) * (2 * ALL_HEADS * HEAD_DIM) + first
        tl.store(partial_ptr + partial_at + at, tl.where(normed, dweight, 0.0), mask=seen)
        tl.store(partial_ptr + partial_at + ALL_HEADS * HEAD_DIM + at, tl.where(normed, dbias, 0.0), mask=seen)


def _launches(
    heads: Sequence[int], head_dim: int, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]
) -> Iterator[tuple[dict[str, int], list[Tensor | None], list[Tensor | None]]]:
    """For each launch what its groups are (constexprs), and their weights and biases, filled up with None."""
    for start in range(0, len(heads), _GROUPS):
        part = slice(start, start + _GROUPS)
        own = list(heads[part])
        empty = _GROUPS - len(own)
        constants = {"GROUPS": len(own), "FIRST_GROUP": start, "ALL_GROUPS": len(heads)}
        constants |= {f"HEADS{i}": h for i, h in enumerate(own + [0] * empty)}
        constants |= {"FIRST_HEAD": sum(heads[:start]), "ALL_HEADS": sum(heads), "HEAD_DIM": head_dim}
        yield (
            constants,
            [None if t is None else t.contiguous() for t in (*weights[part], *[None] * empty)],
            [None if t is None else t.contiguous() for t in (*biases[part], *[None] * empty)],
        )


def forward(
    x: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], rope: Tensor | None,
    heads: Sequence[int], head_dim: int, eps: float, y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """Fill y [B, T, sum(heads), d], mean and rstd [B, T, groups] (fp32), all contiguous."""
    batch, tokens, _ = x.shape
    x, rope = with_unit_stride(x), None if rope is None else rope.contiguous()
    width = max(heads) * head_dim
    config = launch_config("qk_norm_rope.forward", width=width, capability=capability_of(x))
    for constants, own_weights, own_biases in _launches(heads, head_dim, weights, biases):
        launch(
            qk_norm_rope_fwd, (batch * tokens * constants["GROUPS"],),
            x, *own_weights, *own_biases, rope, y, mean, rstd, tokens, x.stride(0), x.stride(1), eps,
            **constants, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip


def _near(x: Tensor) -> Tensor:
    """x [B, T, ...] itself where a sample's tokens lie within 2^31 elements, else a copy (of a sequence-first view)."""
    return x if x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def backward(
    dy: Tensor, x: Tensor, weights: Sequence[Tensor | None], rope: Tensor | None, mean: Tensor, rstd: Tensor,
    heads: Sequence[int], head_dim: int, dx: Tensor, daffine: Tensor,
) -> None:  # fmt: skip
    """Fill dx [B, T, sum(heads)*d] and, unless no group has a norm, daffine [2, sum(heads)*d], both contiguous."""
    batch, tokens, columns = x.shape
    if batch * tokens == 0:
        daffine.zero_()
        return
    # Read where it lies if the heads of a token are neighbours in memory, whatever is between two tokens.
    if dy.stride(-1) != 1 or (dy.shape[2] > 1 and dy.stride(2) != head_dim):
        dy = dy.contiguous()
    dy, x, rope = _near(dy), _near(with_unit_stride(x)), None if rope is None else rope.contiguous()
    config = launch_config(
        "qk_norm_rope.backward", width=max(heads) * head_dim, batch=min(len(heads), _GROUPS), tokens=batch * tokens,
        elements_per_thread=8, capability=capability_of(x),
    )  # fmt: skip
    chunks = triton.cdiv(batch * tokens, config.rows)
    partial = None
    if daffine.numel() > 0:
        partial = torch.empty((chunks, 2 * columns), dtype=torch.float32, device=x.device)
    for constants, own_weights, _ in _launches(heads, head_dim, weights, ()):
        launch(
            qk_norm_rope_bwd, (chunks * constants["GROUPS"],),
            dy, x, *own_weights, rope, mean, rstd, dx, partial,
            tokens, config.rows, batch * tokens, *dy.stride()[:2], *x.stride()[:2],
            **constants, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
    if partial is not None:
        _sample_sums.finish(partial, None, None, daffine, None, chunks, _sample_sums.PLAIN)
