"""What every block of a network gives out, without a hook on any module of it.

A hook on a block would send it through its stock forward (`models/stock.py`), so the fused path would not be what is
seen. Called modules are seen by PyTorch's hooks for all modules of the process, which no module has of its own; what
the fused and the eager path run as a function is seen by standing in front of that function for the time of the call.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from blip3o_fast.models import eager
from blip3o_fast.models import forward as fused

_PARTS = ("patch_embedder.proj", "time_caption_embed", "norm_out")
# Functions that run a part of the network given as their first argument, and the part: the block itself, or a name.
_FUNCTIONS = (
    (fused, "block_forward", ""),
    (eager, "eager_block", ""),
    (fused, "embed_condition", "time_caption_embed"),
    (fused, "head", "norm_out"),
)


def named_parts(model: nn.Module) -> dict[int, str]:
    """By id: the blocks, embedders and head of every network in model (a module with `layers` and `norm_out`)."""
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        layers = module._modules.get("layers")
        if not isinstance(layers, nn.ModuleList) or "norm_out" not in module._modules:
            continue
        here = f"{prefix}." if prefix else ""
        for part in _PARTS:
            try:
                found[id(module.get_submodule(part))] = here + part
            except AttributeError:
                continue
        found |= {id(layer): f"{here}layers.{i}" for i, layer in enumerate(layers)}
    return found


@contextmanager
def seen_parts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, what each part of model gave out last, by its name."""
    names = named_parts(model)
    seen: dict[str, Tensor] = {}

    def keep(module: Any, result: Any) -> None:
        first = result[0] if isinstance(result, tuple) else result
        if id(module) in names and isinstance(first, Tensor):
            seen[names[id(module)]] = first.detach()

    def in_front_of(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(owner: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(owner, *args, **kwargs)
            keep(owner._modules[part] if part else owner, result)
            return result

        return run

    with ExitStack() as stack:
        for file, name, part in _FUNCTIONS:
            stack.enter_context(patch.object(file, name, in_front_of(getattr(file, name), part)))
        hook = register_module_forward_hook(lambda module, args, result: keep(module, result))
        stack.callback(hook.remove)
        yield seen


def in_order(model: nn.Module, *sides: dict[str, Tensor]) -> list[str]:
    """The parts that all sides have seen, in the order of a forward."""
    names = [name for name in named_parts(model).values() if all(name in side for side in sides)]
    ahead = [name for name in names if not name.endswith("norm_out")]
    return ahead + [name for name in names if name.endswith("norm_out")]
