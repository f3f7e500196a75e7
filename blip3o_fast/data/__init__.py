"""Pictures -> features -> batches: reading pictures, extracting grid features, shards on disk, datasets.

Names are imported when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["EmbeddingDataset", "UnsafePickleError", "collate", "load_encoder", "safe_load"]

_MODULES = {
    "EmbeddingDataset": "dataset",
    "UnsafePickleError": "pickle_doors",
    "collate": "dataset",
    "load_encoder": "encoders",
    "safe_load": "safe_pickle",
}

if TYPE_CHECKING:
    from .dataset import EmbeddingDataset, collate
    from .encoders import load_encoder
    from .pickle_doors import UnsafePickleError
    from .safe_pickle import safe_load


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'blip3o_fast.data' has no attribute {name!r}")
    value = getattr(import_module(f"blip3o_fast.data.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
