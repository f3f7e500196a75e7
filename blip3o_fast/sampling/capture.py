"""A CUDA graph of a function that only reads and writes tensors which stay where they are.

`sampling.graphs` decides what is captured and when; this is the mechanism, and tests give it another one.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

WARM_UPS = 3  # as torch.cuda.make_graphed_callables makes them


class Capture(Protocol):
    """How a step becomes something that can be replayed."""

    def refusal(self, device: torch.device) -> str | None:
        """Why steps on this device cannot be captured; None where they can."""

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Call step to warm up and to record it. Returns the replay; any error means that it could not be recorded."""


class CudaCapture:
    """`torch.cuda.CUDAGraph`. The graphs of one device that are alive share one pool of memory.

    They may: each is replayed by itself, and what it returns is copied to tensors outside of the pool before another
    one is.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._pools: dict[torch.device, Any] = {}
        self._alive: dict[torch.device, weakref.WeakSet[_Replay]] = {}

    def refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"CUDA graphs need a model on a CUDA device, got {device}"

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream, current = self._streams[device], torch.cuda.current_stream(device)
            alive = self._alive.setdefault(device, weakref.WeakSet())
            if not alive:  # a pool does not outlive its last graph
                self._pools[device] = torch.cuda.graph_pool_handle()

            # On a side stream, as torch's notes on CUDA graphs demand: what is made at the first call (compiled
            # kernels, cuBLAS's workspace, the rotary table) is not part of the graph.
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step()
            current.wait_stream(stream)

            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what other threads do on the device meanwhile does not end the capture.
                with torch.cuda.graph(
                    graph, pool=self._pools[device], stream=stream, capture_error_mode="thread_local"
                ):
                    step()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails does not give the stream back itself
            replay = _Replay(graph)
            alive.add(replay)
            return replay


class _Replay:
    """A graph that a weak set can hold."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def __call__(self) -> None:
        self.graph.replay()
