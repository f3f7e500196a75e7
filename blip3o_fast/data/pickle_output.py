"""The original project's single file, from a folder of shards."""

from __future__ import annotations

import os
from pathlib import Path

from .shards import read_shards

PICKLE = "blip3o_grid_embeddings.pkl"  # the original extractor's file name


def write_pickle(folder: str | os.PathLike[str], path: Path) -> None:
    """The original project's file from a folder of shards: numpy float32 arrays under its own keys."""
    import pickle

    read = read_shards(folder)
    data = {
        "eva_blip3o_embeddings": read.condition.numpy(),
        "clip_blip3o_embeddings": read.target.numpy(),
        "captions": read.captions,
        "keys": read.keys,
        "total_samples": len(read.keys),
        "config": {
            "condition": vars(read.meta.condition),
            "target": vars(read.meta.target),
            "tokens": read.meta.tokens,
        },
    }
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            pickle.dump(data, file, protocol=4)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
