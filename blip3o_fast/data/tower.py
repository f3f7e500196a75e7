"""What every family of encoders gives: a network under a name, described before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .preprocessing import Preprocessing
from .shards import EncoderInfo

GRID = 8
POOLING = "patch tokens averaged to 8x8"
# Which of a network's features are taken. `projected`: each patch token through the model's own final norm and its
# projection into the space that pictures and texts share; `hidden`: the last layer's output as it is.
TOWERS = ("projected", "hidden")

Grid = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Tower:
    """One network: what meta.json says of it, its input, and how it is loaded.

    ``load()`` gives the network and a function ``(network, pixels [N, 3, size, size]) -> [N, dim, h, w]``.
    """

    info: EncoderInfo
    preprocess: Preprocessing
    load: Callable[[], tuple[nn.Module, Grid]]


def choose(name: str, tower: str, widths: Mapping[str, int]) -> tuple[str, int]:
    """The tower asked for (``""``: the first there is) and its width; ValueError where the network has no such one."""
    there = {key: width for key, width in widths.items() if width}
    if tower and tower not in there:
        raise ValueError(f"tower: got {tower!r}; {name} has {' and '.join(map(repr, there))}")
    chosen = tower or next(iter(there))
    return chosen, there[chosen]


def square(tokens: Tensor) -> Tensor:
    """``[N, h*h, C]`` in row-major order -> ``[N, C, h, h]``."""
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"tokens: {tokens.shape[1]} patch tokens are not a square grid")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def import_package(module: str, package: str = "") -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(module, package or module) from error


def missing_package(module: str, package: str) -> ModuleNotFoundError:
    error = ModuleNotFoundError(
        f"this encoder needs the package {package}; pip install {package.split()[0]}", name=module
    )
    error.add_note(f"pip install {package}")
    return error


def from_hub(name: str, source: str, load: Callable[[], Any]) -> Any:
    """``load()``; what kept it from reading ``source`` becomes an ``OSError`` that says so."""
    try:
        return load()
    except Exception as error:  # the hub's client, its HTTP library and transformers each raise their own
        if isinstance(error, (ModuleNotFoundError, MemoryError, FilesError)):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"encoder {name}: {source} is neither a folder nor in the cache, and the hub did not give it "
            f"({reason[:300]}); efficientnet-lite0 and efficientnet-lite2 need no hub"
        ) from error


class FilesError(ValueError):
    """Files that were had, but are not the network that was asked for."""
