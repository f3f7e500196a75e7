"""The numerics contract as one function, shared by tests and benchmarks.

A fused kernel rounds once where the eager sequence rounds several times, so the two must differ. Both are judged by
their distance to an fp64 gold result: `err(ours, gold) <= 2 * err(eager, gold) + floor`.
"""

import torch
from torch import Tensor


def max_abs(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in fp64; 0 for empty tensors, nan where there is one."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def relative_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64 (b is the gold); the plain norm of the difference where b is zero."""
    norm = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / (norm if norm > 0 else 1.0)


def contract_violation(ours: Tensor, eager: Tensor, gold: Tensor) -> str | None:
    """None where `ours` keeps the contract, else a sentence that says by how much it fails.

    gold is fp64; the dtype of `ours` sets the floor: eps * max|gold| for the max error, eps / 4 for the relative L2.
    """
    if ours.shape != gold.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(gold.shape)}"
    eps = torch.finfo(ours.dtype).eps
    peak = gold.abs().max().item() if gold.numel() else 0.0
    for name, error, floor in (
        ("max abs", max_abs, eps * peak),
        ("relative L2", relative_l2, eps / 4),
    ):
        ours_error, eager_error = error(ours, gold), error(eager, gold)
        if not ours_error <= 2 * eager_error + floor:
            return f"{name} error {ours_error:.3e} > 2 * eager's {eager_error:.3e} + floor {floor:.3e}"
    return None


def assert_contract(ours: Tensor, eager: Tensor, gold: Tensor, name: str = "output") -> None:
    """Raise AssertionError where `ours` breaks the contract (see `contract_violation`)."""
    violation = contract_violation(ours, eager, gold)
    assert violation is None, f"{name}: {violation}"
