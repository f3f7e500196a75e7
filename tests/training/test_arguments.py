"""Flags: every bad one is named, before anything is loaded."""

import pytest

from blip3o_fast.training.arguments import TrainSettings, warmup_steps


def settings(**changes):
    return TrainSettings("embeddings", "output", **changes)


def test_defaults_are_those_of_the_original_script():
    given = settings()
    given.check()
    original = {
        "num_epochs": 10, "batch_size": 32, "eval_batch_size": 64, "learning_rate": 1e-4, "weight_decay": 0.01,
        "gradient_accumulation_steps": 1, "sigma_min": 1e-4, "sigma_max": 1.0, "prediction_type": "v_prediction",
        "schedule_type": "linear", "regularization_weight": 0.0, "subset_size": None, "eval_split": 0.1,
        "logging_steps": 100, "save_steps": 1000, "eval_steps": 1000, "wandb_project": "blip3o-dit", "device": "auto",
        "resume_from_checkpoint": None,
    }  # fmt: skip
    assert {name: getattr(given, name) for name in original} == original


BAD = [
    ({"batch_size": 0}, r"--batch_size must be a whole number >= 1, got 0"),
    ({"batch_size": 2.5}, r"--batch_size must be a whole number >= 1, got 2.5"),
    ({"num_layers": True}, r"--num_layers must be a whole number"),
    ({"learning_rate": 0}, r"--learning_rate must be a number > 0, got 0"),
    ({"learning_rate": float("nan")}, r"--learning_rate must be"),
    ({"num_epochs": -1}, r"--num_epochs must be a number > 0"),
    ({"condition_dropout": 1.5}, r"--condition_dropout must be a number >= 0 and <= 1, got 1.5"),
    ({"ema_decay": 1.0}, r"--ema_decay must be"),
    ({"lr_scheduler": "cosin"}, r"--lr_scheduler must be one of cosine, linear, .*, got 'cosin'"),
    ({"device": "tpu"}, r"--device must be one of auto, cpu, cuda, got 'tpu'"),
    ({"prediction_type": "x0"}, r"--prediction_type must be one of v_prediction, epsilon"),
    ({"normalize": "pca"}, r"normalize: got 'pca'"),
    ({"normalize": "pca:4", "normalize_embeddings": True}, r"--normalize_embeddings means --normalize l2"),
    ({"timestep_sampling": "lognormal"}, r"lognormal"),
    ({"warmup_steps": 5, "warmup_ratio": 0.1}, r"--warmup_steps and --warmup_ratio exclude each other"),
    ({"warmup_ratio": 2}, r"--warmup_ratio must be a number >= 0 and <= 1, got 2"),
    ({"min_learning_rate": 1.0}, r"--min_learning_rate must be a number >= 0 and <= 0.0001, got 1.0"),
    ({"min_learning_rate": 1e-5, "lr_scheduler": "linear"}, r"--min_learning_rate belongs to --lr_scheduler cosine"),
    ({"loss_weighting": "snr"}, r"--loss_weighting must be one of none, sigma_sqrt, cosmap, got 'snr'"),
    ({"loss_weighting": "cosmap", "regularization_weight": 0.1}, r"exclude each other"),
    ({"backend": "tritn"}, r"--backend must be one of auto, reference, triton, cuda, cpu, got 'tritn'"),
    ({"attention_backend": "x"}, r"--attention_backend must be one of auto, sdpa, "),
    ({"fp16": True, "bf16": True}, r"--fp16 and --bf16 exclude each other"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_flags_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes).check()


def test_all_bad_flags_are_reported_at_once():
    with pytest.raises(ValueError) as error:
        settings(batch_size=0, eval_split=2.0, device="x").check()
    assert len(str(error.value).splitlines()) == 3


def test_debug_makes_a_small_run():
    small = settings(debug=True)
    assert (small.subset_size, small.num_epochs, small.logging_steps) == (1000, 2, 10)
    assert (small.save_steps, small.eval_steps, small.no_wandb) == (100, 100, True)
    assert settings(debug=True, subset_size=50).subset_size == 50
    given = settings(debug=True, logging_steps=1, save_steps=5)
    assert (given.logging_steps, given.save_steps, given.eval_steps) == (1, 5, 100)
    assert small.preset == "small"
    assert settings(debug=True, num_layers=3).preset is None and settings(debug=True, preset="tiny").preset == "tiny"


def test_the_originals_normalisation_flag():
    assert settings(normalize_embeddings=True).normalize == "l2"


def test_warmup_is_at_most_a_tenth_of_the_run_unless_given():
    assert warmup_steps(settings(), 100_000) == 1000
    assert warmup_steps(settings(), 200) == 20
    assert warmup_steps(settings(warmup_steps=150), 200) == 150


def test_differences_that_change_the_run_are_found():
    earlier = settings().to_dict()
    assert settings(logging_steps=1, save_steps=5, max_steps=7, no_wandb=True).differences(earlier) == []
    lines = settings(learning_rate=1e-3, seed=1).differences(earlier)
    assert lines == ["--learning_rate: the run has 0.0001, now 0.001", "--seed: the run has 42, now 1"]
    assert settings(training_arguments={"log_level": "info"}).differences(earlier) == []
    (line,) = settings(training_arguments={"log_level": "info", "optim": "sgd"}).differences(earlier)
    assert line == "--training_arguments: the run has {}, now {'optim': 'sgd'}"
