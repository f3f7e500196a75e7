"""A model made ready for inference: on a CPU, with its weights packed for the matrix kernels.

    prepared = prepare(model)
    velocity = prepared(x_t, timestep, context)                # as model(...) without gradients
    condition = prepared.condition(context)                    # what depends on the condition alone, once
    velocity = prepared(x_t, timestep, condition)

The model stays what it is. The packed copy costs memory of its own (`prepared.nbytes`) and follows the model: whatever
changes a weight (an optimizer step, a load, a cast) is noticed at the next call.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.models import BLIP3oDiT, inputs
from blip3o_fast.models import condition as conditions
from blip3o_fast.models.condition import PreparedCondition
from blip3o_fast.models.packed import PackedBlock, packable
from blip3o_fast.models.step_modulations import StepModulations, make_modulations
from blip3o_fast.models.workspace import Workspace
from blip3o_fast.ops import _cpu, debug_ops, use_attention, use_backend
from blip3o_fast.ops.packed_linear import STORAGE


class PreparedModel:
    """What `prepare` returns; called like the model itself.

    Calls from several threads wait for each other and give the serial results. Returned tensors are the caller's own.
    model: the model it was made of. storage: of the packed weights, None where nothing is packed.
    """

    def __init__(self, model: BLIP3oDiT, storage: str | None) -> None:
        self.model, self.storage = model, storage
        self._lock = threading.Lock()
        self._workspace = Workspace()
        self._packed: list[PackedBlock | None] = [None] * len(model.layers)
        if storage is not None:
            for i, block in enumerate(model.layers):
                if packable(block):
                    self._packed[i] = PackedBlock(block, storage, self._workspace)

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | PreparedCondition,
        encoder_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """`BLIP3oDiT.forward` without gradients; the same arguments, results and errors."""
        with self._lock, torch.no_grad():
            return self.model._predict(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_mask,
                packed=self._blocks(),
                **options,
            )

    def condition(self, encoder_hidden_states: Tensor, encoder_mask: Tensor | None = None) -> PreparedCondition:
        """Everything that depends on the condition alone, to be given as `encoder_hidden_states` in many calls."""
        inputs.check_tensors(encoder_hidden_states=encoder_hidden_states)
        batch = encoder_hidden_states.shape[0] if encoder_hidden_states.dim() else 0
        inputs.check_condition(self.model, batch, encoder_hidden_states, encoder_mask)
        with self._lock, torch.no_grad():
            return conditions.prepare(self.model, encoder_hidden_states, encoder_mask, self._blocks())

    prepare_condition = condition  # so that `sample` takes it in the model's place

    def prepare_modulations(self, condition: PreparedCondition, timesteps: Tensor) -> list[StepModulations] | None:
        """`BLIP3oDiT.prepare_modulations` by the packed blocks."""
        with self._lock, torch.no_grad():
            return make_modulations(self.model, condition, timesteps, self._blocks())

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The model's own: they say its dtype and device."""
        return self.model.parameters()

    def _blocks(self) -> list[PackedBlock | None] | None:
        """The blocks packed as they are now; None where another implementation is asked for."""
        if (
            use_backend.state.active not in ("auto", "cpu")
            or use_attention.state.active != "auto"
            or debug_ops.state.active
        ):
            return None
        return [packed if packed is not None and packed.renew() else None for packed in self._packed]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def normalizer(self) -> Any:
        return self.model.normalizer

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(packed.nbytes for packed in self._packed if packed is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and the workspace, beside the model's own."""
        return self.packed_bytes + self._workspace.nbytes


def prepare(model: BLIP3oDiT, *, storage: str = "auto") -> PreparedModel:
    """Make a model ready for many calls without gradients; on a CPU its weights are packed.

    model: a `BLIP3oDiT`; put it in eval mode yourself.
    storage: how the blocks' matrices are kept: "fp32"; "bf16" (half the memory); "int8" (a quarter; the modulation,
        the embedders and the head stay as they are; an approximation); or "auto": "bf16" for a bfloat16 model, else
        "fp32", so that nothing is lost.
    Elsewhere than on a CPU, or without the C++ extension, nothing is packed, and the result runs the model itself.
    Raises ValueError for another model or storage, RuntimeError for a storage by name that cannot be had.
    """
    if not isinstance(model, BLIP3oDiT):
        raise ValueError(f"model must be a BLIP3oDiT, got {type(model).__name__}")
    if storage not in ("auto", *STORAGE):
        raise ValueError(f"storage must be one of {', '.join(('auto', *STORAGE))}, got {storage!r}")
    weight = model.patch_embedder.proj.weight
    reason = (
        _cpu.refusal(weight) if weight.device.type == "cpu" else f"it needs a model on the CPU, got {weight.device}"
    )
    if reason is not None:
        if storage != "auto":
            raise RuntimeError(f"storage {storage!r} cannot be had: {reason}")
        return PreparedModel(model, None)
    if storage == "auto":
        storage = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    return PreparedModel(model, storage)
