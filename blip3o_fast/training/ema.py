"""Exponential moving average of the weights, in float32.

A bf16 average with decay 0.9999 never moves: the increment is below half a unit in the last place. So the average is
float32 whatever the model is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from blip3o_fast.files import replacing

FILE_NAME = "ema.safetensors"


class EMA:
    """``average += (1 - d_t) * (weight - average)``, with ``d_t = min(decay, (1 + t) / (10 + t))`` at update t.

    The rising decay (as in TensorFlow's ExponentialMovingAverage) lets a short run have an average that has forgotten
    its random start. Parameters that do not require a gradient are averaged too: the file is a whole model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay must be in (0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.average = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the model's present weights."""
        self.updates += 1
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [parameter.detach().float() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged weights; outside, its own again, bit for bit.

        Values are copied in and out, because parameters may be views of packed buffers whose storage must stay.
        """
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        try:
            self._copy(self.average, model)
            yield
        finally:
            self._copy(own, model)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights for good."""
        self._copy(self.average, model)

    @staticmethod
    @torch.no_grad()
    def _copy(values: dict[str, Tensor], model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``ema.safetensors`` (beside, then renamed)."""
        from safetensors.torch import save_file

        tensors = {name: value.contiguous() for name, value in self.average.items()}
        metadata = {"format": "pt", "decay": repr(self.decay), "updates": str(self.updates)}
        with replacing(Path(folder) / FILE_NAME) as beside:
            save_file(tensors, beside, metadata=metadata)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote, into this average; ValueError where names or shapes differ."""
        from safetensors import safe_open

        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{path} is missing, but --ema_decay is {self.decay}; continue with --ema_decay 0")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if names != set(self.average):
                odd = sorted(names ^ set(self.average))[:5]
                raise ValueError(f"{path} is of another model: {odd} are in only one of the two")
            for name, value in self.average.items():
                stored = file.get_tensor(name)
                if stored.shape != value.shape:
                    raise ValueError(f"{path}: {name} is {list(stored.shape)}, the model has {list(value.shape)}")
                value.copy_(stored)
        self.updates = int(metadata.get("updates", 0))
