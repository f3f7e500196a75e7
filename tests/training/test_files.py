"""Settings from recipes and YAML files: what wins, what is converted, what is refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest

from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.files import RECIPES, read_settings, recipe_names, settings_from

GIVEN = {"embeddings_path": "e", "output_dir": "o"}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["blip3o", "demo", "seed"])
def test_every_recipe_is_whole(name):
    assert name in recipe_names()
    own, passed_on = read_settings(RECIPES / f"{name}.yaml")
    assert own and not passed_on
    settings_from(GIVEN, recipe=name).check()


def test_the_recipe_of_blip3o():
    found = settings_from(GIVEN, recipe="blip3o")
    expected = {
        "learning_rate": 1e-4, "weight_decay": 0.0, "lr_scheduler": "cosine", "min_learning_rate": 1e-5,
        "warmup_ratio": 0.003, "max_grad_norm": 1.0, "batch_size": 16, "condition_dropout": 0.1,
        "timestep_sampling": "uniform", "warmup_steps": None,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_recipe_of_the_seed_is_the_default_but_for_what_the_original_had_not():
    seed, ours = settings_from(GIVEN, recipe="seed"), TrainSettings(**GIVEN)
    different = {f.name for f in fields(TrainSettings) if getattr(seed, f.name) != getattr(ours, f.name)}
    assert different == {"condition_dropout", "ema_decay", "warmup_steps"}


def test_the_recipe_of_the_demo_is_what_the_demo_runs(tmp_path):
    from blip3o_fast.demo.run import DemoSettings, _train_flags

    words = list(map(str, _train_flags(DemoSettings(), tmp_path / "e", tmp_path / "m")))
    flags = dict(zip((w[2:] for w in words[::2]), words[1::2], strict=True))
    recipe = read_settings(RECIPES / "demo.yaml")[0]
    for name, value in recipe.items():
        if name in flags:
            assert type(value)(flags[name]) == value, name
    assert {"learning_rate", "max_steps", "warmup_steps", "normalize", "batch_size"} <= flags.keys() & recipe.keys()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = write(tmp_path, "learning_rate: 3e-4\nbatch_size: 8\nweight-decay: 0.5\n")
    found = settings_from(GIVEN | {"batch_size": 4}, recipe="blip3o", config=path)
    assert (found.batch_size, found.learning_rate, found.weight_decay) == (4, 3e-4, 0.5)
    assert found.min_learning_rate == 1e-5


def test_of_two_flags_for_one_thing_the_later_replaces_the_earlier(tmp_path):
    assert settings_from(GIVEN | {"warmup_steps": 7}, recipe="blip3o").warmup_ratio is None
    assert settings_from(GIVEN | {"num_epochs": 2.0}, recipe="demo").max_steps is None
    found = settings_from(GIVEN, recipe="blip3o", config=write(tmp_path, "fp16: true"))
    assert found.fp16 and not found.bf16
    assert settings_from(GIVEN | {"warmup_steps": 0}, recipe="blip3o").warmup_ratio is None
    both = settings_from(GIVEN, config=write(tmp_path, "warmup_steps: 5\nwarmup_ratio: 0.1"))
    with pytest.raises(ValueError, match="--warmup_steps and --warmup_ratio exclude each other"):
        both.check()


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("demo", {"normalize_embeddings": True}, {"normalize": "l2"}),
        ("demo", {"debug": True}, {"max_steps": None, "num_epochs": 2}),
        ("demo", {"debug": True, "max_steps": 5}, {"max_steps": 5}),
        ("demo", {"report_to": "wandb"}, {"no_wandb": False}),
        ("blip3o", {"lr_scheduler": "linear"}, {"min_learning_rate": 0.0}),
        ("blip3o", {"warmup_steps": 0}, {"warmup_steps": 0, "warmup_ratio": None}),
    ],
)
def test_a_flag_is_never_at_odds_with_its_recipe(recipe, flags, expected):
    found = settings_from(GIVEN | flags, recipe=recipe)
    found.check()
    assert {name: getattr(found, name) for name in expected} == expected


def test_everything_may_stand_in_the_file(tmp_path):
    path = write(
        tmp_path, "embeddings_path: here\noutput_dir: there\nsubset_size: null\nadam_epsilon: 1e-7\noptim: sgd\n"
    )
    found = settings_from({}, config=path)
    assert (found.embeddings_path, found.output_dir, found.subset_size) == (Path("here"), Path("there"), None)
    assert found.training_arguments == {"adam_epsilon": 1e-7, "optim": "sgd"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: many", r"run.yaml: batch_size must be a whole number, got 'many'"),
        ("batch_size: 2.5", r"batch_size must be a whole number, got 2.5"),
        ("learning_rate: [1]", r"learning_rate must be a number, got \[1\]"),
        ("bf16: 1", r"bf16 must be true or false, got 1"),
        ("lr_scheduler: true", r"lr_scheduler must be text, got True"),
        ("learning_rat: 1", r"No such option: --learning_rat\nhint: did you mean --learning_rate\?"),
        ("- a\n- b", r"holds a list; a mapping of flag names to values is needed"),
        ("a: [", r"run.yaml: not a YAML file"),
        ("optim: []", r"run.yaml: optim has no value"),
        ("batch_size: 3", r"Missing option '--embeddings_path'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        settings_from({}, config=write(tmp_path, text))


def test_no_such_recipe_or_file(tmp_path):
    with pytest.raises(ValueError, match="--recipe must be one of blip3o, demo, seed, got 'sed'"):
        settings_from(GIVEN, recipe="sed")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        settings_from(GIVEN, config=tmp_path / "none.yaml")
