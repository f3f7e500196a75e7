"""Fill Triton's cache with the kernels of a model, so that its first training or sampling step compiles none of them.

The kernels are those that the model launches, found without running it (`launches.py`) and compiled for the
architecture that is named. That needs no GPU: a container image can be built with its cache filled. Covered are the
model's own grid, a context of as many tokens as it is told, with and without a mask, the loss on the linear path, and
guided sampling. Triton's launcher is built on the first launch; it needs a C compiler and Python's headers there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.launches import PRECISIONS, compile_all, distinct, model_calls
from blip3o_fast.models.reading import find
from blip3o_fast.models.recognise import read_config
from blip3o_fast.ops import _triton

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@dataclass
class WarmupSettings:
    """What `blip3o-fast warmup` is told.

    model: a folder or hub name whose config counts; preset: instead, a preset's name; neither: the default network.
    precision: how the model will run; see `launches.PRECISIONS`.
    arch: 90 for sm_90 (H100, H200); empty: that of the GPUs of this machine.
    training: also the kernels of the backward pass and the loss.
    context_tokens: L of the context; 0: as many as the model's grid has.
    """

    model: str = ""
    preset: str = ""
    precision: Sequence[str] = ("bfloat16", "autocast")
    arch: Sequence[int] = ()
    training: bool = True
    context_tokens: int = 0

    def check(self) -> None:
        """ValueError naming the flag, before anything is compiled."""
        if self.model and self.preset:
            raise ValueError(f"--model and --preset exclude each other, got {self.model!r} and {self.preset!r}")
        for precision in self.precision:
            if precision not in PRECISIONS:
                raise ValueError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if self.context_tokens < 0:
            raise ValueError(f"--context_tokens must be a number >= 0, got {self.context_tokens}")
        for arch in self.arch:
            if arch not in ARCHITECTURES:
                known = ", ".join(map(str, ARCHITECTURES))
                raise ValueError(f"--arch must be one of {known} (90 is sm_90, an H100), got {arch}")


def architectures() -> list[int]:
    """Those of this machine's GPUs that the kernels run on."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return sorted(10 * major + minor for major, minor in found if (major, minor) >= _triton.MINIMUM_CAPABILITY)


def warmup(settings: WarmupSettings) -> str:
    """Compile, with a progress bar; returns one sentence that says what is in the cache now.

    Raises ValueError for a setting that does not fit, and where Triton cannot compile here.
    """
    settings.check()
    reason = _triton.why_no_compiler()
    if reason is not None:
        raise ValueError(f"kernels cannot be compiled here: {reason}")
    archs = list(settings.arch) or architectures()
    if not archs:
        raise ValueError("there is no GPU here whose architecture could be meant\nhint: name it: --arch 90 (an H100)")
    from tqdm import tqdm
    from triton import knobs

    if settings.model:
        config = read_config(find(settings.model, None))
    else:
        config = BLIP3oConfig.preset(settings.preset) if settings.preset else BLIP3oConfig()
    uses = ("train", "sample") if settings.training else ("sample",)
    work = []
    for arch in archs:
        for precision in settings.precision:
            dtype, autocast = PRECISIONS[precision]
            for masked in (False, True):
                try:
                    calls = model_calls(
                        config, dtype=dtype, autocast=autocast, uses=uses, masked=masked, capability=arch,
                        context_tokens=settings.context_tokens,
                    )  # fmt: skip
                except RuntimeError as error:  # an op of this network has no Triton kernel
                    raise ValueError(str(error)) from error
                work += [(arch, key, launch) for key, launch in distinct(calls, arch).items()]
    unique = {(arch, key): launch for arch, key, launch in work}
    start = time.perf_counter()
    bar = tqdm(unique.items(), desc="compile", unit="kernel", dynamic_ncols=True)
    for (arch, _), launch in bar:
        compile_all([launch], arch)
    names = ", ".join(f"sm_{arch}" for arch in archs)
    seconds = time.perf_counter() - start
    return f"{len(unique)} kernels for {names} in {Path(knobs.cache.dir)}, {seconds:.0f} s"
