"""The network: its configuration, its module tree, the fast forward, the eager forward, and checkpoints.

Names are imported when first used: `models.normalizer` is also read by code that needs no network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["BLIP3oConfig", "BLIP3oDiT", "FeatureNormalizers", "Normalizer", "eager_block", "eager_forward", "export"]

_MODULES = {
    "BLIP3oConfig": "config",
    "BLIP3oDiT": "nextdit",
    "FeatureNormalizers": "normalizer",
    "Normalizer": "normalizer",
    "eager_block": "eager",
    "eager_forward": "eager",
    "export": "exporting",
}

if TYPE_CHECKING:
    from .config import BLIP3oConfig
    from .eager import eager_block, eager_forward
    from .exporting import export
    from .nextdit import BLIP3oDiT
    from .normalizer import FeatureNormalizers, Normalizer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'blip3o_fast.models' has no attribute {name!r}")
    value = getattr(import_module(f"blip3o_fast.models.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
