"""What the CPU engine is meant to reach, and what of it a run has reached.

Ratios are of providers that took turns in one run. Two instruction sets have goals of their own: on AVX-512 the vendor
library leaves more of the machine unused than on AVX2.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.table import ceiling

ROWS = 64  # of a batch of one


@dataclass(frozen=True)
class Goal:
    """reached None: no row of this run tells. at_most: the smaller the better.

    bound: what would be reached at the measured peak of multiply-adds, with nothing but the products to do.
    """

    what: str
    goal: float
    reached: float | None
    at_most: bool = False
    bound: float | None = None

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached <= self.goal if self.at_most else self.reached >= self.goal


class Rows:
    """The timed rows of a run, to be asked for by suite, provider and case."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = [row for row in rows if row["status"] == "ok" and row["median_s"] is not None]

    def find(self, suite: str, provider: str, mode: str = "forward", **case: Any) -> dict[str, Any] | None:
        for row in self.rows:
            if (row["suite"], row["provider"], row["mode"]) == (suite, provider, mode):
                if all(row["case"].get(key) == value for key, value in case.items()):
                    return row
        return None

    def times_faster(self, suite: str, ours: str, theirs: str, mode: str = "forward", **case: Any) -> float | None:
        """Of two providers of one case, by what each gains on the first (medians of ratios within a round)."""
        mine, other = (self.find(suite, provider, mode, **case) for provider in (ours, theirs))
        return None if mine is None or other is None else mine["speedup"] / other["speedup"]

    def bound(
        self, suite: str, ours: str, theirs: str, limits: dict[str, Any], mode: str = "forward", **case: Any
    ) -> float | None:
        """times_faster of ours at the ceiling: the two do the same multiplications."""
        mine, other = (self.find(suite, provider, mode, **case) for provider in (ours, theirs))
        limit = None if mine is None else ceiling(mine, limits)
        return limit / float(other["gflops"]) if limit and other is not None and other["gflops"] else None

    def share(self, provider: str, limits: dict[str, Any], **case: Any) -> float | None:
        """Of the measured peak of multiply-adds, by one of packed_linear's products."""
        row = self.find("packed_linear", provider, **case)
        limit = None if row is None else ceiling(row, limits)
        return row["gflops"] / limit if row is not None and limit else None


# (storage or provider, dtype of the block, batch, against, goal)
_AVX512 = [
    ("fp32", "float32", 1, "eager", 3.2),
    ("fp32", "float32", 4, "eager", 2.5),
    ("fp32", "float32", 1, "frozen", 1.3),
    ("fp32", "float32", 4, "frozen", 1.3),
    ("bf16", "bfloat16", 1, "eager_fp32", 5.0),
    ("bf16", "bfloat16", 1, "eager", 2.0),
    ("bf16", "bfloat16", 4, "eager", 1.35),
    ("int8", "float32", 1, "eager", 6.0),
]
_AVX2 = [
    ("fp32", "float32", 1, "eager", 1.5),
    ("fp32", "float32", 1, "compile", 1.3),
    ("fp32", "float32", 4, "eager", 1.25),
    ("fp32", "float32", 1, "frozen", 1.3),
    ("fp32", "float32", 4, "frozen", 1.3),
    ("bf16", "bfloat16", 1, "eager", 4.0),
    ("bf16", "bfloat16", 1, "fp32", 1 / 1.05),
]
_TRAINING = {"avx2": 1.1, "avx512": 2.0}
# How often a block calls each op; swiglu is part of a product there.
IN_A_BLOCK = {"rms_norm_modulate": 2, "qk_norm_rope": 1, "dual_attention": 1, "gated_residual_modulate": 2}


