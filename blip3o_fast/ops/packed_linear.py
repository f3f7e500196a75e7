"""Linear layers that read one input, with their weights packed once for the CPU's matrix kernels.

    y = x @ cat(weights).T + bias           or, of a feed-forward's [w1, w3],   y = silu(gate) * up

A matrix product over few rows (64 tokens a sample) reads its weights once and is as fast as they arrive, so they are
brought into the order in which the kernel reads them, and stored as one of

    "fp32"   float32; arithmetic in fp32
    "bf16"   bfloat16, half the memory; arithmetic in fp32, or, where x is bfloat16 and the CPU multiplies it
             (AVX512_BF16), exact products of bfloat16 summed in fp32
    "int8"   8 bits with a scale per output channel; x is quantised per row when it arrives. Not exact: what it costs is
             printed by `make bench-cpu`

For inference on a CPU: no gradients, no schema. Kernels: csrc/cpu/packed_linear.cpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_fast import _ext
from blip3o_fast.ops import _checks, _cpu
from blip3o_fast.ops._library import accumulation_dtype

STORAGE = ("fp32", "bf16", "int8")
_ALIGNMENT = 64


class PackedWeights:
    """The packed form of some weights, which remembers what it was made of.

    weights: one or several [N_i, K], fp32, bf16 or fp16, on the CPU; their outputs stand side by side.
    bias: [sum N_i] or None. storage: one of STORAGE. swiglu: the weights are w1 and w3 of equal shape.

    A changed weight (an optimizer step, a load, a move) is noticed by `stale`, by its address and version; what is
    written through `weight.data`, which has no version, is not.
    Raises ValueError for wrong arguments, RuntimeError where the C++ extension is missing.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        storage: str = "fp32",
        swiglu: bool = False,
    ) -> None:
        if _ext.C is None:
            raise RuntimeError(f"packed_linear cannot run: {_ext.ERROR}")
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
        if not isinstance(weights, (list, tuple)) or not weights:
            raise ValueError(f"weights must be a list or tuple of at least one tensor, got {type(weights).__name__}")
        for i, weight in enumerate(weights):
            _checks.check_rank(f"weights[{i}]", weight, "N, K")
            _checks.check_shape(f"weights[{i}]", weight, "N, K", (weight.shape[0], weights[0].shape[1]))
            reason = _cpu.refusal(weight) if weight.device.type == "cpu" else f"it is on {weight.device}"
            if reason is not None:
                raise ValueError(f"weights[{i}] cannot be packed: {reason}")
        self.out_features = sum(weight.shape[0] for weight in weights)
        if swiglu and (len(weights) != 2 or weights[0].shape != weights[1].shape):
            shapes = [tuple(weight.shape) for weight in weights]
            raise ValueError(f"weights must be w1 and w3 of one shape with swiglu, got {shapes}")
        if bias is not None:
            _checks.check_shape("bias", bias, "N", (self.out_features,))
        self.in_features = weights[0].shape[1]
        self.columns = self.out_features // 2 if swiglu else self.out_features  # of what packed_linear returns
        self.storage, self.swiglu = storage, swiglu
        self.weights, self.bias = tuple(weights), bias
        self.pack()

    def pack(self) -> None:
        """Pack the weights as they are now."""
        mode = STORAGE.index(self.storage)
        # The memory is held, so that no other weight can come to lie at its address unnoticed.
        self.isa, self.made_of = _cpu.active_isa(), [(weight.detach(), weight._version) for weight in self.weights]
        size = _cpu.call("packed_size", self.out_features, self.in_features, mode, self.swiglu)
        buffer = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        start = -buffer.data_ptr() % _ALIGNMENT
        self.packed = buffer[start : start + size]
        column = 0
        for weight in self.weights:
            _cpu.call("pack_linear", weight.detach(), self.packed, self.out_features, column, mode, self.swiglu)
            column += weight.shape[0]

    @property
    def stale(self) -> bool:
        """Whether a weight has changed since, or another instruction set is to run."""
        return self.isa != _cpu.active_isa() or any(
            weight.data_ptr() != kept.data_ptr() or weight.dtype != kept.dtype or weight._version != version
            for weight, (kept, version) in zip(self.weights, self.made_of, strict=True)
        )

    @property
    def nbytes(self) -> int:
        return self.packed.numel()


def packed_linear_ref(x: Tensor, packed: PackedWeights, *, out: Tensor | None = None) -> Tensor:
    """The specification of the exact storages: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding.

    With the weights as they were given, before a storage rounded them.
    """
    acc = accumulation_dtype(x)
    weight = torch.cat([weight.to(acc) for weight in packed.weights])
    y = torch.nn.functional.linear(x.to(acc), weight, None if packed.bias is None else packed.bias.to(acc))
    if packed.swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y.to(x.dtype) if out is None else out.copy_(y)


def packed_linear(x: Tensor, packed: PackedWeights, *, out: Tensor | None = None) -> Tensor:
    """`x @ cat(weights).T + bias`, or `silu(gate) * up` of it, with weights packed before.

    Equivalent to `packed_linear_ref` of the packed weights (as rounded by their storage), but for "int8".

    x: [..., K], fp32, bf16 or fp16; any strides. out: where to put the result: contiguous, of any of these dtypes.
    Returns [..., N], or [..., F] with swiglu, in x's dtype unless `out` has another.
    Raises ValueError where a shape or dtype does not fit.
    """
    if not isinstance(packed, PackedWeights):
        raise ValueError(f"packed must be PackedWeights, got {type(packed).__name__}")
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] != packed.in_features:
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of shape (..., {packed.in_features}), got {given}")
    reason = _cpu.refusal(x) if x.device.type == "cpu" else f"it is on {x.device}"
    if reason is not None:
        raise ValueError(f"x cannot be multiplied by packed weights: {reason}")
    shape = (*x.shape[:-1], packed.columns)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous of shape {shape}, got {tuple(out.shape)}")
    rows = x.reshape(x.shape[:-1].numel(), packed.in_features)
    _cpu.call("packed_linear", rows.detach(), packed.packed, packed.bias, out.view(rows.shape[0], packed.columns))
    return out
