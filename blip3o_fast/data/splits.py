"""Which pictures are held out: by a random order of the rows, or by a hash of each picture's key.

``random`` is the original script's split: every row may change sides when a single picture is added. ``hash`` looks at
a picture's key alone, so a picture stays on its side whatever is added or taken away, and two pictures with one key
never lie on both sides. Its share is met on average, not exactly.

Every reader of a set must agree on the rule, or pictures that one trained on are held out for the other. So the rule
is a property of the set (`default_rule`): a file ``split.json`` beside the shards, ``{"rule": "hash"}``, says it;
without one, a folder above `LARGE` bytes of shards is split by hash, everything smaller as the original did.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

RULES = ("random", "hash")
RULE_FILE = "split.json"
# Fixed, and not a share of the memory: a run must not change with the machine.
LARGE = 4 << 30


def is_large(path: str | os.PathLike[str]) -> bool:
    """A folder with more than `LARGE` bytes of shards: it is streamed rather than taken into memory."""
    return sum(shard.stat().st_size for shard in Path(path).glob("shard*.safetensors")) > LARGE


def default_rule(path: str | os.PathLike[str]) -> str:
    """The rule by which a set is split where nobody asks for another one; ValueError for a bad ``split.json``."""
    file = Path(path) / RULE_FILE
    if not file.is_file():
        return "hash" if is_large(path) else "random"
    try:
        rule = json.loads(file.read_text(encoding="utf-8"))["rule"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: expected {{"rule": "random"}} or {{"rule": "hash"}}, found none such') from error
    return check_rule(rule, f"{file}: rule")


def check_rule(rule: object, name: str) -> str:
    if rule not in RULES:
        raise ValueError(f"{name}: got {rule!r}; allowed are {', '.join(map(repr, RULES))}")
    return str(rule)


def split_indices(count: int, eval_split: float, seed: int = 42) -> tuple[Tensor, Tensor]:
    """Rows (int64) of the train and of the eval split of ``count`` pictures, in random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = count - int(count * eval_split)
    return order[:cut], order[cut:]


def held_out_by_hash(key: str, eval_split: float) -> bool:
    """Whether a picture is held out: the first 8 bytes of BLAKE2b of its key, as a share of 2**64, are below it."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(eval_split * 2**64)


def hash_split(keys: Iterable[str], eval_split: float) -> tuple[Tensor, Tensor]:
    """Rows (int64, ascending) of the train and of the eval split; the keys are read once and not kept."""
    held_out = torch.from_numpy(numpy.fromiter((held_out_by_hash(key, eval_split) for key in keys), dtype=numpy.bool_))
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def split_rows(keys: Iterable[str], count: int, eval_split: float, rule: str, seed: int = 42) -> tuple[Tensor, Tensor]:
    """Rows of both splits by a rule; ``count`` keys. The random rule looks at no key."""
    return hash_split(keys, eval_split) if rule == "hash" else split_indices(count, eval_split, seed)
