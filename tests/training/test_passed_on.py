"""Flags of transformers' TrainingArguments: typed by their own parser, refused where they break a run."""

import sys

import pytest

from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.passed_on import OURS, REFUSED, parse_passed_on
from blip3o_fast.training.trainer_args import training_arguments


def test_values_have_the_types_of_their_fields():
    words = "--adam_epsilon 1e-7 --optim=adafactor --torch_empty_cache_steps 5 --tf32 false"
    assert parse_passed_on(words.split()) == {
        "adam_epsilon": 1e-7, "optim": "adafactor", "torch_empty_cache_steps": 5, "tf32": False,

    }  # fmt: skip
    assert parse_passed_on([]) == {}
    assert parse_passed_on(["--optim", "adamw_torch_8bit"]) == {"optim": "adamw_torch_8bit"}  # of torchao


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adam_epsilon", "small"], r"^--adam_epsilon: invalid float value: 'small'"),
        (["--adam_epsilom", "1"], r"No such option: --adam_epsilom\nhint: did you mean --adam_epsilon\?"),
        (["--embedding_path", "x"], r"No such option: --embedding_path\nhint: did you mean --embeddings_path\?"),
        (["--per_device_train_batch_size", "4"], r"--per_device_train_batch_size is --batch_size here"),
        (["--remove_unused_columns", "true"], r"--remove_unused_columns cannot be given: the batches are not"),
        (["--optim", "adamw_bnb_8bit"], r"--optim adamw_bnb_8bit needs bitsandbytes, which cannot be imported"),
        (["--optim", "paged_adamw_32bit"], r"--optim paged_adamw_32bit needs bitsandbytes"),
        (["--gradient_checkpointing_kwargs", "{}"], r"cannot be given: --checkpointing_mode says how"),
        (["--dataloader_prefetch_factor", "4"], r"--dataloader_prefetch_factor cannot be given"),
        (["word"], r"Got unexpected extra argument 'word'"),
        (["--adam_epsilon", "1", "word"], r"Got unexpected extra argument 'word'"),
    ],
)
def test_what_cannot_be_taken_is_named(words, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it fails
    with pytest.raises(ValueError, match=message):
        parse_passed_on(words)


def test_no_name_of_theirs_is_taken_twice():
    ours = set(TrainSettings.__dataclass_fields__)
    for name in (*OURS, *REFUSED):
        assert name not in ours, f"--{name} is a flag of ours, which its place here would hide"
    assert {name.split()[0].removeprefix("no_") for name in OURS.values()} <= ours


def test_they_reach_the_trainer(tmp_path):
    settings = TrainSettings(
        "e",
        tmp_path,
        min_learning_rate=1e-5,
        warmup_ratio=0.03,
        training_arguments={"adam_epsilon": 1e-7, "optim": "sgd"},
    )
    settings.check()
    made = training_arguments(settings, total_steps=1000, on_cpu=True, evaluates=False)
    assert (made.adam_epsilon, made.optim, made.warmup_steps) == (1e-7, "sgd", 30)
    assert made.lr_scheduler_type == "cosine_with_min_lr" and made.lr_scheduler_kwargs["min_lr"] == 1e-5
    assert training_arguments(TrainSettings("e", tmp_path), total_steps=5, on_cpu=True, evaluates=False).optim in (
        "adamw_torch_fused",
        "adamw_torch",
    )