def goals(rows: Iterable[dict[str, Any]], limits: dict[str, Any], isa: str | None) -> list[Goal]:
    found, family = Rows(rows), "avx512" if str(isa).startswith("avx512") else "avx2"
    result = []
    for provider, dtype, batch, against, goal in _AVX512 if family == "avx512" else _AVX2:
        ratio = found.times_faster("cpu_block", provider, against, dtype=dtype, batch=batch)
        bound = found.bound("cpu_block", provider, against, limits, dtype=dtype, batch=batch)
        result.append(Goal(f"block, {dtype}, batch {batch}: {provider} over {against}", goal, ratio, bound=bound))
    for dtype, provider in (("float32", "fp32"), ("bfloat16", "bf16")):
        if dtype == "bfloat16" and isa != "avx512_bf16":
            continue
        for product in ("qkqv", "gate_up", "down", "out"):
            case = {"rows": ROWS, "product": product, "dtype": dtype}
            share = found.share(provider, limits, **case)
            result.append(Goal(f"{product}, {ROWS} rows, {provider}: of the peak", 0.75, share))
            ratio = found.times_faster("packed_linear", provider, "onednn", **case)
            result.append(Goal(f"{product}, {ROWS} rows, {provider}: over oneDNN", 1.0, ratio))
    result += _op_goals(found)
    training = ("model_block", "ours", "eager")
    ratio, bound = found.times_faster(*training, "both", batch=4), found.bound(*training, limits, "both", batch=4)
    result.append(Goal("block, forward + backward, batch 4: ours over eager", _TRAINING[family], ratio, bound=bound))
    result.append(Goal("block, batch 4: saved for backward, of eager's", 0.7, _saved(found), at_most=True))
    return result


def _op_goals(found: Rows) -> Iterator[Goal]:
    cases = sorted({(r["suite"], r["case"]["dtype"], r["case"]["batch"], r["mode"]) for r in found.rows if _is_op(r)})
    for suite, dtype, batch, mode in cases:
        ratio = found.times_faster(suite, "ours", "eager", mode, dtype=dtype, batch=batch)
        yield Goal(f"{suite}, {dtype}, batch {batch}, {mode}: over eager", 2.0, ratio)
    for batch in (1, 4):
        block = found.find("cpu_block", "fp32", dtype="float32", batch=batch)
        parts = [(n, found.find(op, "ours", dtype="float32", batch=batch)) for op, n in IN_A_BLOCK.items()]
        share = None
        if block is not None and all(part is not None for _, part in parts):
            share = sum(n * part["median_s"] for n, part in parts if part is not None) / block["median_s"]
        yield Goal(f"ops that are no products, of the block, batch {batch}", 0.08, share, at_most=True)


def _is_op(row: dict[str, Any]) -> bool:
    return row["suite"] not in ("cpu_block", "packed_linear", "model_block", "model_step") and "batch" in row["case"]


def _saved(found: Rows) -> float | None:
    """From the details of the rows, "saves 12.3 MB"."""
    rows = [found.find("model_block", name, "both", batch=4) for name in ("ours", "eager")]
    sizes = [float(row["detail"].split()[1]) for row in rows if row is not None and row["detail"]]
    return sizes[0] / sizes[1] if len(sizes) == 2 else None


def lines(rows: Iterable[dict[str, Any]], limits: dict[str, Any], isa: str | None) -> Iterator[str]:
    """A table of the goals; nothing where a run measured none of what they are about."""
    rows = list(rows)
    if not any(row["suite"] == "cpu_block" for row in rows):
        return
    found = goals(rows, limits, isa)
    yield ""
    yield f"goals of the CPU engine with {isa}"
    width = max(len(goal.what) for goal in found)
    for goal in found:
        verdict = {True: "reached", False: "MISSED", None: "not measured"}[goal.met]
        reached = "" if goal.reached is None else f"{goal.reached:.2f}"
        bound = "" if goal.bound is None or goal.met is None else f"  (at the FMA ceiling: {goal.bound:.2f})"
        yield f"  {goal.what:{width}}  {'<=' if goal.at_most else '>='} {goal.goal:.2f}  {reached:>6}  {verdict}{bound}"
    yield f"  {sum(goal.met is True for goal in found)} of {sum(goal.met is not None for goal in found)} reached"
