"""blip3o_fast: the BLIP3-o diffusion transformer over 64 tokens, fast and exact.

Importing this package imports nothing else: no torch, no transformers, no CUDA, no network. Every
name below is imported when it is first used (PEP 562), so `blip3o-fast --help` stays quick.

    from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BLIP3oConfig",
    "BLIP3oDiT",
    "__version__",
    "compare",
    "data",
    "debug_ops",
    "evaluation",
    "flow",
    "fuse",
    "models",
    "ops",
    "sample",
    "sampling",
    "training",
    "unfuse",
    "use_backend",
]

# The public names that are not submodules, and the module that has each.
_NAMES = {
    "BLIP3oConfig": "blip3o_fast.models.config",
    "BLIP3oDiT": "blip3o_fast.models.nextdit",
    "compare": "blip3o_fast.models.compare",
    "debug_ops": "blip3o_fast.ops",
    "fuse": "blip3o_fast.models.fuse",
    "sample": "blip3o_fast.sampling.sample",
    "unfuse": "blip3o_fast.models.fuse",
    "use_backend": "blip3o_fast.ops",
}

if TYPE_CHECKING:
    from . import data, evaluation, flow, models, ops, sampling, training
    from .models.compare import compare
    from .models.config import BLIP3oConfig
    from .models.fuse import fuse, unfuse
    from .models.nextdit import BLIP3oDiT
    from .ops import debug_ops, use_backend
    from .sampling.sample import sample


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    elif name in __all__:
        value = import_module(f"blip3o_fast.{name}")
    else:
        raise AttributeError(f"module 'blip3o_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
