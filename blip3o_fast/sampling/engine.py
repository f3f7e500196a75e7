"""A sampler made once and used for many conditions.

sampler = Sampler(model)
features = sampler(encoder_hidden_states, num_steps=30, guidance_scale=3.0)        # as sample(model, ...)
sampler.memory(batch=8)                                                            # bytes, before the run
"""

import threading
from typing import Any, Literal, overload

import torch
from torch import Tensor

from blip3o_fast.models import BLIP3oDiT
from blip3o_fast.models.adopt import as_ours
from blip3o_fast.sampling import memory
from blip3o_fast.sampling.arguments import Arguments, check_count
from blip3o_fast.sampling.prepared import PreparedModel, prepare
from blip3o_fast.sampling.run import MODULATION_BYTES, can_prepare, draw


class Sampler:
    """`sample` of one model, with its weights prepared once.

    model: what `sample` takes. A `BLIP3oDiT`, and a network of diffusers or BLIP3-o, is prepared here
        (`sampling.prepare`: on a CPU its weights are packed, which costs memory of its own); another model, and one
        prepared before, is used as it is.
    storage: of the packed weights, see `sampling.prepare`.
    modulation_bytes: for modulations that are made before their steps; where those of one step need more, each step
        makes its own, so 0 makes none before.

    It follows the model: whatever changes a weight is noticed at the next run. Calls from several threads wait for
    each other and give the serial results. Raises ValueError for wrong arguments, RuntimeError for a storage by name
    that cannot be had.
    """

    def __init__(self, model: Any, *, storage: str = "auto", modulation_bytes: int = MODULATION_BYTES) -> None:
        model = as_ours(model)
        if getattr(model, "config", None) is None:
            raise ValueError(f"model must have a config (BLIP3oDiT has one), got {type(model).__name__} without")
        if isinstance(modulation_bytes, bool) or not isinstance(modulation_bytes, int) or modulation_bytes < 0:
            raise ValueError(f"modulation_bytes must be an integer >= 0, got {modulation_bytes!r}")
        self.modulation_bytes = modulation_bytes
        self._lock = threading.Lock()
        self._network = model
        if isinstance(model, BLIP3oDiT) and can_prepare(model):
            self._network = prepare(model, storage=storage)
        elif storage != "auto":
            raise ValueError(
                f"storage must be 'auto' where a {type(model).__name__} is not prepared here, got {storage!r}"
            )

    @overload
    def __call__(
        self, encoder_hidden_states: Tensor, *, return_intermediates: Literal[False] = False, **arguments: Any
    ) -> Tensor: ...
    @overload
    def __call__(
        self, encoder_hidden_states: Tensor, *, return_intermediates: Literal[True], **arguments: Any
    ) -> tuple[Tensor, list[Tensor]]: ...
    def __call__(
        self, encoder_hidden_states: Tensor, *, return_intermediates: bool = False, **arguments: Any
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Draw features for each condition: arguments, result and errors are those of `sample`."""
        made = Arguments(return_intermediates=return_intermediates, **arguments)
        with self._lock:
            result, states = draw(self._network, encoder_hidden_states, made, self.modulation_bytes)
        return (result, states) if return_intermediates else result

    def memory(
        self,
        batch: int,
        *,
        num_steps: int = 30,
        guidance_scale: float = 3.0,
        solver: str = "euler",
        context_tokens: int | None = None,
    ) -> int:
        """Bytes that a run of so many result rows needs at its height beside the model's own weights.

        batch: N * n. guidance_scale and solver as in `sample`; context_tokens: L, None: as many as there are tokens.
        Counted are the packed weights with their workspace, the prepared condition, the modulations and the
        activations: within a tenth of what is allocated. Not counted: the arguments, the results of
        `return_intermediates`, the scratch memory of libraries.
        """
        check_count("batch", batch)
        check_count("num_steps", num_steps)
        if context_tokens is not None:
            check_count("context_tokens", context_tokens)
        Arguments(num_steps=num_steps, guidance_scale=guidance_scale, solver=solver).check()
        network, config = self._network, self._network.config
        packed = network.packed_bytes if isinstance(network, PreparedModel) else 0
        weights = next(iter(network.parameters()))
        run = memory.run_bytes(
            config,
            rows=batch if guidance_scale in (0, 1) else 2 * batch,
            batch=batch,
            calls=num_steps * (2 if solver in ("midpoint", "heun") else 1),
            context=config.num_tokens if context_tokens is None else context_tokens,
            dtype=weights.dtype if weights.dtype.is_floating_point else torch.float32,
            in_workspace=packed > 0,
            modulation_bytes=self.modulation_bytes,
        )
        return packed + run
