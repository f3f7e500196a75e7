"""Configuration: names of three families, checked values, sizes as diffusers derives them."""

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch

from blip3o_fast.models.config import PRESETS, BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT


def test_defaults_are_blip3o_over_clip_features() -> None:
    config = BLIP3oConfig()
    assert (config.num_tokens, config.head_dim, config.ffn_dim, config.out_channels) == (64, 64, 4864, 768)
    assert (config.kv_heads, config.conditioning_dim, config.context_dim) == (28, 1024, 1792)
    assert config.context_projection and config.time_convention == "blip3o"
    assert BLIP3oConfig(context_projection=False).time_convention == "blip3o"


def test_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BLIP3oConfig().hidden_size = 64  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = BLIP3oConfig.preset(name)
    assert BLIP3oConfig.from_dict(config.to_dict()) == config
    assert BLIP3oConfig.from_dict(json.loads(config.to_json_string())) == config


def test_preset_takes_overrides_by_any_name() -> None:
    config = BLIP3oConfig.preset("tiny", n_layers=3, qk_norm=False)
    assert (config.num_layers, config.qk_norm, config.hidden_size) == (3, False, 64)
    with pytest.raises(ValueError, match="two of its names"):
        BLIP3oConfig.preset("tiny", n_layers=3, num_layers=3)
    with pytest.raises(ValueError, match="preset must be one of .* got 'smal'; did you mean 'small'"):
        BLIP3oConfig.preset("smal")


# Counted once from the models that the two projects build.
@pytest.mark.parametrize(
    "config, parameters",
    [
        (BLIP3oConfig(), 1_357_210_528),
        (BLIP3oConfig(context_projection=False), 1_307_125_920),
        (BLIP3oConfig(ffn_dim_multiplier=1.5), 1_654_481_824),
        (BLIP3oConfig.preset("blip3o-4b"), 1_362_257_824),
        (BLIP3oConfig.preset("blip3o-8b"), 1_365_010_336),
        (BLIP3oConfig(in_channels=1024, cross_attention_dim=4096), 1_363_174_560),
    ],
)
def test_builds_the_known_sizes(config: BLIP3oConfig, parameters: int) -> None:
    with torch.device("meta"):
        assert BLIP3oDiT(config).num_parameters() == parameters


@pytest.mark.parametrize("dim", [60, 64, 256, 1792, 2304])
@pytest.mark.parametrize("multiplier", [None, 0.7, 1.5])
@pytest.mark.parametrize("multiple_of", [1, 32, 256])
def test_ffn_width_is_that_of_diffusers(dim: int, multiplier: float | None, multiple_of: int) -> None:
    from diffusers.models.attention import LuminaFeedForward

    with torch.device("meta"):
        stock = LuminaFeedForward(dim, int(4 * 2 * dim / 3), multiple_of, multiplier)
    config = BLIP3oConfig(
        in_channels=4,
        hidden_size=dim,
        num_attention_heads=1,
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
    )
    assert config.ffn_dim == stock.linear_1.out_features


def test_reads_what_blip3o_writes() -> None:
    config = BLIP3oConfig.from_dict(
        {
            "model_type": "nextdit-crossattn",
            "input_size": 8,
            "dim": 1792,
            "n_layers": 24,
            "n_heads": 28,
            "n_kv_heads": 28,
            "latent_embedding_size": 2048,
            "_gradient_checkpointing": True,
            "transformers_version": "4.51.3",
        }
    )
    assert config == BLIP3oConfig.preset("blip3o-4b", num_kv_heads=28)
    # what equals that project's defaults is left out of its files
    assert BLIP3oConfig.from_dict({"model_type": "nextdit-crossattn"}) == BLIP3oConfig.preset("blip3o-8b")


def test_reads_the_training_scripts_names() -> None:
    config = BLIP3oConfig.from_dict(
        {"model_dim": 512, "num_heads": 8, "eva_embedding_size": 4096, "in_channels": 256, "schedule_type": "cosine"}
    )
    assert (config.hidden_size, config.num_attention_heads, config.cross_attention_dim) == (512, 8, 4096)
    assert config.schedule == "cosine"


