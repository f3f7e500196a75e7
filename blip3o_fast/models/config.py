"""BLIP3oConfig: every size and switch of the network, and what its input and output mean.

The field names are those of diffusers' `LuminaNextDiT2DModel`. `from_dict` also reads the names of BLIP3-o
(`NextDiTCrossAttnConfig`: dim, n_layers, n_heads, latent_embedding_size, ...) and those of its training scripts
(model_dim, num_heads, eva_embedding_size, ...).
"""

import difflib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Names of the same thing elsewhere. The key is what is read, the value our field.
ALIASES = {
    # BLIP3-o
    "input_size": "sample_size",
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_kv_heads",
    "latent_embedding_size": "cross_attention_dim",
    # the training scripts around it
    "model_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "eva_embedding_size": "cross_attention_dim",
    "clip_embedding_size": "in_channels",
    "schedule_type": "schedule",
    # In a stock file, where diffusers reads no name with an underscore and warns of none.
    "_condition_dropout": "condition_dropout",
}

# What config files carry about the program that wrote them; nothing here changes the network.
_BOOKKEEPING = {
    "_class_name",
    "_diffusers_version",
    "_gradient_checkpointing",
    "_name_or_path",
    "_use_default_values",
    "architectures",
    "auto_map",
    "dtype",
    "gradient_checkpointing",
    "model_type",
    "torch_dtype",
    "transformers_version",
}

STOCK_CLASS = "LuminaNextDiT2DModel"

# transformers and diffusers leave a field out of config.json where it has the class's default, so a file of another
# program is completed with that program's defaults, never with ours.
_STOCK_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 2304,
    "num_layers": 32,
    "num_attention_heads": 32,
    "learn_sigma": True,
    "cross_attention_dim": 2048,
    "context_projection": False,
    "time_convention": "lumina",
}
_BLIP3O_DEFAULTS: dict[str, Any] = {"in_channels": 1792, "cross_attention_dim": 3584}
_SCRIPT_DEFAULTS: dict[str, Any] = {"in_channels": 1024, "cross_attention_dim": 4096}
_DEFAULTS_OF_MODEL_TYPE = {"nextdit-crossattn": _BLIP3O_DEFAULTS, "blip3o-dit": _SCRIPT_DEFAULTS}

_CHOICES = {
    "time_convention": ("blip3o", "lumina"),
    "prediction_type": ("v_prediction", "epsilon"),
    "schedule": ("linear", "cosine"),
}

PRESETS: dict[str, dict[str, Any]] = {
    # For tests: every part of the network, almost no work.
    "tiny": {
        "in_channels": 16,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "multiple_of": 32,
        "cross_attention_dim": 24,
    },
    # Trains on a CPU in minutes. 64 channels (`pca:64`): a token carries noise in every channel through every block,
    # so the network must be wider than its tokens.
    "small": {"in_channels": 64, "hidden_size": 256, "num_layers": 4, "num_attention_heads": 4},
    # EVA-CLIP [64, 1280] -> CLIP [64, 768].
    "base": {},
    # The released models: EVA02-CLIP-E features from the hidden states of Qwen2.5-VL 3B and 7B.
    "blip3o-4b": {"in_channels": 1792, "cross_attention_dim": 2048},
    "blip3o-8b": {"in_channels": 1792, "cross_attention_dim": 3584},
}


