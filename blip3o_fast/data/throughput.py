"""How fast an extraction runs: the bar, TFLOP/s and MFU, and the question before a CPU is kept busy for hours."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from .encoders import Encoder
from .images import Picture, Source

LONG_HOURS = 2.0  # on a CPU, longer runs are asked about
_SETTLED_SECONDS = 10.0  # so long the speed is measured before
_HEADERS = 1536  # bytes that a tar spends on a picture beside its data: two headers and padding


def flops_per_picture(encoders: tuple[Encoder, ...]) -> int:
    """Of one picture through every encoder, as torch's FlopCounterMode counts them (2 for a multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        for encoder in encoders:
            encoder.encode(torch.zeros(1, 3, encoder.preprocess.size, encoder.preprocess.size))
    return int(counter.get_total_flops())


class Progress:
    """Counts pictures, shows the bar, and stops a long run on a CPU unless it is wanted.

    flops: of one picture. peak: FLOP/s, see `models.device_flops`. yes: ask nothing.
    """

    def __init__(
        self,
        sources: list[Source],
        limit: int | None,
        *,
        quiet: bool,
        on_cpu: bool,
        yes: bool,
        flops: int = 0,
        peak: float | None = None,
    ) -> None:
        from tqdm import tqdm

        self._sources, self._limit, self._flops, self._peak = sources, limit, flops, peak
        self._ask = on_cpu and not yes
        self._done = self._passed = self._bytes = 0
        self._start = time.perf_counter()
        self._bar: Any = tqdm(total=self.total(), unit=" images", disable=quiet, smoothing=0.05)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def total(self) -> int | None:
        """Pictures in all sources; of tars estimated by the bytes of those read so far, None before the first."""
        count = 0
        for source in self._sources:
            if source.count is not None:
                some = source.count
            elif self._done:
                some = round(source.path.stat().st_size / (self._bytes / self._done))
            else:
                return None
            count += some if self._limit is None else min(some, self._limit)
        return max(count, self._done + self._passed)

    def title(self, text: str) -> None:
        self._bar.set_description(text)

    def passed(self) -> None:
        """A picture whose features are there already."""
        self._passed += 1
        if not self._bar.disable:
            self._bar.initial += 1  # not counted in the speed
            self._bar.update(1)

    def update(self, pictures: list[Picture], tried: int) -> None:
        """``tried`` pictures are through, of which these are good."""
        self._done += tried
        bytes_each = sum(len(p.data) + len(p.caption) for p in pictures) / max(1, len(pictures)) + _HEADERS
        self._bytes += round(bytes_each * tried)
        seconds = time.perf_counter() - self._start
        self._bar.total = self.total()
        if self._flops:
            rate = self._flops * self._done / seconds
            mfu = f", MFU {rate / self._peak:.1%}" if self._peak else ""
            self._bar.set_postfix_str(f"{rate / 1e12:.3g} TFLOP/s{mfu}", refresh=False)
        self._bar.update(tried)
        if self._ask and seconds >= _SETTLED_SECONDS:
            self._ask = False
            left = (self._bar.total or 0) - self._done - self._passed
            self._check(left * seconds / self._done / 3600)

    def _check(self, hours: float) -> None:
        if hours <= LONG_HOURS:
            return
        about = f"at this speed the extraction takes about {hours:.1f} more hours on this CPU"
        if not sys.stdin.isatty():
            raise ValueError(f"yes: {about}; pass --yes (yes=True) to go on without being asked, or use a GPU")
        self._bar.clear()
        if input(f"{about}. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise KeyboardInterrupt


def check_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision's matrix products; ``ValueError`` for one that the device has not."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision: got {precision!r}; allowed are {', '.join(map(repr, dtypes))}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision: got 'fp16'; a CPU has 'fp32' and 'bf16'")
    return dtypes[precision]
