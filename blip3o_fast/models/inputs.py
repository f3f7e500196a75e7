"""What `BLIP3oDiT.forward` refuses, each with a message that names the argument, what was given and what is allowed."""

from typing import Any

import torch
from torch import Tensor


def check_tensors(**arguments: Any) -> None:
    """Every argument is a tensor at all."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_time(model: Any, image: Tensor, timestep: Tensor) -> None:
    """image [B, C, H, W] in the weights' dtype; timestep [B] or 0-d."""
    batch = image.shape[0]
    if timestep.dim() > 1 or (timestep.dim() == 1 and timestep.shape[0] not in (1, batch)):
        raise ValueError(f"timestep must have shape (B,) = ({batch},) or (), got {tuple(timestep.shape)}")
    _check_dtype(model, "hidden_states", image)


def check_condition(model: Any, batch: int, encoder_hidden_states: Tensor, encoder_mask: Tensor | None) -> None:
    """encoder_hidden_states [B, L, E] in the weights' dtype; encoder_mask [B, L] or None."""
    check_tensors(encoder_hidden_states=encoder_hidden_states)
    shape, width = tuple(encoder_hidden_states.shape), model.config.cross_attention_dim
    if len(shape) != 3 or shape[0] != batch or shape[1] < 1 or shape[2] != width:
        raise ValueError(f"encoder_hidden_states must have shape (B, L, E) = ({batch}, L >= 1, {width}), got {shape}")
    if encoder_mask is not None:
        check_tensors(encoder_mask=encoder_mask)
        if tuple(encoder_mask.shape) != shape[:2]:
            raise ValueError(f"encoder_mask must have shape (B, L) = {shape[:2]}, got {tuple(encoder_mask.shape)}")
    _check_dtype(model, "encoder_hidden_states", encoder_hidden_states)


def _check_dtype(model: Any, name: str, given: Tensor) -> None:
    """Said here because what torch says of two dtypes in a product names neither the argument nor the remedy."""
    device = given.device.type  # meta tensors know no autocast and raise when asked
    if device != "meta" and torch.is_autocast_enabled(device):
        return
    dtype = model.patch_embedder.proj.weight.dtype
    if dtype.is_floating_point and dtype.itemsize > 1 and given.dtype != dtype:
        raise ValueError(
            f"{name} must have the weights' dtype {dtype}, got {given.dtype}: convert one of them, or run "
            "under torch.autocast"
        )


def check_modulations(batch: int, modulations: Any) -> None:
    """`StepModulations` of batch samples."""
    given = getattr(modulations, "y", None)
    if not isinstance(given, Tensor):
        raise ValueError(
            f"modulations must be an element of prepare_modulations' list, got {type(modulations).__name__}"
        )
    if given.shape[0] != batch:
        raise ValueError(f"modulations were made for {given.shape[0]} samples, hidden_states has {batch}")
