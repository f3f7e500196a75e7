"""Settings of a training run from files: the recipes of this package and YAML files of yours.

What stands later wins: the recipe, then the file, then the command line.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.passed_on import parse_passed_on

RECIPES = Path(__file__).with_name("recipes")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def settings_from(
    given: Mapping[str, Any],
    *,
    recipe: str | None = None,
    config: str | Path | None = None,
    passed_on: Iterable[str] = (),
) -> TrainSettings:
    """Settings of a run.

    given: fields of `TrainSettings` that were given explicitly. recipe: one of `recipe_names`. config: a YAML file with
    fields of `TrainSettings` and of transformers' `TrainingArguments`. passed_on: words of a command line, flags of
    `TrainingArguments` alone (``["--adam_epsilon", "1e-7"]``).
    Raises ValueError naming the file and the key, or the flag, what was given and what is allowed.
    """
    values: dict[str, Any] = {}
    words: list[str] = []
    if recipe is not None:
        if recipe not in recipe_names():
            raise ValueError(f"--recipe must be one of {', '.join(recipe_names())}, got {recipe!r}")
        values |= read_settings(RECIPES / f"{recipe}.yaml")[0]
    if config is not None:
        own, words = read_settings(Path(config))
        # One of the pair replaces the other of a recipe; giving both in one place is an error of `check`.
        values = _without_rivals(values, own) | own
    values = _without_rivals(values, given) | dict(given)
    more = parse_passed_on(words) | parse_passed_on(passed_on)
    missing = [name for name in ("embeddings_path", "output_dir") if values.get(name) is None]
    if missing:
        where = "give it as a flag, or in the file of --config"
        raise ValueError("\n".join(f"Missing option '--{name}'. ({where})" for name in missing))
    return TrainSettings(**values, training_arguments=more)


# Of two settings that say one thing, the one given later drops the other.
RIVALS = (
    ("warmup_steps", "warmup_ratio"),
    ("max_steps", "num_epochs"),
    ("bf16", "fp16"),
    ("normalize", "normalize_embeddings"),
)


def _without_rivals(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    dropped = {a for pair in RIVALS for a, b in (pair, pair[::-1]) if _says_something(later.get(b))}
    # What belongs to the other choice goes with it: the end of a cosine, the steps that --debug shortens, wandb turned
    # off where a tracker is named.
    if later.get("lr_scheduler", "cosine") != "cosine":
        dropped.add("min_learning_rate")
    if later.get("debug"):
        dropped.add("max_steps")
    if later.get("report_to") is not None:
        dropped.add("no_wandb")
    return {name: value for name, value in earlier.items() if name not in dropped}


def _says_something(value: Any) -> bool:
    return value is not None and value is not False  # 0 steps of warm-up is a choice


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields of `TrainSettings` in a YAML file, and its other keys as words of a command line."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path}: holds a {type(data).__name__}; a mapping of flag names to values is needed")
    types_of = typing.get_type_hints(TrainSettings)
    own: dict[str, Any] = {}
    words: list[str] = []
    for key, value in data.items():
        name = key.removeprefix("--").replace("-", "_")
        if name in types_of and name != "training_arguments":
            own[name] = converted(value, types_of[name], f"{path}: {key}")
        else:
            words += _as_words(name, value, f"{path}: {key}")
    return own, words


def _as_words(name: str, value: Any, where: str) -> list[str]:
    import json

    if value is None or isinstance(value, list | tuple) and not value:
        raise ValueError(f"{where} has no value")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | bool) else str(value)]


def converted(value: Any, kind: Any, where: str) -> Any:
    """A YAML value as a field's type. YAML reads 1e-4, without a point, as text."""
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in allowed:
        return None
    if bool in allowed:
        if type(value) is bool:
            return value
        raise ValueError(f"{where} must be true or false, got {value!r}")
    if Path in allowed or str in allowed:
        if isinstance(value, str | int | float) and type(value) is not bool:
            return str(value)
        raise ValueError(f"{where} must be text, got {value!r}")
    number: Any = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if type(number) is float and float not in allowed:
        number = int(number) if number.is_integer() and isinstance(value, str) else None
    if type(number) not in (int, float):
        what = "a number" if float in allowed else "a whole number"
        raise ValueError(f"{where} must be {what}, got {value!r}")
    return number
