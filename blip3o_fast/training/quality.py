"""How good are the samples? Held-out pictures are generated at each evaluation and compared with the truth.

Beside every number stand those of two predictions that need no training: the mean embedding, and ridge regression from
condition to target. Both are fitted in the network's space (normalised, as the run has its data in memory) and mapped
back, as samples are; `blip3o-fast evaluate` fits them on raw features and judges all held-out pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.evaluation import baselines, metrics
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.prepare import Data
from blip3o_fast.training.validation import NOISE_SEED, evenly_spaced

RECALLS = (1, 5, 10)
# Suffix of a metric's name -> the system that it belongs to.
SYSTEMS = {"": "this model", "_ridge": "ridge regression", "_mean_embedding": "mean embedding"}
# Training pictures that the baselines are fitted on: seconds.
BASELINE_PICTURES = 2048


class GenerationQuality:
    """``quality(model)`` -> metrics of generated against true features of some held-out pictures.

    Every picture has noise of its own, the same in every run and at every evaluation. The metrics are those of
    `evaluation.metrics` in raw feature space: token_cosine, l2_distance, recall_at_1, _5, _10 (among these pictures),
    frechet_distance, each also with the suffixes of SYSTEMS; ``recall_at_k_chance``; and norm_ratio, the mean length
    of a generated token over that of a true one.

    Attributes:
        chosen: int64 [count], the places of the pictures among ``data.raw_targets``.
        generated: float32 [count, T, C] of the last evaluation, or None.
    """

    def __init__(self, data: Data, count: int, *, num_steps: int, guidance_scale: float, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size
        self.sampling = {"num_steps": num_steps, "guidance_scale": guidance_scale}
        self.chosen = evenly_spaced(len(data.raw_conditions), count)
        self.conditions = data.raw_conditions[self.chosen].float()
        self.targets = data.raw_targets[self.chosen].float()
        self.generated: Tensor | None = None
        self._truth = metrics.Gaussian.fit(self.targets)
        self._baselines: dict[str, float] | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        self.generated = torch.cat(list(self._generate(model)))
        if self._baselines is None:
            self._baselines = self._judge_baselines()
        count = len(self.targets)
        return {
            **self._judge(self.generated),
            "norm_ratio": float(self.generated.norm(dim=-1).mean() / self.targets.norm(dim=-1).mean()),
            **self._baselines,
            **{f"recall_at_{k}_chance": min(k, count) / count for k in RECALLS},
        }

    def _generate(self, model: Any) -> Iterator[Tensor]:
        from blip3o_fast.sampling.sample import sample

        device = next(model.parameters()).device
        shape = (self.targets.shape[1], model.config.in_channels)
        for rows in torch.arange(len(self.targets)).split(self.batch_size):
            noise = normal_noise_at(NOISE_SEED, rows.to(device), shape)
            yield sample(model, self.conditions[rows].to(device), noise=noise, **self.sampling).float().cpu()  # type: ignore[call-overload]

    def _judge(self, predicted: Tensor, suffix: str = "") -> dict[str, float]:
        recalls = metrics.recall_at_k(predicted, self.targets, self.data.raw_mean, RECALLS)
        values = {
            "token_cosine": metrics.token_cosine(predicted, self.targets),
            "l2_distance": metrics.l2_distance(predicted, self.targets),
            "frechet_distance": metrics.frechet_distance(predicted, self._truth),
            **{f"recall_at_{k}": recall for k, recall in recalls.items()},
        }
        return {name + suffix: value for name, value in values.items()}

    def _judge_baselines(self) -> dict[str, float]:
        data, count = self.data, len(self.targets)
        some = evenly_spaced(len(data.conditions), BASELINE_PICTURES)
        conditions, targets = data.conditions[some].float(), data.targets[some].float()
        mean = baselines.mean_embedding(targets).expand(count, -1, -1)
        out = self._judge(data.normalizer.target.inverse(mean.contiguous()), "_mean_embedding")
        # One map for all places: it needs a condition token for every target token, and some pictures.
        if conditions.shape[1] == targets.shape[1] and len(conditions) >= 4:
            ridge = baselines.fit_ridge(conditions, targets)
            normalised = data.normalizer.condition(self.conditions)
            out |= self._judge(data.normalizer.target.inverse(ridge(normalised)), "_ridge")
        return out


def generation_quality(settings: TrainSettings, data: Data) -> GenerationQuality | None:
    """What ``--eval_generation_samples`` asks for, or None where there are fewer than 2 held-out pictures."""
    count = min(settings.eval_generation_samples, len(data.raw_conditions))
    if count < 2:
        return None
    return GenerationQuality(
        data,
        count,
        num_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.eval_batch_size,
    )
