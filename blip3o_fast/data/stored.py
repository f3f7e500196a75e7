"""How a shard holds its features: the names of the tensors, and int8 with one scale per token.

=========== ================== ================= =======================================================
side        tensor             scale, if int8    shape
=========== ================== ================= =======================================================
condition   eva                eva_scale         ``[n, T, E]``; the scale is float32 ``[n, T]``
target      clip               clip_scale        ``[n, T, C]``; the scale is float32 ``[n, T]``
=========== ================== ================= =======================================================

Shards of versions before 2 (``shard_00000.safetensors``) call the tensors condition and target; they are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .shards import Meta

TENSORS = {"condition": "eva", "target": "clip"}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_LEVELS = 127  # of int8 on either side of 0; -128 is left out, so that a token and its negative are stored alike


FORMAT_VERSION = 1
HEADER = "blip3o_fast"  # the entry of a shard's safetensors header that says where its features come from
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tensor_name(names: Collection[str], side: str) -> str:
    """What a shard with the tensors ``names`` calls a side (``"condition"`` or ``"target"``)."""
    return side if side in names else TENSORS[side]


def allowed_names(names: Collection[str]) -> bool:
    """Whether these are the tensors of a shard: both sides, each with its scale where there is one, nothing else."""
    sides = {tensor_name(names, side) for side in TENSORS}
    return sides <= set(names) <= sides | {scale_name(name) for name in sides}


def scale_name(name: str) -> str:
    return f"{name}_scale"


def to_float(stored: Tensor, scale: Tensor | None = None) -> Tensor:
    """A stored side as numbers: int8 ``[..., T, C]`` times its scale ``[..., T]`` as float32, other dtypes unchanged.

    Works on any rows of a side and on any device. Raises ``ValueError`` where int8 comes without its scale.
    """
    if stored.dtype != torch.int8:
        return stored
    if scale is None or scale.shape != stored.shape[:-1]:
        found = None if scale is None else tuple(scale.shape)
        raise ValueError(f"scale: got {found}; int8 features {tuple(stored.shape)} need one scale per token")
    return stored.float() * scale.unsqueeze(-1)


class StoredSide:
    """A side of an open shard (``safetensors.safe_open``); ``side[rows]`` reads those rows, as `to_float` gives them.

    dtype is safetensors' name of the stored one ("F32", "F16", "BF16", "I8"), shape is ``[n, T, channels]``.
    """

    def __init__(self, file: Any, side: str) -> None:
        names = set(file.keys())
        name = tensor_name(names, side)
        self._values = file.get_slice(name)
        self._scale = file.get_slice(scale_name(name)) if scale_name(name) in names else None
        self.shape: list[int] = self._values.get_shape()
        self.dtype: str = self._values.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        return to_float(self._values[rows], None if self._scale is None else self._scale[rows])


def quantize(features: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[n, T, C]`` and the scales, float32 ``[n, T]``: a token's largest channel becomes 127."""
    values = features.float()
    scale = values.abs().amax(-1) / _LEVELS
    safe = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)  # a token of zeros has the scale 0 and stays zeros
    return (values / safe).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


Side = Tensor | tuple[Tensor, Tensor]  # features, or int8 and its scales


def save_sides(path: Path, condition: Side, target: Side, meta: Meta, header: Mapping[str, str]) -> None:
    """Write one shard beside its place, and rename it there once it is on the disk.

    condition ``[n, T, E]`` and target ``[n, T, C]`` must be finite and of a floating dtype, or a pair of
    `quantize` each. The encoders that meta describes are written into the file's header.
    Raises ``ValueError`` for other tensors, and ``OSError`` naming the file where it cannot be written (a full disk):
    then nothing of it is left.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for side, value, dim in (("condition", condition, meta.condition.dim), ("target", target, meta.target.dim)):
        if isinstance(value, tuple):
            tensors[TENSORS[side]], tensors[scale_name(TENSORS[side])] = value
        else:
            check_tensor(str(path), side, value, meta.tokens, dim)
            tensors[TENSORS[side]] = value.contiguous()
    if len({value.untyped_storage().data_ptr() for value in tensors.values()}) < len(tensors):
        tensors = {name: value.clone() for name, value in tensors.items()}  # safetensors refuses shared memory
    beside = path.with_name(f".{path.name}.part")  # one name, so that killed runs do not pile up
    try:
        made_by = {"condition": asdict(meta.condition), "target": asdict(meta.target)}  # a shard may leave its folder
        about = json.dumps({"format_version": str(FORMAT_VERSION), "made_by": made_by, **header}, sort_keys=True)
        save_file(tensors, beside, metadata={HEADER: about})  # one entry: safetensors writes several in random order
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path}: could not be written ({error}); what was finished before is whole, and the same command "
            "continues once there is room"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def check_tensor(where: str, name: str, value: Tensor, tokens: int, dim: int) -> None:
    if value.dtype not in _FLOATS:
        raise ValueError(f"{where}: {name} is {value.dtype}; allowed are {', '.join(map(str, _FLOATS))}")
    if value.dim() != 3 or tuple(value.shape[1:]) != (tokens, dim):
        raise ValueError(f"{where}: {name} has the shape {tuple(value.shape)}; [n, {tokens}, {dim}] is needed")
    for start, chunk in enumerate(value.split(256)):
        finite = torch.isfinite(chunk).flatten(1).all(dim=1)
        if not bool(finite.all()):
            row = start * 256 + int((~finite).nonzero()[0])
            raise ValueError(f"{where}: {name} has NaN or Inf in row {row}")
