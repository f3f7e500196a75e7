"""Several linear layers that read the same input, as one GEMM.

    y = x @ cat(weights).T + cat(biases)            columns in the order of the weights

In a Lumina NextDiT block: (q1, k1, q2, v1) read the normed residual, (k2, v2) the normed context, (w1, w3) the
feed-forward input. Source: `LuminaNextDiTBlock` of diffusers, whose `nn.Linear` layers run one GEMM each.

Backward, over rows (all leading dimensions flattened):

    dx           = dy @ cat(weights)
    cat(dweights) = dy.T @ x                        one buffer, returned as its row blocks
    cat(dbiases)  = sum over rows of dy

Where the weights lie side by side in one storage (see `adjacent`), cat(weights) is a view and each line is one GEMM.
Elsewhere (FSDP2's unsharded parameters, a replaced weight) the forward runs one GEMM per weight into column slices of
y. On a CPU the products of many rows are csrc's (`cpu`); everywhere else the vendor library's, under every backend.
A GEMM that nobody needs is not run: the context needs no dx, a frozen layer no dweight. Saved: x and the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _checks, _cpu
from blip3o_fast.ops._backend import Backends, use_backend
from blip3o_fast.ops._library import (
    accumulation_dtype,
    define,
    needs_grad,
    output_dtype,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)


def merged_linear_ref(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to x's dtype."""
    acc = accumulation_dtype(x)
    weight = torch.cat([w.to(acc) for w in weights])
    bias = torch.cat([b.to(acc) for b in biases]) if biases else None
    return torch.nn.functional.linear(x.to(acc), weight, bias).to(x.dtype)


def adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are contiguous and follow each other in one storage, in this order, in one dtype.

    Then their concatenation along the first dimension is a view. tensors: at least one, equal in all dimensions but the
    first.
    """
    first = tensors[0]
    storage, expected = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.storage_offset() != expected
            or not tensor.is_contiguous()
            or tensor.untyped_storage()._cdata != storage
        ):
            return False
        expected += tensor.numel()
    return True


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
    if not isinstance(x, Tensor) or x.dim() < 2:
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of shape (..., K) with at least 2 dimensions, got {given}")
    _check_list("weights", weights)
    for i, weight in enumerate(weights):
        _checks.check_rank(f"weights[{i}]", weight, "N, K")
        _checks.check_shape(f"weights[{i}]", weight, "N, K", (weight.shape[0], x.shape[-1]))
    floats: dict[str, Tensor] = {"x": x, **{f"weights[{i}]": weight for i, weight in enumerate(weights)}}
    if biases is not None:
        _check_list("biases", biases)
        if len(biases) != len(weights):
            raise ValueError(f"biases must be None or one per weight = {len(weights)}, got {len(biases)}")
        for i, (bias, weight) in enumerate(zip(biases, weights, strict=True)):
            _checks.check_shape(f"biases[{i}]", bias, "N", (weight.shape[0],))
        floats |= {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    _checks.check_floats(**floats)


def _check_list(name: str, tensors: Sequence[Tensor]) -> None:
    # A tensor is refused although it is iterable: each of its rows would be taken for a weight.
    if not isinstance(tensors, (list, tuple)) or not tensors:
        given = "an empty one" if isinstance(tensors, (list, tuple)) else type(tensors).__name__
        raise ValueError(f"{name} must be a list or tuple of at least one tensor, got {given}")


# ---- the products --------------------------------------------------------------------------------------------------

# One row is a matrix-vector product, which the vendor library has a kernel for. Of 4 and 16 rows (modulations of
# [7168, 1024] in fp32) ours took 0.5 of its time with AVX-512, and with AVX2 0.4 to 0.6 forward and all of it for dx.
_MIN_ROWS = 2


# Of up to 64 rows of bf16 in the forward ours took 1.1 to 1.2 of its time, where both have the processor's bf16
# products.
_VENDORS_BF16_ROWS = 64


def _ours(backend: str, a: Tensor) -> bool:
    return backend == "cpu" and a.shape[0] >= _MIN_ROWS and a.dtype != torch.float64


def _forward_is_ours(backend: str, rows: Tensor) -> bool:
    few = rows.dtype == torch.bfloat16 and rows.shape[0] <= _VENDORS_BF16_ROWS
    return _ours(backend, rows) and not (few and _cpu.active_isa() == "avx512_bf16")


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """a @ b of two matrices of any strides, in `dtype`."""
    if not _ours(backend, a):
        return a @ b
    c = torch.empty((a.shape[0], b.shape[1]), dtype=dtype)
    _cpu.call("linear", a, b, c)
    return c


def _matmul_into(c: Tensor, a: Tensor, b: Tensor, backend: str) -> None:
    if _ours(backend, a):
        _cpu.call("linear", a, b, c)
    else:
        torch.mm(a, b, out=c)


# ---- implementation ------------------------------------------------------------------------------------------------


def _merged(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """cat(tensors) in dtype where that is a view or where a cast must copy anyway; else None."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.to(dtype)
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    if adjacent(tensors):
        return first.as_strided(shape, (*first.shape[1:], 1)).to(dtype)
    if any(tensor.dtype != dtype for tensor in tensors):
        return _cat(tensors, dtype)
    return None