def test_reads_what_diffusers_writes() -> None:
    from diffusers import LuminaNextDiT2DModel

    with torch.device("meta"):
        stock = LuminaNextDiT2DModel(num_layers=1, num_kv_heads=8)
    config = BLIP3oConfig.from_dict(dict(stock.config) | {"_class_name": "LuminaNextDiT2DModel"})
    assert not config.context_projection and config.time_convention == "lumina"
    for name, value in stock.config.items():
        if not name.startswith("_"):
            assert getattr(config, name) == value, name
    assert BLIP3oConfig.from_dict({"_class_name": "LuminaNextDiT2DModel"}).learn_sigma, "stock's default, not ours"
    assert BLIP3oConfig.from_dict(config.to_stock_dict()) == config


@pytest.mark.parametrize(
    "changes",
    [{"time_convention": "blip3o"}, {"prediction_type": "epsilon", "sigma_min": 1e-4}, {"condition_dropout": 0.0}, {}],
)
def test_a_stock_file_keeps_what_stock_does_not_know(changes: dict[str, Any]) -> None:
    config = BLIP3oConfig.preset("tiny", context_projection=False, **changes)
    assert BLIP3oConfig.from_dict(config.to_stock_dict()) == dataclasses.replace(config, num_kv_heads=2)


def test_diffusers_reads_no_dropout_and_warns_of_none(caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.utils import logging

    config = BLIP3oConfig.preset(
        "tiny", context_projection=False, time_convention="lumina", num_layers=1, condition_dropout=0.0
    )
    logging.enable_propagation()
    try:
        with torch.device("meta"):
            stock = LuminaNextDiT2DModel.from_config(config.to_stock_dict())
            assert not caplog.records
            LuminaNextDiT2DModel.from_config(config.to_stock_dict() | {"unheard_of": 1})
        assert "unheard_of" in caplog.text, "a field that it does not know is told of"
    finally:
        logging.disable_propagation()
    assert BLIP3oConfig.from_dict(dict(stock.config)).condition_dropout == 0.0, "it hands the field on"
    unknown = BLIP3oConfig.preset("tiny", context_projection=False)
    assert unknown.condition_dropout is None and not any("dropout" in name for name in unknown.to_stock_dict())


def test_no_stock_file_of_a_network_that_stock_does_not_have() -> None:
    with pytest.raises(ValueError, match="context_projection must be False"):
        BLIP3oConfig().to_stock_dict()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hiden_size": 64}, "unknown config field 'hiden_size'; did you mean 'hidden_size'"),
        ({"n_layer": 64}, "unknown config field 'n_layer'; did you mean 'n_layers'"),
        ({"qqq": 1}, "unknown config field 'qqq'; the known names are sample_size, "),
        ({"dim": 64, "hidden_size": 128}, "'dim' and 'hidden_size' are the same config field .* got 64 and 128"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_layers": 2.0}, "num_layers must be a positive integer, got 2.0"),
        ({"num_layers": True}, "num_layers must be a positive integer, got True"),
        ({"num_kv_heads": "2"}, "num_kv_heads must be a positive integer, got '2'"),
        ({"num_kv_heads": 3}, "num_attention_heads must be a multiple of num_kv_heads, got 28 and 3"),
        ({"num_attention_heads": 27}, "hidden_size must be a multiple of num_attention_heads, got 1792 and 27"),
        ({"hidden_size": 60, "num_attention_heads": 10}, "must be a multiple of 4 .* got 60 / 10 = 6"),
        ({"patch_size": 3}, "sample_size must be a multiple of patch_size, got 8 and 3"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number, got nan"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier must be above 0"),
        ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
        ({"time_convention": "seed"}, "time_convention must be one of 'blip3o', 'lumina', got 'seed'"),
        ({"prediction_type": "x0"}, "prediction_type must be one of 'v_prediction', 'epsilon', got 'x0'"),
        ({"schedule": "sqrt"}, "schedule must be one of 'linear', 'cosine', got 'sqrt'"),
        ({"sigma_min": 1.0}, "0 <= sigma_min < sigma_max <= 1, got 1.0 and 1.0"),
        ({"sigma_min": -0.1}, "0 <= sigma_min < sigma_max <= 1"),
        ({"condition_dropout": 1.1}, "condition_dropout must be None or a number between 0 and 1, got 1.1"),
        ({"condition_dropout": float("nan")}, "condition_dropout must be None or a number between 0 and 1, got nan"),
        ({"condition_dropout": True}, "condition_dropout must be None or a number between 0 and 1, got True"),
    ],
)
def test_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLIP3oConfig.from_dict(values)


def test_warns_of_a_network_narrower_than_its_tokens() -> None:
    with pytest.warns(UserWarning, match=r"hidden_size 256 is narrower .* 768 channels.*pca:K"):
        BLIP3oConfig(hidden_size=256, num_attention_heads=4)
