"""Sampling to a file and judging it, on a small network; each number against its definition."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.evaluation import evaluate, metrics, samples
from blip3o_fast.evaluation.evaluate import EvaluateSettings, evaluate_checkpoint
from blip3o_fast.evaluation.samples import sample_to_file
from blip3o_fast.evaluation.settings import SampleSettings
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.normalizer import FeatureNormalizers
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling.sample import sample

E, C, TOKENS, PICTURES = 10, 6, 16, 60
FAST = {"num_steps": 2, "eval_split": 0.2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """embeddings/ (60 pictures, targets a noisy linear map of the conditions) and model/ (untrained)."""
    folder = tmp_path_factory.mktemp("evaluate")
    generator = torch.Generator().manual_seed(0)
    condition = 2 + torch.randn(PICTURES, 1, E, generator=generator)
    condition = condition + 0.3 * torch.randn(PICTURES, TOKENS, E, generator=generator)
    target = condition @ torch.randn(E, C, generator=generator)
    target += 0.1 * torch.randn(target.shape, generator=generator)
    meta = Meta(EncoderInfo("c", E), EncoderInfo("t", C), tokens=TOKENS)
    names = [str(i) for i in range(PICTURES)]
    ShardWriter(folder / "embeddings", meta).write(0, condition, target, names, names, "made up")
    config = BLIP3oConfig.preset("tiny", in_channels=4, cross_attention_dim=E, sample_size=4, hidden_size=16)
    model = BLIP3oDiT(config, generator=torch.Generator().manual_seed(1)).eval()
    model.normalizer = FeatureNormalizers.fit(condition, target, "pca:4")
    model.save_pretrained(folder / "model")
    return folder


def settings_of(kind, folder, **changes):
    return kind(folder / "model", folder / "embeddings", **FAST | changes)


@pytest.fixture(scope="module")
def result(folder):
    output = folder / "evaluation.json"
    numbers = evaluate_checkpoint(settings_of(EvaluateSettings, folder, output=output))
    assert json.loads(output.read_text()) == numbers
    return numbers


def test_every_metric_of_every_system_is_a_finite_number(result):
    for name in evaluate.METRICS:
        for suffix in evaluate.SYSTEMS:
            if (name, suffix) == ("frechet_distance", "_shuffled_condition"):
                continue
            assert math.isfinite(result[name + suffix]), name + suffix
    assert result["recall_at_1_chance"] == 1 / 12 and result["recall_at_5_chance"] == 5 / 12
    assert result["pictures"] == 12


def test_baselines_stand_where_they_must(result):
    # The targets are linear in the conditions; a constant knows nothing about the picture.
    assert result["recall_at_1_ridge"] >= 0.9 and result["token_cosine_ridge"] >= 0.95
    assert result["recall_at_1_mean_embedding"] <= 0.2 and abs(result["centred_cosine_mean_embedding"]) <= 0.5
    assert result["token_cosine_mean_embedding"] < result["token_cosine_ridge"]
    assert result["l2_distance_ridge"] < result["l2_distance_mean_embedding"]
    assert result["frechet_distance_ridge"] < result["frechet_distance_mean_embedding"]


def test_real_pictures_are_compared_as_many_as_held_out(folder, result):
    train, held_out = EmbeddingDataset.splits(folder / "embeddings", eval_split=0.2)
    expected = metrics.frechet_distance(train.targets[::4][:12], held_out.targets)
    assert result["frechet_distance_real"] == pytest.approx(expected)


def test_judging_the_truth_is_perfect_and_its_shuffle_is_not():
    target, train = torch.randn(9, TOKENS, C), torch.randn(30, TOKENS, C)
    numbers = evaluate.judge({"": target}, target, train)
    assert numbers["recall_at_1"] == numbers["recall_at_5"] == 1.0
    assert numbers["token_cosine"] == pytest.approx(1) and numbers["centred_cosine"] == pytest.approx(1)
    assert numbers["l2_distance"] == 0 and numbers["frechet_distance"] <= 1e-9
    assert numbers["recall_at_1_shuffled_condition"] == 0.0
    assert abs(numbers["token_cosine_shuffled_condition"]) <= 0.2


def test_a_samples_file_is_what_the_sampler_gives(folder, tmp_path):
    path = sample_to_file(settings_of(SampleSettings, folder, output=tmp_path / "deep" / "s.safetensors", seed=5))
    stored = load_file(path)
    held_out = EmbeddingDataset(folder / "embeddings", split="eval", eval_split=0.2)
    assert torch.equal(stored["target"], held_out.targets) and torch.equal(stored["index"], held_out.indices)
    assert torch.equal(stored["condition"], held_out.conditions)
    assert stored["generated"].shape == (12, TOKENS, C) and stored["generated"].dtype == torch.float32
    noise = normal_noise_at(5, held_out.indices, (TOKENS, 4))
    model = BLIP3oDiT.from_pretrained(folder / "model")
    expected = sample(model, held_out.conditions, num_steps=2, guidance_scale=2.0, noise=noise)
    assert (stored["generated"] - expected).abs().max() <= 1e-5
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["guidance_scale"] == "2.0" and file.metadata()["split"] == "eval"
    assert [p.name for p in path.parent.iterdir()] == ["s.safetensors"]


def test_noise_belongs_to_the_picture(folder, tmp_path):
    whole = load_file(sample_to_file(settings_of(SampleSettings, folder, output=tmp_path / "a")))
    some = settings_of(SampleSettings, folder, output=tmp_path / "b", batch_size=2, num_samples=5)
    part = load_file(sample_to_file(some))
    assert len(part["generated"]) == 5
    assert (part["generated"] - whole["generated"][:5]).abs().max() <= 1e-5


def test_given_samples_are_judged_as_if_sampled_now(folder, result, tmp_path, capsys):
    path = sample_to_file(settings_of(SampleSettings, folder, output=tmp_path / "s"))
    again = evaluate_checkpoint(settings_of(EvaluateSettings, folder, samples=path))
    assert again == pytest.approx(result)
    # Without the unconditional samples the model is not even loaded.
    absent = settings_of(EvaluateSettings, folder, samples=path, unconditional=False)
    absent.model = tmp_path / "nowhere"
    numbers = evaluate_checkpoint(absent)
    assert "token_cosine_unconditional" not in numbers
    assert numbers["token_cosine"] == pytest.approx(result["token_cosine"])
    assert "12 held-out pictures, guidance 2" in capsys.readouterr().out
    absent.num_samples = 5
    assert evaluate_checkpoint(absent)["pictures"] == 5
    absent.num_samples = 13
    with pytest.raises(ValueError, match=r"--num_samples 13: --samples .* holds 12 pictures"):
        evaluate_checkpoint(absent)


def test_a_checkpoint_is_sampled_with_its_averaged_weights(folder, tmp_path):
    from blip3o_fast.training import ema

    assert samples.AVERAGED_WEIGHTS == ema.FILE_NAME
    model = samples.load_model(folder / "model", torch.device("cpu"))
    model.save_pretrained(tmp_path / "checkpoint-3")
    average = ema.EMA(model, 0.9)
    for value in average.average.values():
        value.mul_(0.5)
    average.save(tmp_path / "checkpoint-3")
    loaded = samples.load_model(tmp_path / "checkpoint-3", torch.device("cpu"))
    assert torch.equal(loaded.patch_embedder.proj.weight, 0.5 * model.patch_embedder.proj.weight)
    assert not loaded.training and loaded.normalizer.target.spec == "pca:4"
    with pytest.raises(ValueError, match=r"no config\.json in it; the run is not finished.*checkpoint-3"):
        samples.load_model(tmp_path, torch.device("cpu"))


def test_the_table_names_every_system_and_chance(result):
    text = evaluate.table(result)
    for word in (*evaluate.SYSTEMS.values(), *evaluate.METRICS, "chance", "lower is better", "real pictures"):
        assert word in text


BAD = [
    ({"num_steps": 0}, "--num_steps must be a whole number >= 1, got 0"),
    ({"num_samples": 0}, "--num_samples must be"),
    ({"guidance_scale": float("nan")}, "--guidance_scale must be a number"),
    ({"split": "test"}, "--split must be one of all, train, eval"),
    ({"seed": -1}, "--seed must be"),
    ({"solver": "rk4"}, "solver must be one of"),
    ({"device": "tpu"}, "--device must be one of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_flags_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        sample_to_file(settings_of(SampleSettings, folder, **changes))


def test_bad_files_are_named(folder, tmp_path):
    evaluation = settings_of(EvaluateSettings, folder)
    with pytest.raises(ValueError, match="--split must be eval, got 'all'"):
        evaluate_checkpoint(settings_of(EvaluateSettings, folder, split="all"))
    with pytest.raises(ValueError, match="leaves fewer than 2"):
        evaluate_checkpoint(settings_of(EvaluateSettings, folder, eval_split=0.01))
    with pytest.raises(ValueError, match="is a folder"):
        sample_to_file(settings_of(SampleSettings, folder, output=tmp_path))
    evaluation.samples = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=r"--samples .*missing: no such file"):
        evaluate_checkpoint(evaluation)
    evaluation.samples = tmp_path / "torn"
    evaluation.samples.write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        evaluate_checkpoint(evaluation)
    save_file({"generated": torch.zeros(2, 16, 6)}, tmp_path / "few")
    evaluation.samples = tmp_path / "few"
    with pytest.raises(ValueError, match="has no condition, index, target"):
        evaluate_checkpoint(evaluation)
    evaluation.samples = sample_to_file(settings_of(SampleSettings, folder, output=tmp_path / "s", eval_split=0.5))
    with pytest.raises(ValueError, match="its targets are not those of the eval split.*eval_split 0.5"):
        evaluate_checkpoint(evaluation)


def test_conditions_of_another_width_are_refused(folder, tmp_path):
    meta = Meta(EncoderInfo("c", 3), EncoderInfo("t", C), tokens=TOKENS)
    names = [str(i) for i in range(4)]
    ShardWriter(tmp_path / "e", meta).write(0, torch.zeros(4, TOKENS, 3), torch.zeros(4, TOKENS, C), names, names, "")
    other = SampleSettings(folder / "model", tmp_path / "e", split="all", device="cpu", num_steps=1)
    with pytest.raises(ValueError, match="conditions have 3 channels, the model was trained on 10"):
        sample_to_file(other)


def test_frechet_of_a_fit_equals_that_of_its_samples():
    first, second = torch.randn(8, TOKENS, C), torch.randn(8, TOKENS, C) + 1
    fitted = metrics.frechet_distance(first, metrics.Gaussian.fit(second))
    assert fitted == metrics.frechet_distance(first, second)
