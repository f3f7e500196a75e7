"""Judge a trained model on held-out pictures, beside chance and four baselines.

Every metric of `metrics` is computed for five systems, with a suffix to its name:

    (none)                generated with the condition and guidance
    _ridge                the best linear map of the condition, fitted on the training split
    _mean_embedding       the mean training target at each position: the best constant
    _shuffled_condition   what was generated for another picture's condition
    _unconditional        generated without a condition

plus ``recall_at_1_chance``, ``recall_at_5_chance`` and ``frechet_distance_real``: real training pictures against the
held-out ones, as many; what a perfect generator would reach.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.evaluation import baselines, metrics
from blip3o_fast.evaluation.samples import Samples, generate, load_model, read_samples
from blip3o_fast.evaluation.settings import DEFAULTS, SamplingSettings, device_named
from blip3o_fast.files import replacing

SYSTEMS = {
    "": "generated",
    "_ridge": "ridge",
    "_mean_embedding": "mean embedding",
    "_shuffled_condition": "shuffled condition",
    "_unconditional": "unconditional",
}
METRICS = ("recall_at_1", "recall_at_5", "token_cosine", "centred_cosine", "l2_distance", "frechet_distance")
BETTER = {"l2_distance": "lower", "frechet_distance": "lower"}


@dataclass
class EvaluateSettings(SamplingSettings):
    """What `blip3o-fast evaluate` is told: how to sample, and

    samples: a file or folder of `blip3o-fast sample` for the same embeddings, to be judged instead of sampling again.
    output: a JSON file for the numbers, or None.
    unconditional: also sample without a condition (takes half as long again).
    """

    output: str | Path | None = None
    samples: str | Path | None = None
    unconditional: bool = True


def evaluate_checkpoint(settings: EvaluateSettings) -> dict[str, float]:
    """The flat table of numbers described at the top; printed, and written to ``output``.

    Raises ValueError or FileNotFoundError naming the flag or file, what was found and what is allowed.
    """
    settings.check()
    settings = settings.resolved()
    if settings.split != "eval":
        raise ValueError(
            f"--split must be eval, got {settings.split!r}: the baselines are fitted on the training split"
        )
    train, held_out = EmbeddingDataset.splits(settings.embeddings_path, eval_split=settings.eval_split)
    if held_out is None or len(held_out) < 2:
        raise ValueError(
            f"--eval_split {settings.eval_split} of {len(train)} pictures leaves fewer than 2 to evaluate on"
        )
    given = read_samples(settings.samples, held_out) if settings.samples is not None else None
    if given is not None:
        _check_given(given, held_out, settings)
    model = None
    if given is None or settings.unconditional:
        model = load_model(settings.model, device_named(settings.device))
    if given is None:
        assert model is not None
        generated = generate(model, held_out, settings)
    else:
        generated = given.generated[: settings.num_samples]
    count = len(generated)
    systems = {"": generated, **_baseline_predictions(train, held_out, count)}
    if settings.unconditional:
        assert model is not None
        without = replace(settings, guidance_scale=0.0, guidance_start=1.0, guidance_end=0.0, num_samples=count)
        systems["_unconditional"] = generate(model, held_out, without)
    result = judge(systems, held_out.targets[:count], train.targets)
    run = settings.run()
    result |= {"pictures": float(count), "guidance_scale": run["guidance_scale"], "num_steps": run["num_steps"]}
    print(table(result))
    if settings.output is not None:
        _write(Path(settings.output), result)
    return result


def judge(systems: dict[str, Tensor], target: Tensor, train_target: Tensor) -> dict[str, float]:
    """All metrics for all systems (suffix -> predictions ``[n, T, C]``), raw features; needs n >= 2."""
    mean = train_target.double().mean((0, 1))
    out: dict[str, float] = {}
    truth = metrics.Gaussian.fit(target)
    for suffix, predicted in systems.items():
        out |= {name + suffix: value for name, value in _metrics(predicted, target, mean).items()}
        out[f"frechet_distance{suffix}"] = metrics.frechet_distance(predicted, truth)
    generated = systems[""]
    for name in METRICS:
        if name == "frechet_distance":
            continue  # the set of generated embeddings is the same, whatever their order

        def metric(predicted: Tensor, paired: Tensor, name: str = name) -> float:
            return _metrics(predicted, paired, mean, only=name)[name]

        out[f"{name}_shuffled_condition"] = baselines.shuffled_condition(generated, target, metric)
    n = len(target)
    out |= {"recall_at_1_chance": 1 / n, "recall_at_5_chance": min(5, n) / n}
    if len(train_target) >= n:
        # Every k-th training picture: as many as there are held out, or the distances could not be compared.
        real = train_target[:: len(train_target) // n][:n]
        out["frechet_distance_real"] = metrics.frechet_distance(real, truth)
    return out


def _metrics(predicted: Tensor, target: Tensor, mean: Tensor, only: str | None = None) -> dict[str, float]:
    out: dict[str, float] = {}
    if only in (None, "recall_at_1", "recall_at_5"):
        out |= {f"recall_at_{k}": value for k, value in metrics.recall_at_k(predicted, target, mean).items()}
    if only in (None, "token_cosine"):
        out["token_cosine"] = metrics.token_cosine(predicted, target)
    if only in (None, "centred_cosine"):
        out["centred_cosine"] = metrics.centred_cosine(predicted, target, mean)
    if only in (None, "l2_distance"):
        out["l2_distance"] = metrics.l2_distance(predicted, target)
    return out


def _baseline_predictions(train: EmbeddingDataset, held_out: EmbeddingDataset, count: int) -> dict[str, Tensor]:
    ridge = baselines.fit_ridge(train.conditions, train.targets)
    mean = baselines.mean_embedding(train.targets)
    return {
        "_ridge": ridge(held_out.conditions[:count]),
        "_mean_embedding": mean.expand(count, *mean.shape).contiguous(),
    }


def _check_given(given: Samples, held_out: EmbeddingDataset, settings: EvaluateSettings) -> None:
    """The samples must be of this split of these embeddings, or the numbers would mean nothing."""
    count = len(given.index)
    if count < 2:
        raise ValueError(f"--samples {settings.samples}: holds {count} pictures; at least 2 are needed")
    if settings.num_samples is not None and settings.num_samples > count:
        raise ValueError(f"--num_samples {settings.num_samples}: --samples {settings.samples} holds {count} pictures")
    same_rows = count <= len(held_out) and bool((given.index == held_out.indices[:count]).all())
    same = same_rows and given.target.shape[1:] == held_out.targets.shape[1:]
    if not same or not bool((given.target == held_out.targets[:count]).all()):
        told = ", ".join(f"{name} {given.metadata.get(name)}" for name in ("embeddings_path", "split", "eval_split"))
        raise ValueError(
            f"--samples {settings.samples}: its targets are not those of the eval split of {settings.embeddings_path} "
            f"with --eval_split {settings.eval_split}; it was made with {told}"
        )
    for name, default in DEFAULTS.items():
        mine = getattr(settings, name)
        made = type(default)(given.metadata.get(name, mine))
        if made != mine:
            print(f"note: the samples were made with {name} {made}, not {mine}")
            setattr(settings, name, made)
    if "num_steps" in given.metadata:  # else nothing is said about how they were made
        levels = _levels_made(given.metadata, settings)
        if levels != settings.sigmas:
            print(f"note: the samples were made with {_in_words(levels)}, not {_in_words(settings.sigmas)}")
            settings.sigmas = levels


def _levels_made(metadata: dict[str, str], settings: EvaluateSettings) -> tuple[float, ...] | None:
    if "sigmas" not in metadata:
        return None
    try:
        return tuple(float(level) for level in json.loads(metadata["sigmas"]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--samples {settings.samples}: its sigmas must be a list of numbers, got {metadata['sigmas']!r:.80}"
        ) from error


def _in_words(sigmas: tuple[float, ...] | None) -> str:
    return (
        "the linear noise levels"
        if sigmas is None
        else f"noise levels {', '.join(f'{s:.3g}' for s in sigmas[:3])}, ..."
    )


def table(result: dict[str, float]) -> str:
    """The numbers as text: a row per metric, a column per system, chance at the end."""
    columns = [suffix for suffix in SYSTEMS if f"token_cosine{suffix}" in result]
    width = max(len(name) for name in SYSTEMS.values()) + 2
    head = "".join(f"{SYSTEMS[suffix]:>{width}}" for suffix in columns)
    lines = [f"{'':18}{head}{'chance':>10}"]
    for name in METRICS:
        values = "".join(
            f"{result[name + suffix]:>{width}.4g}" if name + suffix in result else " " * (width - 1) + "-"
            for suffix in columns
        )
        chance = f"{result[name + '_chance']:>10.4g}" if f"{name}_chance" in result else ""
        if name == "frechet_distance" and "frechet_distance_real" in result:
            chance = f"   (real pictures: {result['frechet_distance_real']:.4g})"
        lines.append(f"{name:18}{values}{chance}" + ("   lower is better" if name in BETTER else ""))
    pictures = int(result.get("pictures", 0))
    lines.append(f"{pictures} held-out pictures, guidance {result.get('guidance_scale', float('nan')):g}")
    return "\n".join(lines)


def _write(path: Path, result: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