def _cat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """cat(tensors) in dtype: cast and copied in one pass."""
    first = tensors[0]
    sizes = [tensor.shape[0] for tensor in tensors]
    merged = torch.empty((sum(sizes), *first.shape[1:]), dtype=dtype, device=first.device)
    for block, tensor in zip(merged.split(sizes), tensors, strict=True):
        block.copy_(tensor)
    return merged


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype, backend: str
) -> Tensor:
    x = x.to(dtype)
    bias = None
    if biases:
        bias = _merged(biases, dtype)
        bias = _cat(biases, dtype) if bias is None else bias
    weight = _merged(weights, dtype)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if weight is not None:
        if _forward_is_ours(backend, rows):
            # a bias is added before the one rounding
            y = _matmul(rows, weight.t(), dtype if bias is None else torch.float32, backend)
            return (y if bias is None else y.add_(bias).to(dtype)).view(*x.shape[:-1], weight.shape[0])
        return torch.nn.functional.linear(x, weight, bias)
    sizes = [weight.shape[0] for weight in weights]
    y = torch.empty((rows.shape[0], sum(sizes)), dtype=dtype, device=x.device)
    bias_blocks = [None] * len(sizes) if bias is None else bias.split(sizes)
    for block, weight, bias_block in zip(y.split(sizes, dim=1), weights, bias_blocks, strict=True):
        if bias_block is None:
            _matmul_into(block, rows, weight.t(), backend)
        else:
            torch.addmm(bias_block, rows, weight.t(), out=block)
    return y.view(*x.shape[:-1], sum(sizes))


def _backward(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [weight.shape[0] for weight in weights]
    rows = x.shape[:-1].numel()
    dy = dy.reshape(rows, sum(sizes))
    dx = dweight = dbias = None
    if need_x:
        dx = _input_gradient(dy, weights, sizes, backend).to(x.dtype).view(x.shape)
    if any(need_weights):
        x_rows = x.to(dy.dtype).reshape(rows, x.shape[-1])
        blocks = (
            [dy] if all(need_weights) else [b for b, n in zip(dy.split(sizes, dim=1), need_weights, strict=True) if n]
        )
        shape = (_needed(sizes, need_weights), x.shape[-1])
        # fresh memory at every step: gradients are freed by then
        dweight = _cpu.empty(*shape, dtype=dy.dtype) if backend == "cpu" else dy.new_empty(shape)
        for target, block in zip(dweight.split([b.shape[1] for b in blocks]), blocks, strict=True):
            _matmul_into(target, block.t(), x_rows, backend)
        dweight = dweight.to(_common_dtype(weights))
    if bias_dtype is not None:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, bias_dtype))  # a half is added up in fp32 all the same
    empty = dy.new_empty(0)
    return tuple(empty.clone() if grad is None else grad for grad in (dx, dweight, dbias))  # type: ignore[return-value]


def _input_gradient(dy: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], backend: str) -> Tensor:
    weight = _merged(weights, dy.dtype)
    if weight is None and dy.dtype in (torch.bfloat16, torch.float16):
        # One GEMM accumulates in fp32; a sum of GEMMs would be rounded to half precision between them.
        weight = _cat(weights, dy.dtype)
    if weight is not None:
        return _matmul(dy, weight, dy.dtype, backend)
    blocks = dy.split(sizes, dim=1)
    dx = blocks[0] @ weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        dx.addmm_(block, weight)
    return dx


