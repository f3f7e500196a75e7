"""What int8 costs: the error per token, and whether a picture is still found among the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .stored import to_float

_MOST = 1000  # pictures of a shard that are compared with each other
_NEIGHBOURS = 10


def measure(features: Tensor, stored: Tensor, scale: Tensor) -> dict[str, float]:
    """Of one side of a shard, ``[n, T, C]`` in floating point and as int8.

    error, largest: norm of the difference over the norm of the token, mean and maximum. recall_at_1: share of the
    pictures (means over tokens, cosine) that find themselves among the originals. neighbours: share of the 10 nearest
    other pictures that stays.
    """
    values, again = features.float(), to_float(stored, scale)
    error = (again - values).norm(dim=-1) / values.norm(dim=-1).clamp_min(1e-30)
    gallery, queries = (F.normalize(side[:_MOST].mean(1), dim=-1) for side in (values, again))
    count = len(gallery)
    exact, close = gallery @ gallery.T, queries @ gallery.T
    own = torch.arange(count)
    recall = float((close.argmax(1) == own).float().mean())
    k = min(_NEIGHBOURS, count - 1)
    kept = 1.0
    if k:
        for similarity in (exact, close):
            similarity.fill_diagonal_(-2.0)
        before, after = exact.topk(k).indices, close.topk(k).indices
        kept = float((before.unsqueeze(2) == after.unsqueeze(1)).any(2).float().mean())
    return {
        "error": float(error.mean()),
        "largest": float(error.max()),
        "recall_at_1": recall,
        "neighbours": kept,
        "pictures": float(len(features)),
    }


def summary(shards: Iterable[dict[str, dict[str, float]]], dims: dict[str, int]) -> str:
    """One line per side over all shards (mean over pictures), beside the bytes that int8 takes less."""
    found = list(shards)
    lines = []
    for side, dim in dims.items():
        parts = [shard[side] for shard in found if side in shard]
        count = sum(part["pictures"] for part in parts)
        if not count:
            continue
        error, recall, kept = (
            sum(part[name] * part["pictures"] for part in parts) / count
            for name in ("error", "recall_at_1", "neighbours")
        )
        bytes_each = dim + 4
        lines.append(
            f"int8 {side}: {1 - bytes_each / (4 * dim):.0%} fewer bytes than float32, {1 - bytes_each / (2 * dim):.0%} "
            f"than bfloat16; error per token {error:.2%}, largest {max(p['largest'] for p in parts):.2%}; "
            f"recall@1 {recall:.2%}, {kept:.1%} of the 10 nearest neighbours kept"
        )
    return "\n".join(lines)
