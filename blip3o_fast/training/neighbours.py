"""What was generated, told by the true pictures that it is nearest to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from blip3o_fast.data.dataset import split_indices
from blip3o_fast.data.shards import META, read_index
from blip3o_fast.training.quality import GenerationQuality
from blip3o_fast.training.report import Neighbours
from blip3o_fast.training.validation import MAX_PICTURES, evenly_spaced

ROWS, FOUND = 8, 4


def neighbours_of(quality: GenerationQuality | None, settings: dict[str, Any]) -> list[Neighbours]:
    """Of at most 8 pictures of the last evaluation, the 4 nearest true ones; empty where nothing was generated.

    Compared as in recall@k (mean over tokens, centred, cosine), but among all held-out pictures that are measured.
    settings: of the run, as in run.json: they say where the pictures' names are.
    """
    if quality is None or quality.generated is None:
        return []
    mean = quality.data.raw_mean.double()

    def directions(features: Tensor) -> Tensor:
        return normalize((features.double() - mean).mean(1), dim=-1)

    some = evenly_spaced(len(quality.generated), ROWS)
    gallery = directions(quality.data.raw_targets)
    cosines, places = (directions(quality.generated[some]) @ gallery.T).topk(min(FOUND, len(gallery)))
    names = _names(settings, len(gallery))
    return [
        Neighbours(
            names[own], [(names[place], cosine, place == own) for place, cosine in zip(row, values, strict=True)]
        )
        for own, row, values in zip(quality.chosen[some].tolist(), places.tolist(), cosines.tolist(), strict=True)
    ]


def _names(settings: dict[str, Any], count: int) -> list[str]:
    """Key and caption of each measured picture of the eval split. The original's pickle would have to be read again."""
    folder = Path(settings["embeddings_path"])
    if not (folder / META).is_file():
        return [f"held-out picture {place}" for place in range(count)]
    index = read_index(folder)
    rows = split_indices(len(index), settings["eval_split"])[1]
    chosen = [index[row] for row in rows[evenly_spaced(len(rows), MAX_PICTURES)].tolist()]
    return [row.key if row.caption in ("", row.key) else f"{row.caption} ({row.key})" for row in chosen]
