"""`python -m benchmarks.report FILE.jsonl`: one run of a result file as a self-contained HTML page with its figures."""

import argparse
import base64
import html
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from benchmarks import breakdown, plots, table
from benchmarks.rows import Recorded, choose
from blip3o_fast.files import replacing

NEEDS_MATPLOTLIB = 'the figures need matplotlib: pip install -e ".[bench]" (or ".[report]")'
_SPEED = (
    "The median of the ratios within a round; the black line is the 20th to the 80th percentile. A bar to the right of "
    "1 is faster than the first provider (eager: stock diffusers' own sequence in the same dtype). Beside each bar its "
    "worst relative L2 error against fp64 in this run and the verdict; what is FAILED has no bar."
)
_ROOF = (
    "Filled: our fastest variant in more than 8 bits; hollow, below or above it: eager. Bytes are the least that must "
    "move, inputs read once and results written once. The lines are what this machine did in this run, not a data "
    "sheet: a point near a line has little left to gain. Small ops sit low because a call itself costs microseconds; "
    "one whose results stay in the cache can exceed the copy."
)
_PARTS = (
    "Each part was measured alone in the same run; the thick line is the whole block. A stack that ends left of its "
    "line leaves time between the parts unexplained; one that passes it had colder caches alone. Estimated: the "
    "context's projections and the modulation, from their FLOPs at the rate of the largest product. Ours computes "
    "SwiGLU inside the product before it."
)
_SCALING = (
    "The median time over the batch size; the shade is the 20th to the 80th percentile. Falling lines: batches pay."
)
_MEMORY = "What the rows themselves tell; in brackets the share of the first provider's."


@dataclass
class Report:
    """A run with its figures (PNG bytes) by name, and for each figure that is left out the reason."""

    run: Recorded
    source: Path
    figures: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def _wanted(run: Recorded) -> dict[str, tuple[str, str, Callable[[], bytes]]]:
    """name -> title, caption, how it is drawn."""
    rows, found = run.rows, {}
    families = dict.fromkeys((plots.family(r["suite"]), str(r["case"].get("dtype"))) for r in rows)
    for what, dtype in families:
        title = f"How much faster are the {plots.FAMILIES[what]} in {dtype}?"
        found[f"speedup-{what}-{dtype}"] = (title, _SPEED, lambda w=what, d=dtype: plots.speedups(rows, d, w))
    return found | {
        "roofline": ("How close to the ceilings does each op come?", _ROOF, lambda: plots.roofline(rows, run.limits)),
        "breakdown": ("Where does the time of a block go?", _PARTS, lambda: breakdown.breakdown(rows)),
        "scaling": ("What does one item cost as the batch grows?", _SCALING, lambda: plots.scaling(rows)),
        "memory": ("How much memory does it take?", _MEMORY, lambda: plots.memory(rows)),
    }


def make(run: Recorded, source: Path) -> Report:
    """Draw what the run has rows for. ModuleNotFoundError where matplotlib is missing."""
    import matplotlib  # noqa: F401  (before any work: its absence is the caller's to tell)

    report = Report(run, source)
    for name, (_, _, draw) in _wanted(run).items():
        try:
            report.figures[name] = draw()
        except plots.Missing as missing:
            report.left_out[name] = str(missing)
    return report


