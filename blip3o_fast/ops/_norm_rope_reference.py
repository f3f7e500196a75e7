"""The reference backend of `qk_norm_rope`: the norms by PyTorch, the turns as products of complex numbers.

On a CPU in chunks of samples that stay in the cache from one pass to the next.
"""

import torch
from torch import Tensor

from blip3o_fast.ops._library import accumulation_dtype

# On a CPU samples are taken in chunks of about this many numbers per group: what one pass writes is still in the cache
# when the next reads it (forward and backward of 32 samples, 64 tokens, 3 x 28 heads of 64, fp32, one core: 63 ms, in
# one piece 145).
_CHUNK = 1 << 19


def _chunks(x: Tensor) -> list[slice]:
    batch, tokens, columns = x.shape
    step = max(1, _CHUNK // max(1, tokens * columns)) if x.device.type == "cpu" else max(1, batch)
    return [slice(start, start + step) for start in range(0, batch, step)]


def _pairs(z: Tensor, acc: torch.dtype) -> Tensor:
    """[.., h, d] -> complex [.., h, d/2]: as numbers a + ib, one product turns every pair in a single pass."""
    z = z.to(acc)
    even = z.stride(-1) == 1 and not any(s % 2 for s in (*z.stride()[:-1], z.storage_offset()))
    return torch.view_as_complex((z if even else z.contiguous()).unflatten(-1, (-1, 2)))


def forward(
    x: Tensor,
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    rope: Tensor | None,
    heads: list[int],
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x)
    y = x.new_empty((*x.shape[:2], sum(heads), head_dim), dtype=dtype)
    mean = x.new_zeros((*x.shape[:2], len(heads)), dtype=acc)
    rstd = torch.ones_like(mean)
    rotation, first = None if rope is None else _pairs(rope.flatten(1), acc)[:, None], 0
    for i, (weight, bias, h) in enumerate(zip(weights, biases, heads, strict=True)):
        group, size = slice(first, first + h), [h * head_dim]
        weight, bias = None if weight is None else weight.to(acc), None if bias is None else bias.to(acc)
        for rows in _chunks(x[..., : h * head_dim]):
            z = x[rows, :, first * head_dim : (first + h) * head_dim].to(acc)
            if weight is not None:
                z, mean[rows, :, i : i + 1], rstd[rows, :, i : i + 1] = torch.native_layer_norm(
                    z, size, weight, bias, eps
                )
            z, target = z.unflatten(-1, (h, head_dim)), y[rows, :, group]
            if rotation is None:
                target.copy_(z)
            elif dtype == acc:
                torch.mul(_pairs(z, acc), rotation, out=_pairs(target, acc))
            else:
                target.copy_(torch.view_as_real(_pairs(z, acc) * rotation).flatten(-2))
        first += h
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor | None],
    rope: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    heads: list[int],
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    acc = rstd.dtype
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = any(weight is not None for weight in weights)
    dweight, dbias = daffine = x.new_zeros((2, x.shape[-1] if normed else 0), dtype=acc)
    # the opposite turn is the product with the conjugate
    back, first = None if rope is None else _pairs(rope.flatten(1), acc)[:, None].conj().resolve_conj(), 0
    for i, (weight, h) in enumerate(zip(weights, heads, strict=True)):
        columns = slice(first * head_dim, (first + h) * head_dim)
        weight = None if weight is None else weight.to(acc)
        for rows in _chunks(x[..., columns]):
            dz = dy[rows, :, first : first + h].to(acc)
            if back is not None:
                dz = torch.view_as_real(_pairs(dz, acc) * back).flatten(-2)
            dz = dz.flatten(2)
            if weight is not None:
                # contiguous: torch's CPU kernel walks the statistics as if they had no stride
                xhat = (x[rows, :, columns].to(acc) - mean[rows, :, i, None]).mul_(rstd[rows, :, i, None])
                product = dz * xhat
                dweight[columns] += product.sum((0, 1))
                dbias[columns] += dz.sum((0, 1))
                # sum(g) and sum(g * xhat) as matrix times weight: g itself is never stored
                mean_g, along = ((t @ weight).div_(t.shape[-1])[..., None] for t in (dz, product))
                dz = (dz * weight).sub_(mean_g).sub_(xhat.mul_(along)).mul_(rstd[rows, :, i, None])
            dx[rows, :, columns] = dz
        first += h
    return dx, daffine.to(dtype)
