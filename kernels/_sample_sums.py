"""Adds up the partial sums that the backward of a modulated norm leaves behind, in a fixed order, without atomics.

Every program of such a backward owns some rows of one sample and leaves one fp32 row P of column sums. What remains is

    dweight  = sum over samples of P_sample * weight_factor          [D]
    dmod     = P_sample * mod_factor                                 [B, D]

where P_sample is the sum of the sample's partial rows, and the factors depend on the op (`KIND`):

    scale:  weight_factor = 1 + mod        mod_factor = weight                     (rms_norm_modulate)
    gate:   weight_factor = tanh(mod)      mod_factor = weight * (1 - tanh(mod)^2) (gated_residual)
    plain:  weight_factor = 1              there is no mod                         (a norm without modulation)
    bare:   there is no weight             mod_factor = 1                          (layer_norm_modulate)

Some programs of one launch own columns of dweight and walk all partial rows; the others own columns of one sample's
dmod. Both read the same partial rows, which are few and still in the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from blip3o_fast.kernels._launch import launch
from blip3o_fast.kernels._tl import tanh

SCALE, GATE, PLAIN, BARE = 0, 1, 2, 3

# Tiles: 64 partial rows by 32 columns for dweight (with 128 rows the gate's tanh spills), 16 by 256 for dmod. They are
# added up element by element and their rows at the end: no barrier in the loop, and short chains of additions.
WEIGHT_ROWS, WEIGHT_COLUMNS = 64, 32
MOD_ROWS, MOD_COLUMNS = 16, 256
NUM_WARPS = 8


def programs(batch: int, width: int, kind: int) -> int:
    """How many programs the two sums of one op take."""
    weight_programs = 0 if kind == BARE else triton.cdiv(width, WEIGHT_COLUMNS)
    mod_programs = 0 if kind == PLAIN else batch * triton.cdiv(width, MOD_COLUMNS)
    return weight_programs + mod_programs


@triton.jit
def weight_sums(
    partial_ptr, mod_ptr, dweight_ptr, column_block, partial_rows, chunks, stride_mod,
    D: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight of COLUMNS columns. partial: [partial_rows, D], `chunks` neighbouring rows per sample."""
    cols = column_block * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, partial_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        seen = (rows < partial_rows)[:, None] & (cols < D)[None, :]
        p = tl.load(partial_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=seen, other=0.0)
        if KIND != 2:
            samples = (rows // chunks).to(tl.int64)
            mod = tl.load(mod_ptr + samples[:, None] * stride_mod + cols[None, :], mask=seen, other=0.0).to(tl.float32)
            if KIND == 0:
                p = p * (1.0 + mod)
            else:
                p = p * tanh(mod)
        acc += p
    tl.store(dweight_ptr + cols, tl.sum(acc, axis=0).to(dweight_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def mod_sums(
    partial_ptr, mod_ptr, weight_ptr, dmod_ptr, block, chunks, stride_mod,
    D: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dmod of COLUMNS columns of one sample; dmod: [B, D], contiguous."""
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    sample = (block // column_blocks).to(tl.int64)
    cols = (block % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    seen = cols < D
    tile_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, chunks, ROWS):
        rows = first + tl.arange(0, ROWS)
        tile = (rows < chunks)[:, None] & seen[None, :]
        tile_sum += tl.load(partial_ptr + (sample * chunks + rows)[:, None] * D + cols[None, :], mask=tile, other=0.0)
    acc = tl.sum(tile_sum, axis=0)
    if KIND != 3:
        weight = tl.load(weight_ptr + cols, mask=seen, other=0.0).to(tl.float32)
        if KIND == 1:
            t = tanh(tl.load(mod_ptr + sample * stride_mod + cols, mask=seen, other=0.0).to(tl.float32))
            weight = weight * (1.0 - t * t)
        acc = acc * weight
    tl.store(dmod_ptr + sample * D + cols, acc.to(dmod_ptr.dtype.element_ty), mask=seen)


@triton.jit
def sample_sums(
    partial_ptr, mod_ptr, weight_ptr, dweight_ptr, dmod_ptr, program, partial_rows, chunks, stride_mod,
    D: tl.constexpr, KIND: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr, WEIGHT_COLUMNS: tl.constexpr, MOD_ROWS: tl.constexpr, MOD_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program's share of both sums; `program` counts from 0 to `programs`."""
    weight_programs: tl.constexpr = 0 if KIND == 3 else (D + WEIGHT_COLUMNS - 1) // WEIGHT_COLUMNS
    if KIND == 2:
        weight_sums(
            partial_ptr, mod_ptr, dweight_ptr, program, partial_rows, chunks, stride_mod,
            D, KIND, WEIGHT_ROWS, WEIGHT_COLUMNS,
        )  # fmt: skip
    elif KIND == 3:
        mod_sums(
            partial_ptr, mod_ptr, weight_ptr, dmod_ptr, program, chunks, stride_mod, D, KIND, MOD_ROWS, MOD_COLUMNS
        )
    elif program < weight_programs:
        weight_sums(
            partial_ptr, mod_ptr, dweight_ptr, program, partial_rows, chunks, stride_mod,
            D, KIND, WEIGHT_ROWS, WEIGHT_COLUMNS,
        )  # fmt: skip
    else:
        mod_sums(
            partial_ptr, mod_ptr, weight_ptr, dmod_ptr, program - weight_programs, chunks, stride_mod,
            D, KIND, MOD_ROWS, MOD_COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["partial_rows", "chunks"])
def sample_sums_kernel(
    partial_ptr, mod_ptr, weight_ptr, dweight_ptr, dmod_ptr, partial_rows, chunks, stride_mod,
    D: tl.constexpr, KIND: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr, WEIGHT_COLUMNS: tl.constexpr, MOD_ROWS: tl.constexpr, MOD_COLUMNS: tl.constexpr,
):  # fmt: skip
    sample_sums(
        partial_ptr, mod_ptr, weight_ptr, dweight_ptr, dmod_ptr, tl.program_id(0), partial_rows, chunks, stride_mod,
        D, KIND, WEIGHT_ROWS, WEIGHT_COLUMNS, MOD_ROWS, MOD_COLUMNS,
    )  # fmt: skip


def finish(
    partial: Tensor, mod: Tensor | None, weight: Tensor | None, dweight: Tensor | None, dmod: Tensor | None,
    chunks: int, kind: int,
) -> None:  # fmt: skip
    """One launch that fills dweight [D] and dmod [B, D] from partial [B * chunks, D], fp32."""
    partial_rows, width = partial.shape
    launch(
        sample_sums_kernel, (programs(partial_rows // chunks, width, kind),),
        partial, mod, weight, dweight, dmod, partial_rows, chunks, 0 if mod is None else mod.stride(0),
        D=width, KIND=kind, WEIGHT_ROWS=WEIGHT_ROWS, WEIGHT_COLUMNS=WEIGHT_COLUMNS, MOD_ROWS=MOD_ROWS,
        MOD_COLUMNS=MOD_COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
