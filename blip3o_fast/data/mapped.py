"""All shards of a folder as two long tensors that nobody reads whole: memory-mapped, any row at once.

    shards = MappedShards("runs/embeddings")
    shards.count                                  # pictures of all shards
    batch = shards.gather(torch.tensor([7, 90_001, 12]))
    batch["eva"]                                  # [3, T, E] in the stored dtype, and "clip" [3, T, C]

Row i is the index's line i. A shard is opened when a row of it is wanted; only the pages of wanted rows are read, and
they belong to the system's file cache, not to the process. int8 comes with its scales: ``to_float`` belongs on the
device, where bytes are cheap to widen.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shards import INDEX, iter_index, read_meta
from .stored import TENSORS, scale_name, tensor_name, to_float

ON_BAD_SHARD = ("stop", "skip")
OPEN_SHARDS = 256  # mapped at a time, far below the system's limit of open files
_STORED = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class BadShardError(ValueError):
    """A shard, or a row of it, is not what the index says: file, row, what was expected, what was found."""


@dataclass(frozen=True)
class OpenShard:
    """Tensors that are views of the file, by name (eva, clip, and their scales where stored), and where they lie."""

    tensors: dict[str, Tensor]
    offsets: dict[str, int]  # of their first byte in the file
    descriptor: int


def open_shard(path: Path, count: int, tokens: int, widths: dict[str, int]) -> OpenShard:
    """Map a shard of ``count`` pictures and check names, shapes and dtypes; BadShardError says what is wrong.

    widths: ``{"condition": E, "target": C}``.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadShardError(f"{path}: expected a shard of {count} pictures, found no such file; extract it again")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            stored_names = {}
            for side, ours in TENSORS.items():
                stored_names[ours] = tensor_name(names, side)
                if scale_name(stored_names[ours]) in names:
                    stored_names[scale_name(ours)] = scale_name(stored_names[ours])
            for ours, theirs in stored_names.items():
                tensors[ours] = file.get_tensor(theirs)  # a view of the mapped file: nothing is read yet
    except (SafetensorError, OSError) as error:
        raise BadShardError(
            f"{path}: expected a whole safetensors file, found one that cannot be opened ({error}); extract it again"
        ) from error
    for side, ours in TENSORS.items():
        found, wanted = tensors[ours], (count, tokens, widths[side])
        if tuple(found.shape) != wanted or found.dtype not in _STORED:
            raise BadShardError(f"{path}: expected {ours} {list(wanted)}, found {list(found.shape)} of {found.dtype}")
        if found.dtype == torch.int8 and tuple(getattr(tensors.get(scale_name(ours)), "shape", ())) != wanted[:2]:
            raise BadShardError(f"{path}: expected {scale_name(ours)} {list(wanted[:2])} beside int8, found none such")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
        offsets = {ours: 8 + length + table[theirs]["data_offsets"][0] for ours, theirs in stored_names.items()}
        return OpenShard(tensors, offsets, os.dup(file.fileno()))


