"""What the device could do: the peak of its matrix products, that a run's FLOP/s are compared with (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from blip3o_fast.ops import merged_linear

# Dense matrix products in TFLOP/s, from the makers' data sheets: (in the device's name, half precision, TF32, fp32).
# The first name that fits counts. An "H100" that is neither PCIe nor NVL is the SXM board.
GPUS = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("H200", 989.0, 495.0, 67.0),
    ("H100 PCIe", 756.0, 378.0, 51.0),
    ("H100 NVL", 835.0, 417.0, 60.0),
    ("H100", 989.0, 495.0, 67.0),
    ("A100", 312.0, 156.0, 19.5),
    ("L40S", 362.0, 183.0, 91.6),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71.0, 35.6, 35.6),
    ("A10", 125.0, 62.5, 31.2),
    ("L4", 121.0, 60.0, 30.3),
    ("T4", 65.0, 8.1, 8.1),
    ("V100", 125.0, 15.7, 15.7),
)
# Side of the square product that is timed where no data sheet speaks, and for how long.
_SIDE, _SECONDS = 1024, 0.2
_measured: dict[tuple[str, torch.dtype], float] = {}


@dataclass(frozen=True)
class Peak:
    """flops: of matrix products, per second and device. source: a data sheet, or a measurement."""

    flops: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype = torch.float32) -> Peak:
    """The peak of ``device`` for products of ``dtype``: from the table, else a product timed once per process.

    On a CPU that other programs use too, the measured peak is low and the MFU flattered.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (flops := _in_table(name, dtype)) is not None:
            return Peak(flops, f"data sheet of {name}")
    key = (str(device), dtype)
    if key not in _measured:
        _measured[key] = _measure(device, dtype)
    return Peak(_measured[key], f"a {_SIDE} x {_SIDE} product measured here")


def _in_table(name: str, dtype: torch.dtype) -> float | None:
    for part, half, tf32, single in GPUS:
        # "L4" is no "L40", "A10" no "A100".
        if f"{part} " in f"{name} ".replace("-", " "):
            if dtype in (torch.bfloat16, torch.float16):
                return half * 1e12
            return (single if torch.get_float32_matmul_precision() == "highest" else tf32) * 1e12
    return None


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The best of some products, the library's and on a CPU ours, which can be faster; the others were disturbed."""
    a = b = torch.full((_SIDE, _SIDE), 0.5, device=device, dtype=dtype)  # no random numbers: they belong to the run
    products: list[Callable[[], Any]] = [lambda: torch.mm(a, b)]
    if device.type == "cpu":
        products.append(lambda: merged_linear(a, [b]))
    best, begun = float("inf"), time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - begun < _SECONDS:
            for product in products:
                start = time.perf_counter()
                product()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best
