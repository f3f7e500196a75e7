"""Batches of a folder of shards, block-shuffled, without end, for a loop of your own.

    stream = BlockStream("runs/embeddings", batch_size=32, seed=0, rank=rank, world_size=world_size)
    for batch in stream: ...
    torch.save(stream.state_dict(), ...)        # and load_state_dict: the next batch is the one that would have come

`blip3o-fast train` gets by with the step alone (`training.streamed`), in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .block_shuffle import BLOCK, WINDOW, BlockOrder
from .mapped import MappedShards


class BlockStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Yields ``eva [B, T, E]``, ``clip [B, T, C]`` (stored dtype; int8 with scales) and ``index`` int64 ``[B]``.

    Args:
        folder: of shards. rows: int64, the pictures to draw from (a split's, ascending), None: all.
        batch_size: of one rank. Step s of rank r holds the stream's positions ``(s * world_size + r) * batch_size`` and
            on: another number of ranks with the same global batch sees the same pictures at the same step.
        seed, block, window: of the order, see `BlockOrder`.
        on_bad_shard: see `MappedShards`.

    Iterating continues where the last iteration stopped. It is meant for the main process: in a worker process the
    position would advance where nobody can read it, so there it raises RuntimeError. ValueError where there is too
    little data for so many ranks.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        rows: Tensor | None = None,
        block: int = BLOCK,
        window: int = WINDOW,
        on_bad_shard: str = "stop",
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size, rank, world_size: got {batch_size}, {rank}, {world_size}; at least 1 picture and "
                "0 <= rank < world_size are needed"
            )
        self.shards = MappedShards(folder, on_bad_shard=on_bad_shard)
        self.rows = torch.arange(self.shards.count) if rows is None else rows
        self.order = BlockOrder(len(self.rows), seed, block=block, window=window)
        check_enough(self.shards, self.order, batch_size, world_size)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.position = 0  # of the whole stream, over all ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if torch.utils.data.get_worker_info() is not None:
            raise RuntimeError("BlockStream keeps its position in the main process: use num_workers=0")
        while True:
            rows = self._rows_at(self.position)
            self.shards.prefetch(self._rows_at(self.position + self.batch_size * self.world_size))
            self.position += self.batch_size * self.world_size
            yield self.shards.gather(rows) | {"index": rows}

    def _rows_at(self, position: int) -> Tensor:
        return self.rows[self.order.pictures(position + self.rank * self.batch_size, self.batch_size)].long()

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and of which order; numbers only."""
        order = self.order
        return {
            "position": self.position, "n": order.n, "seed": order.seed, "block": order.block, "window": order.window
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there, on any number of ranks; ValueError where the state is of another order or other data."""
        mine = self.state_dict()
        wrong = [f"{name}: {state.get(name)!r}, here {mine[name]}" for name in mine
                 if name != "position" and state.get(name) != mine[name]]  # fmt: skip
        position = state.get("position")
        if wrong or type(position) is not int or position < 0:
            raise ValueError(f"state: of another stream ({'; '.join(wrong) or f'position {position!r}'})")
        self.position = position


def check_enough(shards: MappedShards, order: BlockOrder, batch_size: int, world_size: int) -> None:
    """Every rank needs a block's worth of pictures, and a step must not hold a picture twice; else ValueError."""
    if order.blocks < world_size or order.n < batch_size * world_size:
        raise ValueError(
            f"{shards.folder}: {order.n} training pictures, {order.blocks} blocks of {order.block} in "
            f"{len(shards.names)} shards, are too few for {world_size} processes of {batch_size} pictures each; use "
            "fewer processes, a smaller batch, or take the set into memory (--loading memory)"
        )
