"""Pictures and tokens: what goes into the network and what comes out, in the caller's form.

The caller's form is tokens [B, N, C] (row by row over the default grid) or an image [B, C, H, W] of any grid. The
flattened patch is ordered (C, row, column) on the way in and (row, column, C) on the way out, as in stock.
"""

from torch import Tensor

from blip3o_fast.models.config import BLIP3oConfig


def to_image(hidden_states: Tensor, config: BLIP3oConfig) -> tuple[Tensor, bool]:
    """hidden_states as [B, C, H, W], and whether it was given as tokens. ValueError where the shape does not fit."""
    shape = tuple(hidden_states.shape)
    side, patch, channels = config.sample_size, config.patch_size, config.in_channels
    if len(shape) == 3:
        if shape[1] != side * side or shape[2] != channels:
            raise ValueError(
                f"hidden_states must have shape (B, N, C) = (B, {side * side}, {channels}), or (B, C, H, W) for "
                f"another grid, got {shape}"
            )
        return hidden_states.transpose(1, 2).unflatten(2, (side, side)), True
    if len(shape) != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch or 0 in shape[2:]:
        raise ValueError(
            f"hidden_states must have shape (B, N, C) = (B, {side * side}, {channels}) or (B, C, H, W) with C = "
            f"{channels} and H, W multiples of patch_size {patch}, got {shape}"
        )
    return hidden_states, False


def to_patches(image: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] to [B, T, C * patch^2]."""
    if patch == 1:
        return image.flatten(2).transpose(1, 2)
    batch, channels, height, width = image.shape
    split = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_tokens(tokens: Tensor, config: BLIP3oConfig, rows: int, columns: int, *, as_tokens: bool) -> Tensor:
    """[B, T, patch^2 * out_channels] to [B, N, out_channels] or [B, out_channels, H, W]."""
    patch = config.patch_size
    if as_tokens and patch == 1:
        return tokens
    split = tokens.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, config.out_channels))
    image = split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image.flatten(2).transpose(1, 2) if as_tokens else image