@dataclass(frozen=True)
class BLIP3oConfig:
    """The network's sizes and the convention of its input and output. Immutable; every value is checked.

    sample_size: height and width of the default grid in pixels (tokens, as patch_size is 1): 8 means 64 tokens.
    patch_size: pixels per side of a token.
    in_channels: C, channels of the data (CLIP features: 768).
    hidden_size: D, width of the network.
    num_layers, num_attention_heads, num_kv_heads: depth, H and K; None means K = H. D / H must be a multiple of 4.
    multiple_of, ffn_dim_multiplier: see `ffn_dim`.
    norm_eps: of the RMSNorms (the q and k LayerNorms have 1e-5, the head's 1e-6, as stock).
    learn_sigma: twice as many output channels.
    qk_norm: LayerNorm of queries and keys over all heads together.
    cross_attention_dim: E, width of the context as it is given, before any projection.
    scaling_factor: kept for stock's files; the network does not use it.
    context_projection: True is BLIP3-o's network: a two-layer MLP maps the context from E to D first.
        False is stock diffusers: blocks and pooling read the context as given.
    time_convention: "blip3o": the network is given 1000 * sigma and predicts noise - data;
        "lumina": it is given 1 - sigma and predicts data - noise. Read by loss and sampler, not by the network.
    prediction_type, schedule, sigma_min, sigma_max: the flow-matching path that the network was trained on.
    condition_dropout: the share of samples that training gave no condition, or None where that is not known (a stock
        checkpoint). The sampler warns of guidance where it is 0; nothing else reads it.

    Raises ValueError naming the field, the value and what is allowed.
    """

    sample_size: int = 8
    patch_size: int = 1
    in_channels: int = 768
    hidden_size: int = 1792
    num_layers: int = 24
    num_attention_heads: int = 28
    num_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    learn_sigma: bool = False
    qk_norm: bool = True
    cross_attention_dim: int = 1280
    scaling_factor: float = 1.0
    context_projection: bool = True
    time_convention: str = "blip3o"
    prediction_type: str = "v_prediction"
    schedule: str = "linear"
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    condition_dropout: float | None = None

    def __post_init__(self) -> None:
        for name in (
            "sample_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "multiple_of",
            "cross_attention_dim",
        ):
            self._check_count(name)
        if self.num_kv_heads is not None:
            self._check_count("num_kv_heads")
        for name in ("learn_sigma", "qk_norm", "context_projection"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        self._check_numbers()
        self._check_shapes()
        if self.in_channels * self.patch_size**2 > self.hidden_size:
            warnings.warn(
                f"hidden_size {self.hidden_size} is narrower than a token of {self.in_channels * self.patch_size**2} "
                "channels: the velocity contains the token's noise, which cannot pass through, so the loss has a high "
                "floor. Give the data fewer channels (normalize='pca:K') or the network more width.",
                stacklevel=3,
            )

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def _check_numbers(self) -> None:
        for name in ("ffn_dim_multiplier", "norm_eps", "scaling_factor", "sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is None and name == "ffn_dim_multiplier":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if value <= 0 and name != "sigma_min":
                raise ValueError(f"{name} must be above 0, got {value!r}")
        share = self.condition_dropout
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1):
            raise ValueError(f"condition_dropout must be None or a number between 0 and 1, got {share!r}")
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max <= 1, "
                f"got {self.sigma_min!r} and {self.sigma_max!r}"
            )

    def _check_shapes(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                f"and {self.num_attention_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(
                "hidden_size / num_attention_heads must be a multiple of 4 (the rotary embedding turns pairs of "
                f"channels by row and by column), got {self.hidden_size} / {self.num_attention_heads} = {self.head_dim}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_kv_heads, got {self.num_attention_heads} "
                f"and {self.kv_heads}"
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size must be a multiple of patch_size, got {self.sample_size} and {self.patch_size}"
            )

    # ---- derived sizes ---------------------------------------------------------------------------------------------

    @property
    def kv_heads(self) -> int:
        """K: num_kv_heads, or num_attention_heads where it is None."""
        return self.num_attention_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_dim(self) -> int:
        """F: 8/3 * hidden_size, times ffn_dim_multiplier, rounded up to a multiple of multiple_of.

        1792 gives 4864. Some BLIP3-o builds have 7168 by accident of a library version: ffn_dim_multiplier=1.5.
        """
        inner = int(8 * self.hidden_size / 3)
        if self.ffn_dim_multiplier is not None:
            inner = int(self.ffn_dim_multiplier * inner)
        return self.multiple_of * math.ceil(inner / self.multiple_of)

    @property
    def conditioning_dim(self) -> int:
        """A: width of the time and pooled-context embedding."""
        return min(self.hidden_size, 1024)

    @property
    def context_dim(self) -> int:
        """E': width of the context that the blocks read."""
        return self.hidden_size if self.context_projection else self.cross_attention_dim

    @property
    def num_tokens(self) -> int:
        """T of the default grid."""
        return (self.sample_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    # ---- reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BLIP3oConfig":
        """Read a dict of any of the three families of names (diffusers, BLIP3-o, its training scripts).

        A dict that a diffusers `LuminaNextDiT2DModel` wrote (`_class_name`) gives stock's network and its time
        convention. Raises ValueError for an unknown field (with the nearest known name) and for one field given twice
        with different values.
        """
        known = [field.name for field in fields(cls)]
        result: dict[str, Any] = {}
        source: dict[str, str] = {}
        for name, value in values.items():
            if name in _BOOKKEEPING:
                continue
            field = ALIASES.get(name, name)
            if field not in known:
                raise ValueError(f"unknown config field {name!r}{_nearest(name, [*known, *ALIASES])}")
            if field in result and result[field] != value:
                raise ValueError(
                    f"{source[field]!r} and {name!r} are the same config field {field!r}, "
                    f"got {result[field]!r} and {value!r}"
                )
            result[field], source[field] = value, name
        defaults = _DEFAULTS_OF_MODEL_TYPE.get(values.get("model_type", ""), {})
        if values.get("_class_name") == STOCK_CLASS:
            defaults = _STOCK_DEFAULTS
        return cls(**{**defaults, **result})

    def to_dict(self) -> dict[str, Any]:
        """Every field by our names, ready for JSON; `from_dict` reads it back."""
        return asdict(self)

    def to_json_string(self) -> str:
        """`to_dict` as JSON: what transformers' logging callbacks ask a model's config for."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_stock_dict(self) -> dict[str, Any]:
        """config.json of a diffusers `LuminaNextDiT2DModel` (context_projection=False only).

        A field that stock does not have is added only where it differs from what reading the file back assumes, since
        diffusers warns about each.
        """
        if self.context_projection:
            raise ValueError(
                "context_projection must be False for a diffusers config: stock diffusers has no such projection"
            )
        values = self.to_dict()
        ours = {
            "context_projection": False,
            "time_convention": "lumina",
            "prediction_type": "v_prediction",
            "schedule": "linear",
            "sigma_min": 0.0,
            "sigma_max": 1.0,
        }
        for name, assumed in ours.items():
            if values[name] == assumed:
                del values[name]
        share = values.pop("condition_dropout")
        if share is not None:
            values["_condition_dropout"] = share
        # Stock cannot be built with None where qk_norm is on.
        return {"_class_name": STOCK_CLASS, **values, "num_kv_heads": self.kv_heads}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BLIP3oConfig":
        """One of "tiny", "small", "base", "blip3o-4b", "blip3o-8b", with fields replaced (any family of names)."""
        if name not in PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}{_nearest(name, [*PRESETS])}"
            )
        renamed = {ALIASES.get(key, key): value for key, value in overrides.items()}
        if len(renamed) != len(overrides):
            raise ValueError(f"one config field is given by two of its names: {', '.join(overrides)}")
        return cls.from_dict({**PRESETS[name], **renamed})


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; the known names are {', '.join(known)}"
