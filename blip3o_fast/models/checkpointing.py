"""Activation checkpointing, by the names of transformers (old and new) and diffusers.

Two modes. "block" keeps each block's input and runs the whole block again in the backward: the least memory, a forward
pass more. "selective" also keeps what the matrix products and the attention returned, which is nearly all of a block's
time, and makes only the cheap ops between them (norms, gates, rotations, SwiGLU) again.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

MODES = ("block", "selective")

# The ops whose results "selective" keeps: the products and attentions of the fused path and of the stock sequence.
_aten = torch.ops.aten
_KEPT_NAMES = {"blip3o_fast::merged_linear_fwd", "blip3o_fast::dual_attention_fwd", "blip3o_fast::flash_attention_fwd"}
_KEPT_ATEN = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an op's result is kept; called for every op that a block dispatches."""
    kept = op in _KEPT_ATEN or (op.namespace == "blip3o_fast" and op.name() in _KEPT_NAMES)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointing:
    """What a network of blocks has to offer so that a trainer can switch it on."""

    supports_gradient_checkpointing = True
    gradient_checkpointing: bool
    checkpointing_mode: str
    _checkpoint_kwargs: dict[str, Any]

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep less of each block in training mode and make the rest again in the backward (non-reentrant).

        gradient_checkpointing_kwargs: its "mode" is one of MODES ("block" where it has none); the others are passed to
            `torch.utils.checkpoint.checkpoint`.
        """
        kwargs = dict(gradient_checkpointing_kwargs or {})
        mode = kwargs.pop("mode", "block")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if kwargs.pop("use_reentrant", False):
            raise ValueError("use_reentrant must be False: only non-reentrant checkpointing is supported, got True")
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers must be 1: every block is checkpointed, got {every_n_layers}")
        if offload:
            raise ValueError("offload must be False: the kept activations stay on the device")
        if mode == "selective":
            kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        self._checkpoint_kwargs = kwargs
        self.checkpointing_mode = mode
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
        self.checkpointing_mode = "block"
        self._checkpoint_kwargs = {}

    activation_checkpointing_disable = gradient_checkpointing_disable
    enable_gradient_checkpointing = gradient_checkpointing_enable
    disable_gradient_checkpointing = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.gradient_checkpointing
