"""The threads that turn pictures into features.

Decoding and, on a CPU, the networks run in as many threads as there are cores: Pillow and torch both release
the interpreter while they work, and small layers gain more from another picture than from another thread
inside the layer. On a GPU the threads decode while one of them at a time feeds the device.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .encoders import Encoder
from .images import DamagedPictureError, Picture, decode
from .throughput import Progress

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")  # in Pillow's messages; they would differ from run to run
# Measured on 2 cores with the two efficientnets: 4 pictures' activations stay in the cache, 16 take 1.6 times as long.
_CPU_BATCH, _GPU_BATCH = 4, 64


@dataclass
class Extracted:
    """Some pictures of one source, in its order; features batch by batch; skipped: key and reason."""

    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    conditions: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def features(self) -> tuple[Tensor, Tensor]:
        """``condition [n, 64, E]`` and ``target [n, 64, C]``; the batches are given up, one side at a time."""
        condition = torch.cat(self.conditions)
        self.conditions.clear()
        target = torch.cat(self.targets)
        self.targets.clear()
        return condition, target


@dataclass
class _Batch:
    pictures: list[Picture]
    condition: Tensor
    target: Tensor
    damaged: list[tuple[str, str]]


class Pipeline:
    """Two encoders on one device and the threads around them; a context manager.

    Args:
        dtype: of the features kept.
        precision: of the networks' matrix products: float32, or bfloat16 or float16 by torch.autocast.
        compile_encoders: run the networks through torch.compile, which takes minutes at the start.
        batch_size, workers: as for `extract`; None chooses.
    """

    def __init__(
        self,
        condition: Encoder,
        target: Encoder,
        dtype: torch.dtype = torch.float32,
        *,
        precision: torch.dtype = torch.float32,
        compile_encoders: bool = False,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        on_cpu = condition.device.type == "cpu"
        self.condition, self.target, self.dtype = condition, target, dtype
        self.batch = batch_size or (_CPU_BATCH if on_cpu else _GPU_BATCH)
        self.workers = workers or available_cores()
        self._precision = precision
        self._turn: Any = nullcontext() if on_cpu else threading.Lock()
        self._threads_before = torch.get_num_threads()
        if compile_encoders:
            self._compile()
        self._pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # after Ctrl-C what waits is dropped; what runs is a few pictures
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        torch.set_num_threads(self._threads_before)

    def run(self, pictures: Iterable[Picture], progress: Progress | None = None) -> Extracted:
        """The features of some pictures; damaged ones are in ``.skipped``, by key."""
        done = Extracted()
        waiting: deque[Future[_Batch]] = deque()

        def collect() -> None:
            batch = waiting.popleft().result()
            for key, reason in batch.damaged:
                done.skipped.append((key, reason))
            if batch.pictures:
                done.keys += [picture.key for picture in batch.pictures]
                done.captions += [picture.caption for picture in batch.pictures]
                done.conditions.append(batch.condition)
                done.targets.append(batch.target)
            if progress is not None:
                progress.update(batch.pictures, len(batch.pictures) + len(batch.damaged))

        for some in _batches(pictures, self.batch):
            waiting.append(self._pool.submit(self._features, some))
            if len(waiting) > 2 * self.workers:  # bounds the pictures held in memory
                collect()
        while waiting:
            collect()
        return done

    def _autocast(self) -> Any:
        """A context of its own for each thread, which is where autocast counts."""
        return torch.autocast(self.condition.device.type, self._precision, enabled=self._precision != torch.float32)

    def _compile(self) -> None:
        """Compile both networks, in this thread: one batch through each, before the others wait for it."""
        for encoder in (self.condition, self.target):
            encoder.compile()
            size = encoder.preprocess.size
            with self._autocast():
                encoder.encode(torch.zeros(self.batch, 3, size, size))

    def _features(self, pictures: list[Picture]) -> _Batch:
        good: list[Picture] = []
        inputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        damaged: list[tuple[str, str]] = []
        for picture in pictures:
            try:
                image = decode(picture.data)
            except DamagedPictureError as error:
                damaged.append((picture.key, _ADDRESS.sub("", str(error))))
                continue
            good.append(picture)
            inputs[0].append(self.condition.preprocess(image))
            same = self.target.preprocess == self.condition.preprocess
            inputs[1].append(inputs[0][-1] if same else self.target.preprocess(image))
        if not good:
            return _Batch([], torch.empty(0), torch.empty(0), damaged)
        with self._turn, self._autocast():
            sides = [
                encoder.encode(torch.stack(pixels)).to("cpu", self.dtype)
                for encoder, pixels in zip((self.condition, self.target), inputs, strict=True)
            ]
        finite = [bool(all(torch.isfinite(side[i]).all() for side in sides)) for i in range(len(good))]
        damaged += [(p.key, "its features are not finite") for p, ok in zip(good, finite, strict=True) if not ok]
        kept = torch.tensor(finite)
        # indexing also turns inference tensors into ordinary ones
        return _Batch([p for p, ok in zip(good, finite, strict=True) if ok], sides[0][kept], sides[1][kept], damaged)


def available_cores() -> int:
    """The cores of this process, not of the machine: a container or a batch job may have fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    some: list[Picture] = []
    for picture in pictures:
        some.append(picture)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
