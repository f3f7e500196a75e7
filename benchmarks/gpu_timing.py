"""Times of a GPU without its host: calls captured once into CUDA graphs, replayed in turns, their inputs out of the L2.

A replay launches all kernels of a call at once, so neither Python nor the dispatcher is in the time. Before each
replay a buffer larger than the L2 is written, which also keeps the device busy until the replay is queued. Nothing is
subtracted: `overhead` is what a replay of next to nothing takes.

Without a GPU (`device="cpu"`, a dry run) a replay is the plain call and the clock is the host's.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.work import Inputs, Values, gradients_of, named_outputs
from blip3o_fast.timing import Timing

MODES = ("forward", "backward", "both", "inference")
# The harness' modes as a graph holds them. It times its forward without autograd; a `whole` call may wait for the host.
HARNESS_MODES = {"forward": "inference", "backward": "backward", "both": "both"}
_WARMUP = 3
_FLUSH = 256 << 20  # bytes written before a replay, at least: longer than the host takes to queue it
_streams: dict[int, Any] = {}


@dataclass(frozen=True)
class Replay:
    """run: does the captured calls again. result: where their values are, written anew by each run."""

    run: Callable[[], Any]
    result: Values
    kept: Any = None  # what the graph reads: it must outlive the graph


def capture_stream() -> Any:
    """The one stream of all captures. A backward runs where its forward ran, and a gradient is accumulated where its
    leaf was first used: with a second stream, a capture would reach out of itself."""
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream()
    return _streams[device]


def capture(prepare: Callable[[], Callable[[], Values]], device: str = "cuda", calls: int = 1) -> Replay:
    """Capture `calls` calls, one after the other, of the function that `prepare` makes on the capture's stream.

    The warm-up before it compiles kernels and `torch.compile`d functions, which a capture must not.
    """
    if device != "cuda":
        function = prepare()
        result: Values = {}

        def run() -> None:
            for _ in range(calls):
                result.update(function())

        run()
        return Replay(run, result)
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        for _ in range(_WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                captured = function()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails does not give the stream back itself
    torch.cuda.synchronize()
    return Replay(graph.replay, captured, (graph, function))


def renewed(inputs: Inputs) -> Inputs:
    """The same tensors as leaves that no graph has seen yet; leaves that are no arguments (weights) stay."""
    fresh = {id(t): t.detach().requires_grad_() for t in inputs.wrt.values()}
    arguments = {id(a) for a in inputs.args}
    args = tuple(fresh.get(id(a), a) for a in inputs.args)
    wrt = {name: fresh[id(t)] if id(t) in arguments else t for name, t in inputs.wrt.items()}
    return Inputs(args, wrt, inputs.upstream)


def prepared(provider: Callable[..., Any], inputs: Inputs, mode: str) -> Callable[[], Callable[[], Values]]:
    """What `capture` takes, for one mode of a provider.

    forward: as autograd records it, with all that it saves; inference: under no_grad; backward: of a forward that has
    run before; both: forward and backward.
    """

    def gradients(result: Any, given: Inputs, keep: bool) -> Values:
        grads = gradients_of(result, given, retain_graph=keep)
        return {f"d{name}": grad for name, grad in zip(given.wrt, grads, strict=True)}

    def prepare() -> Callable[[], Values]:
        given = renewed(inputs)
        if mode == "inference":

            def inference() -> Values:
                with torch.no_grad():
                    return named_outputs(provider(*given.args))

            return inference
        if mode == "forward":
            return lambda: named_outputs(provider(*given.args))
        if mode == "backward":
            result = provider(*given.args)
            return lambda: gradients(result, given, keep=True)
        assert mode == "both", mode

        def both() -> Values:
            result = provider(*given.args)
            return {**named_outputs(result), **gradients(result, given, keep=False)}

        return both

    return prepare


def written(replay: Replay, inputs: Inputs) -> Values:
    """Run once over results that are NaN before, and copy what was written: the values of what is timed.

    Left alone are results that are a given tensor itself: the gradient of a residual is its upstream gradient.
    """
    upstream = (inputs.upstream,) if isinstance(inputs.upstream, Tensor) else inputs.upstream
    tensors = [*(a for a in inputs.args if isinstance(a, Tensor)), *inputs.wrt.values(), *upstream]
    given = {t.untyped_storage().data_ptr() for t in tensors}
    for tensor in replay.result.values():
        if tensor.untyped_storage().data_ptr() not in given:
            tensor.fill_(torch.nan)
    replay.run()
    return {name: tensor.clone() for name, tensor in replay.result.items()}


class Clock:
    """Times replays on one device: cold L2, in turns."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.flush: Callable[[], Any] = lambda: None
        if device == "cuda":
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            self.l2_bytes = int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
            self.buffer = torch.empty(max(_FLUSH, 5 * self.l2_bytes // 2), dtype=torch.int8, device=device)
            self.flush = self.buffer.zero_

    def in_turns(
        self, replays: Mapping[str, Replay], rounds: int, cold: bool = True, seconds: float = 1.0
    ) -> dict[str, Timing]:
        """Seconds per replay, a sample of each in turn, round after round; the first round is thrown away.

        Fewer rounds, at least 5, where they would take longer than `seconds`.
        """
        samples: dict[str, list[float]] = {name: [] for name in replays}
        start, done = time.monotonic(), 0
        names = list(replays)
        while done <= rounds and (done <= 5 or time.monotonic() - start < seconds):
            turn = done % len(names)
            spans = [(name, self._sample(replays[name], cold)) for name in (*names[turn:], *names[:turn])]
            if self.device == "cuda":
                torch.cuda.synchronize()
            for name, span in spans:
                samples[name].append(span())
            done += 1
        return {name: Timing(tuple(values[1:])) for name, values in samples.items()}

    def _sample(self, replay: Replay, cold: bool) -> Callable[[], float]:
        """Queue one timed replay; the result reads its time once the device is through."""
        if self.device != "cuda":
            start = time.perf_counter()
            replay.run()
            span = time.perf_counter() - start
            return lambda: span
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.flush()
        before.record()
        replay.run()
        after.record()
        return lambda: before.elapsed_time(after) * 1e-3

    def overhead(self) -> float:
        """Seconds that a replay of one launch over one element takes: the events, the graph, the launch."""
        cell = torch.zeros(1, device=self.device)

        def touch() -> Values:
            return {"cell": cell.add_(1)}

        return self.in_turns({"nothing": capture(lambda: touch, self.device)}, rounds=20)["nothing"].median

    def copy_gbps(self) -> float:
        """Bytes read plus bytes written per second of a copy of 1 GiB (16 MiB in a dry run), in GB/s; the median."""
        source = torch.empty((1 << 30) if self.device == "cuda" else (16 << 20), dtype=torch.int8, device=self.device)
        source.fill_(1)
        target = torch.empty_like(source)

        def copy() -> Values:
            return {"copy": target.copy_(source)}

        replay = capture(lambda: copy, self.device)
        for _ in range(200 if self.device == "cuda" else 1):  # until an idle device has its clocks up
            replay.run()
        timing = self.in_turns({"copy": replay}, rounds=20)["copy"]
        return 2 * source.numel() / statistics.median(timing.samples) * 1e-9


def device_seconds(
    providers: Mapping[str, Callable[..., Any]], mode: str, inputs: Inputs, clock: Clock, rounds: int = 30
) -> dict[str, float | None]:
    """Median seconds of each provider on the device alone, in a mode of the harness; None where no graph holds it."""
    replays, graphed = {}, HARNESS_MODES.get(mode)
    for name, provider in providers.items() if graphed is not None else ():
        try:
            replays[name] = capture(prepared(provider, inputs, graphed), clock.device)
        except Exception:  # one that waits for the device cannot be captured; its time on the host's clock is there
            continue
    timings = clock.in_turns(replays, rounds) if replays else {}
    return {name: timings[name].median if name in timings else None for name in providers}
