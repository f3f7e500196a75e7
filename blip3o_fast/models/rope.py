"""The rotary embedding's table for a grid of tokens: `ops.rope_table`, kept per grid and device."""

import torch
from torch import Tensor

from blip3o_fast.ops.rope_table import rope_table

_TABLES: dict[tuple[int, int, int, torch.device], Tensor] = {}


def kept_rope_table(rows: int, columns: int, head_dim: int, device: torch.device) -> Tensor:
    """fp32 [rows * columns, head_dim / 2, 2] with (cos, sin), tokens row by row."""
    if torch.compiler.is_compiling():
        # A traced tensor ends with its trace. On the device, since a copy from the CPU would rule out CUDA graphs.
        return rope_table(rows, columns, head_dim, device=device)
    key = (rows, columns, head_dim, device)
    table = _TABLES.get(key)
    if table is None:
        # Computed on the CPU so that it is the same on every device, and outside of inference mode, in which a tensor
        # is made unfit for training.
        with torch.inference_mode(False), torch.no_grad():
            table = rope_table(rows, columns, head_dim, device="cpu").to(device)
        if type(table) is not Tensor:
            return table  # under a tracing mode, as above
        _TABLES[key] = table
    return table


def rope_from_complex(image_rotary_emb: Tensor, rows: int, columns: int, device: torch.device) -> Tensor:
    """The same table from a complex64 [rows or more, columns or more, head_dim / 2] as diffusers' pipelines make it."""
    shape = tuple(image_rotary_emb.shape)
    if not image_rotary_emb.is_complex() or len(shape) != 3 or shape[0] < rows or shape[1] < columns:
        raise ValueError(
            f"image_rotary_emb must be complex of shape (H, W, head_dim / 2) with H >= {rows} and W >= {columns}, "
            f"got {image_rotary_emb.dtype} {shape}"
        )
    table = torch.view_as_real(image_rotary_emb[:rows, :columns].flatten(0, 1))
    return table.to(device=device, dtype=torch.float32).contiguous()
