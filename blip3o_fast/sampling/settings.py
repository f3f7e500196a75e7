"""The settings of a sampler that were found to be good for a model: `sampler.json` beside its weights.

settings = SamplerSettings.read("runs/demo/model")         # what `blip3o-fast tune-sampler` wrote
features = sample(model, condition, **settings.arguments())
"""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from blip3o_fast.files import replacing
from blip3o_fast.flow.solvers import sigma_grid
from blip3o_fast.sampling.arguments import Arguments

FILE = "sampler.json"
WHOLE_NUMBERS = ("num_steps", "reference_steps", "evaluations", "passes")
NUMBERS = ("shift", "start", "error")


@dataclass(frozen=True)
class SamplerSettings:
    """How to integrate, and what that was found to cost and to be worth.

    solver, num_steps, guidance_scale, guidance_start, guidance_end: as in `sample`.
    grid, shift, start: the noise levels, `flow.sigma_grid(num_steps, grid, shift=shift, start=start)`.
    error: relative L2 distance to a run of reference_steps Euler steps; None where nobody measured, as for the rest.
    evaluations: of the guided velocity in a run. passes: of the network for each sample, two where there is guidance.

    Raises ValueError naming the field, what was given and what is allowed.
    """

    solver: str
    num_steps: int
    grid: str
    guidance_scale: float
    shift: float = 1.0
    start: float = 1.0
    guidance_start: float = 1.0
    guidance_end: float = 0.0
    error: float | None = None
    reference_steps: int | None = None
    evaluations: int | None = None
    passes: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if f.name in WHOLE_NUMBERS and (type(value) is not int or value < 1):
                raise ValueError(f"{f.name} must be a whole number >= 1, got {value!r}")
            if f.name in NUMBERS and (type(value) not in (int, float) or not 0 <= value < math.inf):
                raise ValueError(f"{f.name} must be a finite number >= 0, got {value!r}")
        Arguments(
            solver=self.solver,
            guidance_scale=self.guidance_scale,
            guidance_start=self.guidance_start,
            guidance_end=self.guidance_end,
        ).check()
        sigma_grid(self.num_steps, self.grid, shift=self.shift, start=self.start)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `sample`, `Sampler(...)(...)` and of no other function."""
        return {
            "solver": self.solver,
            "num_steps": self.num_steps,
            "sigmas": sigma_grid(self.num_steps, self.grid, shift=self.shift, start=self.start),
            "guidance_scale": self.guidance_scale,
            "guidance_start": self.guidance_start,
            "guidance_end": self.guidance_end,
        }

    def __str__(self) -> str:
        grid = f"{self.grid} grid" if self.shift == 1 else f"{self.grid} grid by {self.shift:g}"
        text = f"{self.solver}, {self.num_steps} steps, {grid}, guidance {self.guidance_scale:g}"
        if (self.guidance_start, self.guidance_end) == (1, 0):
            return text
        return f"{text} where {self.guidance_end:g} <= sigma <= {self.guidance_start:g}"

    @classmethod
    def read(cls, folder: str | Path) -> "SamplerSettings":
        """From `sampler.json` in a model's folder.

        FileNotFoundError where there is none; ValueError naming the file and what is wrong in it.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; `blip3o-fast tune-sampler` writes one")
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path}: must hold an object, got {type(given).__name__}")
        known = {f.name: f.default is MISSING for f in fields(cls)}
        strange = sorted(set(given) - set(known))
        if strange:
            raise ValueError(f"{path}: unknown {', '.join(strange)}; known are {', '.join(known)}")
        missing = [name for name, needed in known.items() if needed and name not in given]
        if missing:
            raise ValueError(f"{path}: {', '.join(missing)} missing")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def write(self, folder: str | Path) -> Path:
        """Into `sampler.json` of an existing folder, beside first, then renamed; returns its path."""
        path = Path(folder) / FILE
        with replacing(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


FILLED = ("solver", "num_steps", "sigmas", "guidance_scale", "guidance_start", "guidance_end")
"""What `fill` fills in: the keys of `SamplerSettings.arguments`."""


def fill(given: dict[str, Any], folder: str | Path, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """`given` with the arguments of `sample` that are None in it, or missing, taken from the folder's `sampler.json`.

    What is given wins. A given num_steps lays out the file's grid in so many steps; a given guidance_scale that is not
    the file's guides everywhere, as the interval was accepted for that one scale only. Other keys of `given` are
    handed on as they are. What neither side knows is left out, so that the receiver's defaults hold: all of it where
    there is no file. say: called with one line about what came from the file, where something did.

    Raises ValueError naming the file, or the argument, that is wrong.
    """
    wanted = {name: value for name, value in given.items() if value is not None or name not in FILLED}
    path = Path(folder) / FILE
    if not path.is_file() or all(name in wanted for name in FILLED):
        return wanted
    settings = SamplerSettings.read(folder)
    given_names = [name for name in FILLED if name in wanted]
    if "sigmas" in wanted:
        wanted.setdefault("num_steps", len(wanted["sigmas"]) - 1)
    if wanted.get("guidance_scale", settings.guidance_scale) != settings.guidance_scale:
        settings = replace(settings, guidance_start=1.0, guidance_end=0.0)
    own = {name: wanted[name] for name in given_names if name != "sigmas"}
    try:
        mixed = replace(settings, **own)
    except ValueError as error:
        given_text = ", ".join(f"{name} {value}" for name, value in own.items())
        raise ValueError(f"{path} with {given_text}: {error}") from error
    said = f" (given: {', '.join(given_names)})" if given_names else ""
    if (mixed.solver, mixed.num_steps) != (settings.solver, settings.num_steps):
        # Another run than the file's: its noise levels are laid out anew, and what was measured holds no more.
        said = f"{said[:-1]}; the file has {settings.solver}, {settings.num_steps} steps)"
    say(f"{path}: {mixed}{said}")
    return {**mixed.arguments(), **wanted}
