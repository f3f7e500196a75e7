"""Rows as text: the header with the machine, a line per measured case, the table at the end."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

RED, GREEN, BOLD, END = "\033[31m", "\033[32m", "\033[1m", "\033[0m"

COLUMNS = (
    "mode",
    "provider",
    "median",
    "p20 .. p80",
    "x first",
    "p20 .. p80",
    "GB/s",
    "of copy",
    "GFLOP/s",
    "of FMA",
    "error",
    "correct",
)
NOTE = """\
Providers of a case run in turns. Median and 20th..80th percentile of the rounds, on the host's clock, Python and
dispatch overhead included, compilation and warm-up excluded. "x first": how many times faster than the first provider,
the median of the ratios within a round.
forward: without autograd; backward: its forward is not timed; both: a training step's share; whole: all in one call.
GB/s, GFLOP/s: the least that the work needs (inputs read once, results written once; an unfused provider moves more)
over the median, beside the ceilings measured in this run. Small cases are bound by overhead; what is written to memory
that is still in the cache can exceed the copy.
correct: every output and gradient against fp64 in this run; error: the largest relative L2 distance among them. Ours
must stay within twice the first provider's error; what others made is called inexact beyond that. What is wrong gets
no time."""


def seconds(value: float) -> str:
    unit, scale = next((pair for pair in (("s", 1.0), ("ms", 1e3)) if value * pair[1] >= 1), ("us", 1e6))
    number = value * scale
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {unit}"


def _spread(low: float | None, high: float | None, form: Any) -> str:
    return "" if low is None or high is None else f"{form(low)} .. {form(high)}"


def _share(amount: float | None, ceiling: float | None) -> str:
    return "" if amount is None or not ceiling else f"{100 * amount / ceiling:.0f} %"


def ceiling(row: dict[str, Any], limits: dict[str, Any]) -> float | None:
    """GFLOP/s that the row's arithmetic could reach, None where no probe says: 8-bit products have none."""
    if row["provider"] == "int8":
        return None
    if row["case"].get("dtype") == "bfloat16" and limits.get("bf16_gflops"):
        return float(limits["bf16_gflops"])
    return limits.get("fma_gflops")


def impossible(rows: Iterable[dict[str, Any]], limits: dict[str, Any]) -> list[str]:
    """Rows that claim more than the ceiling: then the time or the ceiling is wrong, and so may be all others."""
    found = []
    for row in rows:
        limit = ceiling(row, limits)
        if limit and row["gflops"] is not None and row["gflops"] > limit:
            found.append(f"{row['suite']} {row['case']} {row['provider']}: {row['gflops']:.1f} of {limit:.1f} GFLOP/s")
    return found


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def header(stamp: dict[str, Any]) -> Iterator[str]:
    """The machine in a few lines, and a warning where it is busy."""
    cpu, versions = stamp["cpu"], stamp["versions"]
    allowed = "" if stamp["affinity"] is None else f", {len(stamp['affinity'])} allowed"
    gpu = f"{stamp['gpu']['name']} with " if "gpu" in stamp else ""
    yield f"machine   {gpu}{cpu['model']} ({' '.join(cpu['flags'])})"
    yield (
        f"          {stamp['logical_cores']} logical cores{allowed}, {stamp['threads']} threads, "
        f"largest cache {stamp['cache_bytes'] >> 20} MiB"
    )
    yield "versions  " + ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[stamp["dirty"]]
    yield f"commit    {stamp['commit']}{dirty}"
    load, cores = stamp["load_average_at_start"], stamp["logical_cores"] or 1
    if load is not None and load > 0.5 * cores:
        yield f"WARNING   the load average is {load:.1f} on {cores} cores: others are at work, do not quote these times"
    yield ""


def progress_line(rows: list[dict[str, Any]]) -> str:
    """One case and mode in one line."""
    parts = []
    for row in rows:
        if row["status"] != "ok":
            parts.append(f"{row['provider']} {row['status']}")
        elif row["median_s"] is None:
            parts.append(f"{row['provider']} correct")
        else:
            parts.append(
                f"{row['provider']} {seconds(row['median_s'])}"
                + ("" if row is rows[0] or row["speedup"] is None else f" ({_ratio(row['speedup'])}x)")
            )
    case = " ".join(f"{k}={v}" for k, v in rows[0]["case"].items())
    return f"{rows[0]['suite']} {case} {rows[0]['mode']}: {', '.join(parts)}"


def worst_error(row: dict[str, Any]) -> float | None:
    """The largest relative L2 distance to the gold among the row's values; None where there is no number."""
    return max((e for e in row["errors"].values() if isinstance(e, float)), default=None)