def write(report: Report, folder: Path) -> Path:
    """report.html and a PNG per figure into the folder; each file is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {f"{name}.png": data for name, data in report.figures.items()}
    for name, data in {**contents, "report.html": render(report).encode()}.items():
        with replacing(folder / name) as beside:
            beside.write_bytes(data)
    return folder / "report.html"


def folder_of(source: Path, run: Recorded) -> Path:
    """Where a report goes unless told otherwise: beside its rows, a folder per run."""
    return source.with_suffix("") / run.name


def _table(run: Recorded) -> Iterator[str]:
    firsts = table.first_rows(run.rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.COLUMNS)
    for (suite, case), block in groupby(run.rows, key=lambda row: (row["suite"], row["case"])):
        title = ", ".join(f"{k} {v}" for k, v in case.items())
        yield f"<h3>{html.escape(suite)} <small>{html.escape(title)}</small></h3><table><tr>{head}</tr>"
        for row in block:
            wrong = row["status"] in ("FAILED", "error")
            texts = "".join(f"<td>{html.escape(t)}</td>" for t in table.cells(row, run.limits, id(row) in firsts))
            yield f"<tr class='{'bad' if wrong else ''}'>{texts}</tr>"
            remark = row["reason"] or (row["inexact"] and f"right, but beyond the contract: {row['inexact']}")
            if remark:
                yield f"<tr><td></td><td class='remark' colspan='11'>{html.escape(row['provider'])}: "
                yield f"{html.escape(remark)}</td></tr>"
        yield "</table>"


def _figures(report: Report) -> Iterator[str]:
    seen: set[str] = set()
    for name, (title, caption, _) in _wanted(report.run).items():
        if name not in report.figures:
            continue
        data = base64.b64encode(report.figures[name]).decode()
        said = "Read as above." if caption in seen else caption
        seen.add(caption)
        yield f"<section><h2>{html.escape(title)}</h2><p>{html.escape(said)}</p>"
        yield f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'></section>"
    if report.left_out:
        items = "".join(f"<li>{html.escape(n)}: {html.escape(why)}</li>" for n, why in report.left_out.items())
        yield f"<section><h2>Left out</h2><ul>{items}</ul></section>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #55606a; --page: #f6f7f9; --card: #fff; --line: #d9dee3; }
:root { --good: #00714f; --bad: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --page: #14171a; --card: #1e2328;
  --line: #343b42; --good: #3fcf9f; --bad: #ff9a52; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0 0 4px; font-size: 30px; } h2 { margin: 0 0 6px; font-size: 20px; }
h3 { margin: 18px 0 4px; font-size: 15px; }
p, li { color: var(--soft); max-width: 90ch; } h3 small { font-weight: 400; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 16px 0; overflow-x: auto; }
img { max-width: 100%; height: auto; border-radius: 6px; } pre { white-space: pre-wrap; margin: 0; font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right; }
th:nth-child(-n+2), td:nth-child(-n+2), th:last-child, td:last-child { text-align: left; }
.bad td, .bad { color: var(--bad); font-weight: 700; } .good { color: var(--good); font-weight: 700; }
td.remark { color: var(--soft); text-align: left; }
"""


def render(report: Report) -> str:
    """The page as HTML text, with every figure inside it; it asks no network for anything."""
    run = report.run
    good, sentence = table.verdict(run.rows)
    impossible = "".join(f"<p class='bad'>more than the ceiling: {html.escape(claim)}</p>"
                         for claim in table.impossible(run.rows, run.limits))  # fmt: skip
    machine = html.escape("\n".join(table.header(run.machine)).rstrip())
    cut = "" if run.limits else "<p class='bad'>This run was cut short: no ceilings were measured.</p>"
    return "".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>blip3o_fast benchmarks</title><style>{_STYLE}</style></head><body><main>",
            "<h1>blip3o_fast benchmarks</h1>",
            f"<p>Run {html.escape(run.name)} of {html.escape(report.source.name)}, instruction set "
            f"{html.escape(str(run.machine.get('isa')))}.</p>",
            f"<p class='{'good' if good else 'bad'}'>{html.escape(sentence)}</p>{impossible}{cut}",
            f"<section><h2>Machine</h2><pre>{machine}</pre></section>",
            *_figures(report),
            f"<section><h2>Every row</h2><p>{html.escape(table.NOTE)}</p><details><summary>{len(run.rows)} rows",
            f"</summary>{''.join(_table(run))}</details></section>",
            "<section><h2>Again</h2><pre>python -m benchmarks --help\n",
            f"python -m benchmarks.report {html.escape(report.source.name)} --run {html.escape(run.name)}",
            "</pre></section>",
            "</main></body></html>\n",
        ]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="rows of `python -m benchmarks`")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the page (beside the file)")
    parser.add_argument("--run", help="which run of the file (the last)")
    parser.add_argument("--isa", help="the last run with this instruction set, for instance avx2")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        parser.error(f"argument FILE.jsonl: {options.file} is not a file")
    try:
        run = choose(options.file, run=options.run, isa=options.isa)
        report = make(run, options.file)
    except ValueError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        print(f"{NEEDS_MATPLOTLIB} ({error})", file=sys.stderr)
        return 2
    print(write(report, options.output or folder_of(options.file, run)))
    for name, why in report.left_out.items():
        print(f"left out: {name}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