def _needed(sizes: Sequence[int], needed: Sequence[bool]) -> int:
    return sum(size for size, need in zip(sizes, needed, strict=True) if need)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


BACKENDS = Backends("merged_linear", cpu=_cpu.refusal)


# ---- raw ops -------------------------------------------------------------------------------------------------------


def _forward_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype, backend: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)), dtype=dtype)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [weight.shape[0] for weight in weights]
    rows = _needed(sizes, need_weights)
    return (
        x.new_empty(x.shape) if need_x else dy.new_empty(0),
        x.new_empty((rows, x.shape[-1]), dtype=_common_dtype(weights)) if any(need_weights) else dy.new_empty(0),
        dy.new_empty(0)
        if bias_dtype is None
        else dy.new_empty(sum(sizes), dtype=torch.promote_types(dy.dtype, bias_dtype)),
    )


_merged_linear_fwd = define(
    "merged_linear_fwd(Tensor x, Tensor[] weights, Tensor[] biases, ScalarType dtype, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
# dweight has the rows of the weights that need one, in their order, in one buffer; what nobody needs is empty.
_merged_linear_bwd = define(
    "merged_linear_bwd(Tensor dy, Tensor x, Tensor[] weights, bool need_x, bool[] need_weights, ScalarType? bias_dtype,"
    " str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, backend: str, count: int, *weights_and_biases: Tensor
    ) -> Tensor:
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        ctx.save_for_backward(x, *weights)
        ctx.bias_dtypes = [bias.dtype for bias in biases]
        ctx.bias_dtype = _common_dtype(biases) if biases else None
        ctx.backend = backend
        return run(_merged_linear_fwd, x, weights, biases, dtype, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("merged_linear")
        x, *weights = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], list(ctx.needs_input_grad[4:])
        need_weights, need_biases = need[: len(weights)], need[len(weights) :]
        bias_dtype = ctx.bias_dtype if any(need_biases) else None
        dx, dweight, dbias = run(_merged_linear_bwd, dy, x, weights, need_x, need_weights, bias_dtype, ctx.backend)
        grads: list[Tensor | None] = [dx if need_x else None, None, None, None]
        row = 0
        for weight, needed in zip(weights, need_weights, strict=True):
            grads.append(dweight[row : row + weight.shape[0]].to(weight.dtype) if needed else None)
            row += weight.shape[0] if needed else 0
        row = 0
        for weight, dtype, needed in zip(weights, ctx.bias_dtypes, need_biases, strict=False):
            grads.append(dbias[row : row + weight.shape[0]].to(dtype) if needed else None)
            row += weight.shape[0]
        return tuple(grads)


def merged_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """`x @ cat(weights).T + cat(biases)`: several linear layers over one input.

    Equivalent to `merged_linear_ref`. One GEMM, and no copy, where `adjacent(weights)`; one GEMM per weight elsewhere.

    x: [..., K] with at least two dimensions; weights: list or tuple of [N_i, K]; biases: None or one [N_i] per weight.
    fp32, bf16, fp16 or fp64 (only alone); leading sizes may be 0.
    Returns [..., sum N_i]. The GEMM runs in autocast's dtype where autocast is on, else in x's dtype; the weights are
    cast to it. Each gradient has its input's dtype; the weights' gradients are row blocks of one buffer.
    Numerics: as `torch.nn.functional.linear`. Bitwise repeatable.
    Raises ValueError for a wrong shape, dtype or device.
    """
    _check(x, weights, biases)
    refuse_transforms("merged_linear")
    dtype, biases = output_dtype(x), [] if biases is None else biases
    # no backend but cpu has a kernel of its own: under the others' names the vendor library's product is what runs
    backend = BACKENDS.choose(x, *weights, *biases) if use_backend.state.active in ("auto", "cpu") else "reference"
    with recorded("merged_linear"):
        if needs_grad(x, *weights, *biases):
            return _MergedLinear.apply(x, dtype, backend, len(weights), *weights, *biases)
        return run(_merged_linear_fwd, x, weights, biases, dtype, backend)
