"""What was generated, told by the true pictures that it is nearest to."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from blip3o_fast.training.quality import GenerationQuality
from blip3o_fast.training.report import Neighbours
from blip3o_fast.training.validation import evenly_spaced

ROWS, FOUND = 8, 4


def neighbours_of(quality: GenerationQuality | None) -> list[Neighbours]:
    """Of at most 8 pictures of the last evaluation, the 4 nearest true ones; empty where nothing was generated.

    Compared as in recall@k (mean over tokens, centred, cosine), but among all held-out pictures that are measured.
    """
    if quality is None or quality.generated is None:
        return []
    mean = quality.data.raw_mean.double()

    def directions(features: Tensor) -> Tensor:
        return normalize((features.double() - mean).mean(1), dim=-1)

    some = evenly_spaced(len(quality.generated), ROWS)
    gallery = directions(quality.data.raw_targets)
    cosines, places = (directions(quality.generated[some]) @ gallery.T).topk(min(FOUND, len(gallery)))
    names = quality.data.raw_names or [f"held-out picture {place}" for place in range(len(gallery))]
    return [
        Neighbours(
            names[own], [(names[place], cosine, place == own) for place, cosine in zip(row, values, strict=True)]
        )
        for own, row, values in zip(quality.chosen[some].tolist(), places.tolist(), cosines.tolist(), strict=True)
    ]
