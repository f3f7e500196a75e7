"""The model card: a README.md beside the weights, for the hub and for whoever finds the folder.

Sizes and normalisation are the model's. How it was trained and how it scored comes from the folder, where training and
`evaluate` left it there (run.json, metrics.jsonl, evaluation.json), or from the caller. A card that somebody edited is
theirs: the last line of a generated one holds a digest of the rest, and only a card that still agrees is renewed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "README.md"
EVALUATION = "evaluation.json"
_MARKER = "<!-- Written by blip3o_fast ({digest}). Edit it: a card that was edited is never overwritten. -->\n"
_MARKED = re.compile(r"<!-- Written by blip3o_fast \(([0-9a-f]{16})\)\. [^\n]*-->\n?\Z")
_TAGS = ["flow-matching", "diffusion-transformer", "blip3-o"]

# What `evaluate` writes: a metric's name, then what was judged.
_METRICS = ("recall_at_1", "recall_at_5", "token_cosine", "centred_cosine", "l2_distance", "frechet_distance")
_SYSTEMS = {"": "this model", "_ridge": "ridge", "_mean_embedding": "mean embedding", "_unconditional": "unconditional"}
_SETTINGS = ("learning_rate", "weight_decay", "ema_decay", "condition_dropout", "normalize", "seed")


def build(
    model: Any,
    *,
    folder: str | Path | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    **front_matter: Any,
) -> Any:
    """The card as a `huggingface_hub.ModelCard`.

    folder: where run.json and the like are looked for; then where the model was loaded from.
    training, metrics: more lines for these tables, by name.
    front_matter: fields of `huggingface_hub.ModelCardData`: license, datasets, language, ...
    """
    from huggingface_hub import ModelCard, ModelCardData

    run, entry, evaluation = _records(folder)
    inherited = ""
    if not (run or evaluation) and model.loaded_from is not None:
        run, entry, evaluation = _records(model.loaded_from)
        # The weights may have been trained on since.
        inherited = "Of the checkpoint that the weights were loaded from.\n\n" if run or evaluation else ""
    data = ModelCardData(**{"library_name": "blip3o_fast", "tags": list(_TAGS)} | front_matter)
    parts = [
        "# A BLIP3-o diffusion transformer",
        _introduction(model, run),
        "## Sizes\n\n" + _table(("", ""), _sizes(model)),
        "## Data and normalisation\n\n" + "\n".join(f"- {line}" for line in _meaning(model)),
        "## Training\n\n" + inherited + _table(("", ""), _training(run) | dict(training or {}), "Not recorded."),
        "## Numbers\n\n" + inherited + _numbers(entry, evaluation, metrics),
        "## How to sample\n\n" + _sampling(model, run),
        _licence(front_matter),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n\n"
    return ModelCard(text + _MARKER.format(digest=_digest(text)))


def forget(folder: Path) -> None:
    """Remove the folder's card if it was generated and nobody edited it, so that a new one takes its place."""
    card = folder / FILE_NAME
    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    marked = _MARKED.search(text)
    if marked and marked.group(1) == _digest(text[: marked.start()]):
        card.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- what the folder knows -------------------------------------------------------------------------------------------