def cells(row: dict[str, Any], limits: dict[str, Any], first: bool) -> list[str]:
    """A row as texts, one per column of COLUMNS."""
    name = row["provider"] + (f" ({row['detail']})" if row["detail"] else "")
    if row.get("items_per_s") is not None:
        name += f", {row['items_per_s']:.3g} {row['item']}/s"
    if row.get("device_s") is not None:
        name += f", {seconds(row['device_s'])} on the device"
    worst = worst_error(row)
    error = "" if worst is None else f"{worst:.1e}"
    if row["status"] != "ok":
        return [row["mode"], name, row["status"], *[""] * 7, error, row["status"]]
    timed = row["median_s"] is not None
    return [
        row["mode"],
        name,
        seconds(row["median_s"]) if timed else "not timed",
        _spread(row["p20_s"], row["p80_s"], seconds),
        _ratio(row["speedup"]),
        "" if first else _spread(row["speedup_p20"], row["speedup_p80"], _ratio),
        "" if row["gbps"] is None else f"{row['gbps']:.1f}",
        _share(row["gbps"], limits.get("copy_gbps")),
        "" if row["gflops"] is None else f"{row['gflops']:.1f}",
        _share(row["gflops"], ceiling(row, limits)),
        error,
        "ok" if row["inexact"] is None else "inexact",
    ]


def first_rows(rows: Iterable[dict[str, Any]]) -> set[int]:
    """The id of each row that the others of its case and mode are compared with."""
    return {id(next(group)) for _, group in groupby(rows, key=lambda row: (row["suite"], row["case"], row["mode"]))}


def verdict(rows: Iterable[dict[str, Any]]) -> tuple[bool, str]:
    """Whether nothing that ran is wrong or broken, and the sentence that says so."""
    rows = list(rows)
    bad = sum(row["status"] in ("FAILED", "error") for row in rows)
    if bad:
        return False, f"{bad} of {len(rows)} rows are wrong or broken"
    absent = sum(row["status"] == "absent" for row in rows)
    return True, f"all {len(rows) - absent} rows that ran are correct" + (
        f"; {absent} rows of absent providers" if absent else ""
    )


def lines(rows: Iterable[dict[str, Any]], limits: dict[str, Any], colour: bool = False) -> Iterator[str]:
    """The table of a run: a block per case. limits: the `ceilings` row."""
    rows = list(rows)
    firsts = first_rows(rows)
    texts_of = [cells(row, limits, id(row) in firsts) for row in rows]
    widths = [max(len(line[i]) for line in [list(COLUMNS), *texts_of]) for i in range(len(COLUMNS))]

    def line(texts: Iterable[str]) -> str:
        left = {0, 1, len(COLUMNS) - 1}
        padded = [t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return "  ".join(padded).rstrip()

    def paint(text: str, code: str) -> str:
        return f"{code}{text}{END}" if colour else text

    numbered = zip(rows, texts_of, strict=True)
    for (suite, case), block in groupby(numbered, key=lambda pair: (pair[0]["suite"], pair[0]["case"])):
        yield ""
        yield paint(f"{suite}  " + ", ".join(f"{k} {v}" for k, v in case.items()), BOLD)
        yield line(COLUMNS)
        for row, texts in block:
            wrong = row["status"] in ("FAILED", "error")
            yield paint(line(texts), RED) if wrong else line(texts)
            remark = row["reason"] or (row["inexact"] and f"right, but beyond the contract: {row['inexact']}")
            if remark:
                yield f"    {row['provider']}: {remark}"
    yield ""
    if limits:
        fma, one = limits["fma_gflops"], limits["fma_gflops_one_core"]
        if fma is not None:
            single = "" if one is None else f" ({one:.1f} on one core)"
            yield (
                f"FMA ceiling   {fma:.1f} GFLOP/s fp32{single}, best of {limits['fma_probes']}: {limits['fma_probe']}"
            )
        if limits.get("bf16_gflops"):
            yield f"bf16 ceiling  {limits['bf16_gflops']:.1f} GFLOP/s of bfloat16 products summed in fp32"
        yield (
            f"copy ceiling  {limits['copy_gbps']:.1f} GB/s read plus written, best of {limits['copy_probes']} "
            f"copies of {limits['copy_bytes'] / 2e6:.0f} MB"
        )
    for claim in impossible(rows, limits):
        yield paint(f"more than the ceiling: {claim}", RED)
    good, sentence = verdict(rows)
    yield paint(sentence, GREEN if good else RED)
    yield ""
    yield NOTE
