"""Activation checkpointing, by the names of transformers (old and new) and diffusers."""

from collections.abc import Mapping
from typing import Any


class Checkpointing:
    """What a network of blocks has to offer so that a trainer can switch it on."""

    supports_gradient_checkpointing = True
    gradient_checkpointing: bool
    _checkpoint_kwargs: dict[str, Any]

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only each block's input in training mode and run the block again in the backward (non-reentrant).

        gradient_checkpointing_kwargs: passed to `torch.utils.checkpoint.checkpoint`.
        """
        kwargs = dict(gradient_checkpointing_kwargs or {})
        if kwargs.pop("use_reentrant", False):
            raise ValueError("use_reentrant must be False: only non-reentrant checkpointing is supported, got True")
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers must be 1: every block is checkpointed, got {every_n_layers}")
        if offload:
            raise ValueError("offload must be False: the kept activations stay on the device")
        self._checkpoint_kwargs = kwargs
        self.gradient_checkpointing = True

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The name that transformers 5 calls `gradient_checkpointing_enable` by."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False
        self._checkpoint_kwargs = {}

    activation_checkpointing_disable = gradient_checkpointing_disable
    enable_gradient_checkpointing = gradient_checkpointing_enable
    disable_gradient_checkpointing = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.gradient_checkpointing
