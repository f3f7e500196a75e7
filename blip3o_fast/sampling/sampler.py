"""A sampler made once and used for many conditions.

sampler = Sampler(model)
sampler.warmup(batch_sizes=(1, 8))                                                 # so that no request waits for it
features = sampler(encoder_hidden_states, num_steps=30, guidance_scale=3.0)        # as sample(model, ...)
sampler.memory(batch=8)                                                            # bytes, before the run
"""

import threading
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from blip3o_fast.models import BLIP3oDiT
from blip3o_fast.models.adopt import as_ours, is_current
from blip3o_fast.sampling import memory
from blip3o_fast.sampling.arguments import Arguments, check_count
from blip3o_fast.sampling.graphs import Graphs
from blip3o_fast.sampling.prepared import PreparedModel, prepare
from blip3o_fast.sampling.run import MODULATION_BYTES, can_prepare, device_and_dtype, draw


class Sampler:
    """`sample` of one model, with its weights prepared once.

    model: what `sample` takes. A `BLIP3oDiT`, and a network of diffusers or BLIP3-o, is prepared here
        (`sampling.prepare`: on a CPU its weights are packed, which costs memory of its own); another model, and one
        prepared before, is used as it is.
    storage: of the packed weights, see `sampling.prepare`.
    modulation_bytes: for modulations that are made before their steps; where those of one step need more, each step
        makes its own, so 0 makes none before.
    max_graphs: on a CUDA device a solver's step is captured as a CUDA graph, for at most so many shapes, of which the
        least recently used is dropped; 0 makes no graphs. `sampler.graphs.reason` says why a run had none.

    It follows the model: whatever changes a weight, or puts another layer in the place of one, is noticed at the next
    run. Calls from several threads wait for each other and give the serial results. Raises ValueError for wrong
    arguments, RuntimeError for a storage by name that cannot be had.
    """

    def __init__(
        self, model: Any, *, max_graphs: int = 8, storage: str = "auto", modulation_bytes: int = MODULATION_BYTES
    ) -> None:
        ours = as_ours(model)
        if getattr(ours, "config", None) is None:
            raise ValueError(f"model must have a config (BLIP3oDiT has one), got {type(model).__name__} without")
        for name, value in (("max_graphs", max_graphs), ("modulation_bytes", modulation_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        self.modulation_bytes = modulation_bytes
        self._lock = threading.Lock()
        self._storage = storage
        self._stock = None if ours is model else model  # whose layers ours has
        self._ours = ours
        self._network = self._prepared(ours)
        self.graphs = Graphs(self._network, max_graphs)

    def _prepared(self, model: Any) -> Any:
        if isinstance(model, BLIP3oDiT) and can_prepare(model):
            return prepare(model, storage=self._storage)
        if self._storage != "auto":
            raise ValueError(
                f"storage must be 'auto' where a {type(model).__name__} is not prepared here, got {self._storage!r}"
            )
        return model

    def _follow(self) -> None:
        """A stock network may have other layers or parameters than when its layers were taken."""
        if self._stock is not None and not is_current(self._ours, self._stock):
            self._ours = as_ours(self._stock)
            self._network = self._prepared(self._ours)
            self.graphs = Graphs(self._network, self.graphs.max_graphs, self.graphs.capture)

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
            self._follow()
            result, states = draw(self._network, encoder_hidden_states, made, self.modulation_bytes, self.graphs)
        return (result, states) if return_intermediates else result

    def warmup(
        self,
        batch_sizes: Sequence[int] = (1,),
        *,
        num_steps: int = 30,
        guidance_scale: float = 3.0,
        solver: str = "euler",
        context_tokens: int | None = None,
    ) -> None:
        """Do now what the first run of a shape does: compile kernels, capture graphs; on a CPU pack and allocate.

        batch_sizes: of result rows, N * n, each drawn once from nothing. guidance_scale: 1 and 0 are shapes of their
        own, all other scales are one. context_tokens: L, None: as many as there are tokens. What it does not know of
        (a mask, a guidance interval) is captured when it first comes. No random numbers are drawn.
        """
        if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Sequence) or not batch_sizes:
            raise ValueError(f"batch_sizes must be a sequence of integers >= 1, got {batch_sizes!r}")
        for batch in batch_sizes:
            check_count("batch_sizes", batch)
        tokens = self._check_run(num_steps, guidance_scale, solver, context_tokens)
        model, config = self._network, self._network.config
        normalizer = getattr(model, "normalizer", None)
        width = config.cross_attention_dim if normalizer is None else normalizer.condition.in_features
        device, dtype = device_and_dtype(model, torch.empty(0))
        # Two steps have every kind of step. A whole run makes the product of all steps' modulations too, and costs
        # little where there are graphs.
        steps = num_steps if device.type == "cuda" else min(num_steps, 2)
        for batch in sorted(set(batch_sizes), reverse=True):  # smaller ones fit into the memory of larger ones
            self(
                torch.zeros(batch, tokens, width, device=device, dtype=dtype),
                noise=torch.zeros(batch, config.sample_size**2, config.in_channels, device=device),
                num_steps=steps,
                guidance_scale=guidance_scale,
                solver=solver,
            )

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
        Counted are the packed weights with their workspace, the prepared condition, the modulations, the activations
        and, where the run has a CUDA graph, its static tensors: within a tenth of what is allocated. Not counted: the
        arguments, the results of `return_intermediates`, the scratch memory of libraries, what the graphs of other
        shapes keep (`sampler.graphs.nbytes`).
        """
        check_count("batch", batch)
        context = self._check_run(num_steps, guidance_scale, solver, context_tokens)
        network, config = self._network, self._network.config
        packed = network.packed_bytes if isinstance(network, PreparedModel) else 0
        device, dtype = device_and_dtype(network, torch.empty(0))
        rows = batch if guidance_scale in (0, 1) else 2 * batch
        run = memory.run_bytes(
            config,
            rows=rows,
            batch=batch,
            calls=num_steps * (2 if solver in ("midpoint", "heun") else 1),
            context=context,
            dtype=dtype,
            in_workspace=packed > 0,
            modulation_bytes=self.modulation_bytes,
        )
        if self.graphs.refusal(device, rows) is None:
            run += memory.graph_bytes(
                config,
                rows=rows,
                batch=batch,
                context=context,
                dtype=dtype,
                solver=solver,
                modulation_bytes=self.modulation_bytes,
            )
        return packed + run

    def _check_run(self, num_steps: int, guidance_scale: float, solver: str, context_tokens: int | None) -> int:
        """L, where all of it is allowed."""
        check_count("num_steps", num_steps)
        if context_tokens is not None:
            check_count("context_tokens", context_tokens)
        Arguments(num_steps=num_steps, guidance_scale=guidance_scale, solver=solver).check()
        return self._network.config.num_tokens if context_tokens is None else context_tokens