class MappedShards:
    """Rows of a folder of shards in O(1), in their stored dtype.

    Args:
        folder: as ``blip3o-fast extract`` writes it; of the index 8 bytes a shard are kept.
        on_bad_shard: ``"stop"``: a bad shard is a `BadShardError`. ``"skip"``: its rows are answered with rows of the
            next good shard, so that the order of everything else stays as it is; `replaced` counts them, and the
            shard is named in a warning.

    A row with NaN or Inf counts as bad, too. Attributes: meta, count, names (of the shards), ``replaced``, ``bad``
    (shard -> what is wrong). One instance may be used by forked workers; each maps the shards that it needs.
    Raises FileNotFoundError or ValueError for a folder whose description or index is unusable.
    """

    def __init__(self, folder: str | os.PathLike[str], *, on_bad_shard: str = "stop") -> None:
        if on_bad_shard not in ON_BAD_SHARD:
            raise ValueError(f"on_bad_shard: got {on_bad_shard!r}; allowed are {', '.join(ON_BAD_SHARD)}")
        self.folder, self.on_bad_shard = Path(folder), on_bad_shard
        self.meta = read_meta(self.folder)
        self.names, self.starts = _extents(self.folder)
        self.count = int(self.starts[-1])
        self.widths = {"condition": self.meta.condition.dim, "target": self.meta.target.dim}
        self.replaced, self.bad = 0, dict[str, str]()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._unreadable: dict[int, BadShardError] = {}

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # another process maps for itself

    def place(self, row: int) -> tuple[Path, int]:
        """The file that holds a row, and where in it."""
        shard = int(torch.searchsorted(self.starts, row, right=True)) - 1
        return self.folder / self.names[shard], row - int(self.starts[shard])

    def gather(self, rows: Tensor) -> dict[str, Tensor]:
        """``eva [n, T, E]`` and ``clip [n, T, C]`` of int64 rows ``[n]``, copied in the stored dtype (int8: with
        ``eva_scale`` and ``clip_scale`` ``[n, T]``). Shards of several dtypes in one call come as float32.
        """
        if len(rows) == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < self.count:
            raise ValueError(f"rows: got {rows.tolist()[:8]}; {self.folder} has the rows 0..{self.count - 1}")
        places = self._places(rows)
        views = [self._row(*place) for place in places]
        batch = _stacked(views)
        if (bad := _not_finite(batch)) is not None:
            for i in bad.nonzero()[:, 0].tolist():
                shard, row = places[i]
                views[i] = self._instead(shard, row, self._row_error(shard, row, views[i]))
            batch = _stacked(views)
        return batch

    def prefetch(self, rows: Tensor) -> None:
        """Ask the system to begin reading these rows, where it can be asked (Linux); returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard, row in self._places(rows):
            try:
                opened = self._shard(shard)
            except BadShardError:
                continue  # told when the row is wanted
            for name, tensor in opened.tensors.items():
                size = tensor[0].numel() * tensor.element_size()
                offset = opened.offsets[name] + row * size
                os.posix_fadvise(opened.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def _places(self, rows: Tensor) -> list[tuple[int, int]]:
        """Shard and row in it, of each row."""
        shards = torch.searchsorted(self.starts, rows, right=True) - 1
        return list(zip(shards.tolist(), (rows - self.starts[shards]).tolist(), strict=True))

    def _row(self, shard: int, row: int) -> dict[str, Tensor]:
        """Views of one row, or of what stands for it where its shard cannot be opened."""
        try:
            return {name: tensor[row] for name, tensor in self._shard(shard).tensors.items()}
        except BadShardError as error:
            return self._instead(shard, row, error)

    def _instead(self, bad: int, row: int, error: BadShardError) -> dict[str, Tensor]:
        if self.on_bad_shard == "stop":
            raise error
        self._remember(bad, error)
        for step in range(1, len(self.names)):
            shard = (bad + step) % len(self.names)
            place = row % int(self.starts[shard + 1] - self.starts[shard])
            try:
                views = {name: tensor[place] for name, tensor in self._shard(shard).tensors.items()}
            except BadShardError as other:
                self._remember(shard, other)
                continue
            if _not_finite(_stacked([views])) is None:
                self.replaced += 1
                return views
            self._remember(shard, self._row_error(shard, place, views))
        raise BadShardError(f"{self.folder}: expected shards to read, found none that is whole: {self.bad}")

    def _remember(self, shard: int, error: BadShardError) -> None:
        if self.names[shard] not in self.bad:
            self.bad[self.names[shard]] = str(error)
            warnings.warn(f"{error}; its pictures are skipped (on_bad_shard='skip')", stacklevel=2)

    def _row_error(self, shard: int, row: int, views: dict[str, Tensor]) -> BadShardError:
        path = self.folder / self.names[shard]
        name = next(n for n, v in views.items() if v.is_floating_point() and not bool(torch.isfinite(v).all()))
        return BadShardError(f"{path}: expected finite {name}, found NaN or Inf in row {row}")

    def _shard(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if number in self._unreadable:
            raise self._unreadable[number]
        count = int(self.starts[number + 1] - self.starts[number])
        try:
            opened = open_shard(self.folder / self.names[number], count, self.meta.tokens, self.widths)
        except BadShardError as error:
            self._unreadable[number] = error
            raise
        self._open[number] = opened
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return opened


def _stacked(views: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One copy, row by row: several times as fast as indexing, whose rows of 160 kB are copied element by element."""
    kinds = {tuple((name, value.dtype) for name, value in row.items()) for row in views}
    if len(kinds) > 1:  # a folder whose shards differ in dtype
        views = [
            {name: to_float(row[name], row.get(scale_name(name))).float() for name in TENSORS.values()} for row in views
        ]
    return {name: torch.stack([row[name] for row in views]) for name in views[0]}


def _not_finite(batch: dict[str, Tensor]) -> Tensor | None:
    """bool ``[n]``: rows with NaN or Inf; None where there are none.

    A sum that is finite has finite terms, and costs a tenth of `isfinite`, which is asked only where it is not.
    """
    if all(bool(torch.isfinite(v.sum(dtype=torch.float32))) for v in batch.values() if v.is_floating_point()):
        return None
    bad = [~torch.isfinite(v).flatten(1).all(1) for v in batch.values() if v.is_floating_point()]
    rows = torch.stack(bad).any(0)
    return rows if bool(rows.any()) else None


def _extents(folder: Path) -> tuple[list[str], Tensor]:
    """Names of the shards in the index's order, and int64 ``[shards + 1]``: where each begins, and the end."""
    names: list[str] = []
    starts, count = [0], 0
    for row in iter_index(folder):
        if not names or row.shard != names[-1]:
            names.append(row.shard)
            starts.append(count)
        if row.row != count - starts[-1]:
            raise ValueError(
                f"{folder / INDEX}, line {count + 1}: expected row {count - starts[-1]} of {row.shard}, found row "
                f"{row.row}; streaming needs an index in the order of the shards and their rows, as extract writes it"
            )
        count += 1
    if not count:
        raise ValueError(f"{folder / INDEX}: lists no picture; extraction has not finished a shard yet")
    if len(set(names)) != len(names):
        raise ValueError(f"{folder / INDEX}: expected each shard in one stretch of lines, found one in several")
    return names, torch.tensor([*starts[1:], count])
