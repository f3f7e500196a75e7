"""An optimizer's state by parameter name: a run begun elsewhere with torch's AdamW goes on here, and back.

torch numbers the parameters of a state in the order in which the optimizer got them, and the Trainer gives it the
matrices first. Names are what the two sides share: the networks here keep diffusers' parameter names and shapes.

    state = named_state(stock, adamw)                            # or read_named_state("optimizer.pt", stock)
    save_named_state(state, "optimizer.safetensors")
    blip3o-fast train --init_from STOCK_FOLDER --init_optimizer optimizer.safetensors ...

    state = read_named_state("run/checkpoint-1000", stock)       # and back, into a loop of your own
    load_named_state(stock, torch.optim.AdamW(stock.parameters()), state)
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blip3o_fast.files import replacing
from blip3o_fast.models.matching import UNUSED

NamedState = dict[str, dict[str, Tensor]]
"""Parameter name -> slot (``exp_avg``, ``exp_avg_sq``, ``step``) -> tensor."""

_FORMAT = "blip3o_fast.optimizer/1"


def named_state(model: nn.Module, optimizer: Optimizer) -> NamedState:
    """Copies of the optimizer's tensors, by the names of ``model``'s parameters.

    A parameter that was never stepped has no state, and is left out. ValueError for an optimizer of another model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: NamedState = {}
    for parameter, slots in optimizer.state.items():
        if id(parameter) not in names:
            raise ValueError(f"optimizer holds a parameter of shape {list(parameter.shape)} that is not the model's")
        state[names[id(parameter)]] = {
            slot: value.detach().clone() for slot, value in slots.items() if isinstance(value, Tensor)
        }
    return state


@torch.no_grad()
def load_named_state(model: nn.Module, optimizer: Optimizer, state: NamedState) -> None:
    """Give the optimizer this state. Learning rate, decay and groups stay the optimizer's own.

    optimizer: over parameters of ``model``, of the class that the state is of. Parameters without an entry begin
    anew. Raises ValueError naming a name that the model has not, or a shape that differs.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(state) - set(parameters)):
        raise ValueError(f"the optimizer state is of another model: it has {unknown[:3]}, which the model has not")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, slots in state.items():
        parameter = parameters[name]
        for slot, value in slots.items():
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer state is of another model: {slot} of {name} is {list(value.shape)}, "
                    f"the parameter {list(parameter.shape)}"
                )
        if id(parameter) not in trained:
            continue
        # As torch's own load_state_dict: a step count stays float32, and on a GPU only where a fused optimizer is.
        fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        optimizer.state[parameter] = {
            slot: value.to(
                parameter.device if fused or slot != "step" else "cpu", _dtype(slot, value, parameter)
            ).clone()
            for slot, value in slots.items()
        }


def _dtype(slot: str, value: Tensor, parameter: Tensor) -> torch.dtype:
    return parameter.dtype if value.is_floating_point() and slot != "step" else value.dtype


def save_named_state(state: NamedState, path: str | os.PathLike[str]) -> None:
    """One safetensors file, written beside and renamed; its tensors are called ``NAME/SLOT``."""
    from safetensors.torch import save_file

    tensors = {f"{name}/{slot}": value.contiguous() for name, slots in state.items() for slot, value in slots.items()}
    with replacing(Path(path)) as beside:
        save_file(tensors, beside, metadata={"format": _FORMAT})


def read_named_state(path: str | os.PathLike[str], model: nn.Module) -> NamedState:
    """The state in a file of `save_named_state`, in a checkpoint folder of ours, or in a saved ``state_dict()``.

    The last is read with ``weights_only=True``. Its parameters must be numbered in the order of
    ``model.named_parameters()``, or with all matrices first as the Trainer gives them, or carry names. Raises
    FileNotFoundError, or ValueError naming the file and what does not fit ``model``.
    """
    path = Path(path)
    file = path / "optimizer.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: an optimizer state, or a checkpoint folder with one, is needed")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        groups, slots = stored["param_groups"], stored["state"]
        numbers = [number for group in groups for number in group["params"]]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no state_dict() of a torch optimizer ({str(error).splitlines()[0]})") from error
    names = _names_in_order(groups, len(numbers), model)
    if len(names) != len(numbers):
        raise ValueError(f"{file} is of another model: it has {len(numbers)} parameters, the model {len(names)}")
    return {
        name: {slot: value for slot, value in slots[number].items() if isinstance(value, Tensor)}
        for name, number in zip(names, numbers, strict=True)
        if number in slots
    }


def _read_safetensors(file: Path) -> NamedState:
    from safetensors import safe_open

    state: NamedState = {}
    with safe_open(file, framework="pt") as opened:
        if (opened.metadata() or {}).get("format") != _FORMAT:
            raise ValueError(f"{file} was not written by save_named_state: it does not say format {_FORMAT!r}")
        for key in opened.keys():
            name, slot = key.rsplit("/", 1)
            state.setdefault(name, {})[slot] = opened.get_tensor(key)
    return state


def _names_in_order(groups: list[dict[str, Any]], count: int, model: nn.Module) -> list[str]:
    """The names of the parameters of all groups, one after the other."""
    if all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]]
    named = list(model.named_parameters())
    if len(named) != count:
        # Here the parameter that stock has and never reads is not trained.
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad and name != UNUSED]
    if len(groups) == 2:
        named.sort(key=lambda pair: pair[1].dim() < 2)  # stable: matrices, then the rest
    return [name for name, _ in named]
