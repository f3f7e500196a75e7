"""The threads that turn pictures into features.

Decoding and, on a CPU, the networks run in as many threads as there are cores: Pillow and torch both release
the interpreter while they work, and small layers gain more from another picture than from another thread
inside the layer. On a GPU the threads decode while one of them at a time feeds the device.
"""

from __future__ import annotations

import os
import sys
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
from .images import DamagedPictureError, Picture, Skipped, Source, decode

# Measured on 2 cores with the two efficientnets: 4 pictures' activations stay in the cache, 16 take 1.6 times as long.
_CPU_BATCH, _GPU_BATCH = 4, 64


@dataclass
class Extracted:
    """The pictures of one source, in its order; features batch by batch."""

    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    conditions: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)

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
        batch_size, workers, quiet: as for `extract`; None chooses.
    """

    def __init__(
        self,
        condition: Encoder,
        target: Encoder,
        dtype: torch.dtype = torch.float32,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        quiet: bool | None = None,
    ) -> None:
        on_cpu = condition.device.type == "cpu"
        self.condition, self.target, self.dtype = condition, target, dtype
        self.batch = batch_size or (_CPU_BATCH if on_cpu else _GPU_BATCH)
        self.workers = workers or available_cores()
        self.quiet = not sys.stderr.isatty() if quiet is None else quiet
        self._turn: Any = nullcontext() if on_cpu else threading.Lock()
        self._threads_before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # after Ctrl-C what waits is dropped; what runs is a few pictures
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        torch.set_num_threads(self._threads_before)

    def run(self, source: Source, *, limit: int | None = None, title: str = "") -> Extracted:
        """The features of (at most ``limit``) pictures of one source; damaged pictures are in ``.skipped``."""
        from tqdm import tqdm

        done = Extracted()
        waiting: deque[Future[_Batch]] = deque()
        total = min(len(source.files), limit or len(source.files)) or None
        with tqdm(total=total, desc=f"{source.name} ({title})", unit=" pictures", disable=self.quiet) as bar:

            def collect() -> None:
                batch = waiting.popleft().result()
                for key, reason in batch.damaged:
                    done.skipped.add(f"{source.name}:{key}", reason)
                if batch.pictures:
                    done.keys += [picture.key for picture in batch.pictures]
                    done.captions += [picture.caption for picture in batch.pictures]
                    done.conditions.append(batch.condition)
                    done.targets.append(batch.target)
                bar.update(len(batch.pictures))

            for pictures in _batches(_limited(source.pictures(done.skipped), limit), self.batch):
                waiting.append(self._pool.submit(self._features, pictures))
                if len(waiting) > 2 * self.workers:  # bounds the pictures held in memory
                    collect()
            while waiting:
                collect()
        return done

    def _features(self, pictures: list[Picture]) -> _Batch:
        good: list[Picture] = []
        inputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        damaged: list[tuple[str, str]] = []
        for picture in pictures:
            try:
                image = decode(picture.data)
            except DamagedPictureError as error:
                damaged.append((picture.key, str(error)))
                continue
            good.append(picture)
            inputs[0].append(self.condition.preprocess(image))
            same = self.target.preprocess == self.condition.preprocess
            inputs[1].append(inputs[0][-1] if same else self.target.preprocess(image))
        if not good:
            return _Batch([], torch.empty(0), torch.empty(0), damaged)
        with self._turn:
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


def _limited(pictures: Iterator[Picture], limit: int | None) -> Iterator[Picture]:
    for count, picture in enumerate(pictures):
        if count == limit:
            return
        yield picture
