"""Argument checks of the public op functions: each names the argument, what was given and what is allowed."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(name: str, tensor: Tensor, axes: str, expected: Sequence[int]) -> None:
    """`axes` is the shape in the op's letters, "B, D"; `expected` the sizes they stand for here."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape ({axes}), got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(expected):
        sizes = ", ".join(str(int(size)) for size in expected)
        raise ValueError(f"{name} must have shape ({axes}) = ({sizes}), got {tuple(tensor.shape)}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """`axes` is the shape in the op's letters; only their number is checked."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape ({axes}), got {type(tensor).__name__}")
    rank = axes.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions ({axes}), got shape {tuple(tensor.shape)}")


def check_floats(**tensors: Tensor | None) -> None:
    """All floating point, all on one device, and fp64 only where every tensor is fp64."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {tensor.device}")
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype} and {first_name} is {first.dtype}: float64 cannot be mixed with other dtypes"
            )


def check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps}")
