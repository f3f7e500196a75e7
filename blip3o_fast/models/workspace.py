"""The memory of a block's inference on a CPU: allocated once for one shape of input, shared by all blocks."""

from typing import NamedTuple

import torch

from blip3o_fast.ops import _cpu


class Widths(NamedTuple):
    """Of a block: D, H, K, d, and the F of its feed-forward."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


class Buffer:
    """Memory as the kernels take it. view: [B, T, ...]; rows: the same as [B * T, ...]."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(shape, dtype=dtype)
        self.view, self.rows = _cpu.describe(self.tensor), _cpu.describe(self.tensor.flatten(0, 1))


class Workspace:
    """Every activation of a block for x [B, T, D], by the names of `models.packed.PackedBlock.__call__`.

    The blocks run one after the other in the same memory: `h` is what one returns and the next one reads.
    """

    def __init__(self) -> None:
        self._made_for: tuple[object, ...] | None = None
        self._buffers: list[Buffer] = []

    def fit(self, widths: Widths, batch: int, tokens: int, dtype: torch.dtype) -> None:
        """Allocate for this shape, where the last call's was another."""
        made_for = (widths, batch, tokens, dtype)
        if made_for == self._made_for:
            return
        self._made_for, self._buffers = None, []  # what was there is freed first
        hidden, heads, kv_heads, head_dim, ffn = widths
        queries, keys = heads * head_dim, kv_heads * head_dim

        def buffer(*columns: int, dtype: torch.dtype = dtype) -> Buffer:
            self._buffers.append(Buffer(batch, tokens, *columns, dtype=dtype))
            return self._buffers[-1]

        self.normed, self.out, self.middle, self.h = (buffer(hidden) for _ in range(4))
        self.projected, self.attended, self.activated = buffer(2 * (queries + keys)), buffer(queries), buffer(ffn)
        queries_keys, value = self.projected.tensor.split([2 * queries + keys, keys], dim=-1)
        self.queries_keys, self.v1 = _cpu.describe(queries_keys), _cpu.describe(value.unflatten(-1, (kv_heads, -1)))
        self.qkq = buffer(2 * heads + kv_heads, head_dim)
        # What the kernels tell of their rows for a backward that never comes.
        self.rstd, self.rstd_too = (buffer(dtype=torch.float32) for _ in range(2))
        self.means, self.rstds = (buffer(3, dtype=torch.float32) for _ in range(2))
        self._made_for = made_for

    @staticmethod
    def bytes_for(widths: Widths, batch: int, tokens: int, dtype: torch.dtype) -> int:
        """What `nbytes` is after `fit` with the same arguments."""
        hidden, heads, kv_heads, head_dim, ffn = widths
        queries, keys = heads * head_dim, kv_heads * head_dim
        values = 4 * hidden + 2 * (queries + keys) + queries + ffn + 2 * queries + keys
        return batch * tokens * (values * dtype.itemsize + 8 * torch.float32.itemsize)

    @property
    def nbytes(self) -> int:
        return sum(buffer.tensor.nbytes for buffer in self._buffers)