def _records(folder: str | Path | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(run.json, the last entry of metrics.jsonl with an evaluation, evaluation.json); empty where there is none."""
    if folder is None:
        return {}, {}, {}
    folder = Path(folder)
    step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    root = folder.parent if step else folder
    entry = _last_evaluation(root / "metrics.jsonl", int(step.group(1)) if step else None)
    return _object(root / "run.json"), entry, _object(folder / EVALUATION)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or nothing: a card is no reason not to save a model."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last_evaluation(path: Path, step: int | None) -> dict[str, Any]:
    last: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return last
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "eval_loss" in entry and (step is None or entry.get("step", 0) <= step):
            last = entry
    return last


def _encoders(run: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the condition's and the target's encoder, from the embeddings that the run was given."""
    path = _part(run, "settings").get("embeddings_path")
    meta = _object(Path(path) / "meta.json") if isinstance(path, str) and path else {}
    names = tuple(str(_part(meta, side).get("name") or "") for side in ("condition", "target"))
    return (names[0], names[1]) if all(names) else None


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


# ---- the sections ----------------------------------------------------------------------------------------------------


def _widths(model: Any) -> tuple[int, int]:
    """Channels of the condition and of the result, as they are outside: before and after the normalisation."""
    if model.normalizer is None:
        return model.config.cross_attention_dim, model.config.in_channels
    return model.normalizer.condition.in_features, model.normalizer.target.in_features


def _introduction(model: Any, run: Mapping[str, Any]) -> str:
    condition, result = _widths(model)
    encoders = _encoders(run)
    source, target = (f" of {name}" for name in encoders) if encoders else ("", "")
    kind = "BLIP3-o's NextDiTCrossAttn" if model.config.context_projection else "diffusers' LuminaNextDiT2DModel"
    return (
        f"It generates {model.config.num_tokens} feature tokens of {result} channels{target} from feature tokens of "
        f"{condition} channels{source}, by flow matching. The network is {kind}, a Lumina NextDiT."
    )


def _sizes(model: Any) -> dict[str, Any]:
    config = model.config
    kv = "" if config.kv_heads == config.num_attention_heads else f" ({config.kv_heads} for keys and values)"
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    return {
        "parameters": f"{model.num_parameters():,}",
        "layers": config.num_layers,
        "width": config.hidden_size,
        "heads": f"{config.num_attention_heads} of {config.head_dim}{kv}",
        "feed-forward width": config.ffn_dim,
        "tokens": f"{config.num_tokens}, patch size {config.patch_size}",
        "channels of a token": config.in_channels,
        "channels of the context": config.cross_attention_dim,
        "weights": ", ".join(dtypes),
    }


def _meaning(model: Any) -> list[str]:
    config = model.config
    condition, result = _widths(model)
    time = {
        "blip3o": "the network is given 1000 * sigma and predicts noise - data",
        "lumina": "the network is given 1 - sigma and predicts data - noise",
    }[config.time_convention]
    if config.prediction_type == "epsilon":
        time = time.partition(" and ")[0] + " and predicts the noise"
    normalisation = "none: features go in and come out as the encoders give them"
    if model.normalizer is not None:
        specs = model.normalizer.condition.spec, model.normalizer.target.spec
        normalisation = (
            f"condition {specs[0]}, target {specs[1]}; normalizer.safetensors has the statistics, and `sample` applies "
            "and undoes them: it takes and returns raw features"
        )
    return [
        f"condition: [pictures, tokens, {condition}]",
        f"result: [pictures, {config.num_tokens}, {result}]",
        f"normalisation: {normalisation}",
        f"path: {config.schedule}, sigma from {config.sigma_min:g} to {config.sigma_max:g}; {time}",
    ]


def _training(run: Mapping[str, Any]) -> dict[str, Any]:
    settings, data = _part(run, "settings"), _part(run, "data")
    rows: dict[str, Any] = {}
    if settings.get("embeddings_path"):
        # The last name only: the rest of the path is about a machine.
        rows["embeddings"] = Path(str(settings["embeddings_path"])).name
    encoders = _encoders(run)
    if encoders:
        rows["condition encoder"], rows["target encoder"] = encoders
    rows |= {f"{name.replace('_', ' ')} pictures": data[name] for name in ("train", "held_out") if name in data}
    rows |= {name.replace("_", " "): run[name] for name in ("steps", "effective_batch") if name in run}
    rows |= {name.replace("_", " "): settings[name] for name in _SETTINGS if settings.get(name) is not None}
    versions = _part(run, "versions")
    rows |= {name: versions[name] for name in ("blip3o_fast", "torch") if name in versions}
    return rows


def _numbers(entry: Mapping[str, Any], evaluation: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    found = []
    if metrics:
        found.append(_table(("metric", "value"), metrics))
    judged = {name: text for name, text in _SYSTEMS.items() if f"token_cosine{name}" in evaluation}
    if judged:
        rows = {
            metric: [_value(evaluation.get(f"{metric}{suffix}", "")) for suffix in judged]
            for metric in _METRICS
            if metric in evaluation
        }
        how = ", ".join(
            f"{text} {_value(evaluation[name])}"
            for name, text in (
                ("pictures", "held-out pictures"),
                ("guidance_scale", "guidance"),
                ("num_steps", "steps"),
            )
            if name in evaluation
        )
        found.append(f"By `blip3o-fast evaluate` ({how}):\n\n" + _table(("metric", *judged.values()), rows))
    held_out = {name: value for name, value in entry.items() if name.startswith("eval_") and _is_number(value)}
    if held_out:
        found.append(f"During training, at step {entry.get('step')}:\n\n" + _table(("metric", "value"), held_out))
    return "\n\n".join(found) or "Not recorded."


def _sampling(model: Any, run: Mapping[str, Any]) -> str:
    condition, result = _widths(model)
    tokens = model.config.num_tokens
    # Guidance needs a network that has seen empty conditions.
    guidance = 1.0 if _part(run, "settings").get("condition_dropout") == 0 else 2.0
    return (
        "```python\n"
        "import torch\n"
        "from blip3o_fast import BLIP3oDiT, sample\n\n"
        'model = BLIP3oDiT.from_pretrained(".")  # this folder, or its name on the hub\n'
        f"conditions = torch.randn(2, {tokens}, {condition})  # in place of the encoder's features of two pictures\n"
        f"features = sample(model, conditions, num_steps=30, guidance_scale={guidance})  # [2, {tokens}, {result}]\n"
        "```"
    )


def _licence(front_matter: Mapping[str, Any]) -> str:
    given = front_matter.get("license_name") or front_matter.get("license")
    text = given or "Not stated. Whoever publishes the weights adds `license:` to the lines at the top of this file."
    return f"## Licence\n\n{text}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(header: tuple[str, ...], rows: Mapping[str, Any], otherwise: str = "") -> str:
    if not rows:
        return otherwise
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for name, value in rows.items():
        cells = value if isinstance(value, list) else [_value(value)]
        lines.append(f"| {_value(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)
