"""The cheapest sampler within an error, for one model, some conditions and one noise: a search from coarse to fine.

Cost is counted in passes: what the network sees for each sample, two for an evaluation of the guided velocity and one
for an unguided one. Error is the relative L2 distance to a long Euler run that is guided everywhere.

1. Every solver on every grid, with 4 evaluations, then 8, 16, ... until something is within the error.
2. Each of them with as few evaluations as are within it, the most promising first; who is not within it for less than
   the best so far costs one run.
3. For the best one, shifts between those of the list.
4. For the best one, no guidance at the ends of the run, as far as the error allows.

What to try next is chosen as if an error fell with the number of evaluations. What is accepted has been run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from blip3o_fast.flow.path import MAX_SIGMA_EPSILON
from blip3o_fast.flow.solvers import SOLVERS, evaluation_levels
from blip3o_fast.sampling.arguments import Arguments
from blip3o_fast.sampling.run import needed_passes
from blip3o_fast.sampling.sampler import Sampler
from blip3o_fast.sampling.settings import SamplerSettings
from blip3o_fast.sampling.steps import BOTH

GRIDS = (("linear", 1.0), ("cosine", 1.0), *(("shifted", shift) for shift in (0.5, 1.5, 2.0, 3.0, 5.0)))
"""(grid, shift) of the coarse search; "blip3o" is "linear" up to a rounding."""

PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1}
FEWEST, MOST = 4, 128  # evaluations


@dataclass(frozen=True)
class Trial:
    """A run that was made, and what it cost and was worth."""

    settings: SamplerSettings
    error: float
    evaluations: int
    passes: int


class Search:
    """Runs of one sampler on condition [N, L, E] and noise [N, T, C'], as in `sample`, measured.

    reference_steps: of the Euler run that errors are measured against, which is made here. on_trial: called with each
    run that follows, of which `trials` are all.
    """

    def __init__(
        self,
        sampler: Sampler,
        condition: Tensor,
        noise: Tensor,
        *,
        guidance_scale: float = 2.0,
        reference_steps: int = 1000,
        start: float = 1.0,
        progress: bool = False,
        on_trial: Callable[[Trial], object] = lambda trial: None,
    ) -> None:
        self.sampler, self.condition, self.noise = sampler, condition, noise
        self.guidance_scale, self.start, self.on_trial = guidance_scale, start, on_trial
        self.reference_settings = self.settings("euler", reference_steps, "linear")
        self.reference = self.run(self.reference_settings, progress=progress)
        self._made: dict[SamplerSettings, Trial] = {}

    @property
    def trials(self) -> list[Trial]:
        return list(self._made.values())

    def settings(self, solver: str, evaluations: int, grid: str, shift: float = 1.0) -> SamplerSettings:
        return SamplerSettings(
            solver, evaluations // PER_STEP[solver], grid, self.guidance_scale, shift=shift, start=self.start
        )

    def run(self, settings: SamplerSettings, progress: bool = False) -> Tensor:
        return self.sampler(self.condition, noise=self.noise, progress=progress, **settings.arguments())

    def measure(self, settings: SamplerSettings) -> Trial:
        """What was run before is not run again."""
        if settings not in self._made:
            trial = Trial(settings, relative_l2(self.run(settings), self.reference), *cost(settings))
            self._made[settings] = trial
            self.on_trial(trial)
        return self._made[settings]

    def floor(self) -> float:
        """About how far the reference itself is from the exact solution: as far as from Euler with half the steps.

        Euler's error halves when its steps do. A solver of higher order is no better judge: a trained network's
        velocity is smooth in sigma only on the scale of single timesteps.
        """
        return relative_l2(
            self.reference, self.run(self.settings("euler", self.reference_settings.num_steps // 2, "linear"))
        )


def first_level(prediction_type: str) -> float:
    """The noise level at which a sampler of such a network starts."""
    return MAX_SIGMA_EPSILON if prediction_type == "epsilon" else 1.0


def relative_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, all samples together, in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def cost(settings: SamplerSettings) -> tuple[int, int]:
    """(evaluations, passes) of a run, as the sampler itself decides them."""
    arguments = Arguments(**settings.arguments())
    assert arguments.sigmas is not None
    passes = needed_passes(evaluation_levels(arguments.sigmas, arguments.solver), arguments)
    return len(passes), sum(2 if passed == BOTH else 1 for passed in passes)


def front(trials: Iterable[Trial]) -> list[Trial]:
    """Those that are better than all that cost no more, from the cheapest to the best."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=_rank):
        if not kept or trial.error < kept[-1].error:
            kept.append(trial)
    return kept


def tune(search: Search, error: float, most: int = MOST) -> Trial | None:
    """The cheapest within the error, None where nothing of at most `most` evaluations is."""
    evaluations, coarse = FEWEST // 2, list[Trial]()
    while not any(trial.error <= error for trial in coarse):
        evaluations *= 2
        if evaluations > most:
            return None
        coarse = [search.measure(search.settings(solver, evaluations, *grid)) for solver in SOLVERS for grid in GRIDS]
    too_few = evaluations // 2 if evaluations > FEWEST else 0
    for trial in sorted(coarse, key=lambda trial: trial.error):
        _fewest(search, trial.settings, too_few, error)
    for factor in (2**-0.5, 2**-0.25, 2**0.25, 2**0.5):
        best = _best(search, error)
        if best.settings.grid != "cosine":
            bent = replace(best.settings, grid="shifted", shift=round(best.settings.shift * factor, 2))
            search.measure(bent)  # for the same cost it may be nearer
            _fewest(search, bent, too_few, error)
    if search.guidance_scale not in (0, 1):
        _unguide(search, error)
    return _best(search, error)


def _rank(trial: Trial) -> tuple[float, float]:
    return trial.passes, trial.error


def _best(search: Search, error: float) -> Trial:
    return min((trial for trial in search.trials if trial.error <= error), key=_rank)


def _fewest(search: Search, like: SamplerSettings, low: int, error: float) -> None:
    """Bisect the evaluations of settings like these, between `low`, too few, and what is cheaper than the best."""
    unit, passes = PER_STEP[like.solver], 1 if search.guidance_scale in (0, 1) else 2
    high = (_best(search, error).passes - 1) // passes // unit * unit

    def within(evaluations: int) -> bool:
        return search.measure(replace(like, num_steps=evaluations // unit)).error <= error

    if high <= low or not within(high):
        return
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (low, middle) if within(middle) else (middle, high)


def _unguide(search: Search, error: float) -> None:
    """Evaluations without guidance at the ends, in the best run and in those of a few evaluations more."""
    best = _best(search, error).settings
    for more in range(5):
        whole = replace(best, num_steps=best.num_steps + more)
        levels = evaluation_levels(whole.arguments()["sigmas"], whole.solver).unique().flip(0).tolist()
        ends, trial = (0, 0), search.measure(whole)
        while trial.error <= error and sum(ends) < len(levels) - 1:
            first, last = ends
            tried = {e: search.measure(_between(whole, levels, *e)) for e in ((first + 1, last), (first, last + 1))}
            ends = min(tried, key=lambda e: tried[e].error)
            trial = tried[ends]


def _between(whole: SamplerSettings, levels: list[float], first: int, last: int) -> SamplerSettings:
    """No guidance at the first and the last so many levels. The bounds are half way between two levels."""

    def half_way(i: int) -> float:
        return round((levels[i - 1] + levels[i]) / 2, 6)

    start = half_way(first) if first else 1.0
    return replace(whole, guidance_start=start, guidance_end=half_way(len(levels) - last) if last else 0.0)
