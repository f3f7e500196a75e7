"""`make readme-table`: the README's table of times, written from a committed result file; `--check` only compares.

The README names the file and the run between two comments:

    <!-- table: benchmarks/results/DEVICE/FILE.jsonl isa=avx2 -->
    ...
    <!-- end of table -->
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cpu_goals import Rows
from benchmarks.rows import Recorded, choose
from benchmarks.table import seconds
from blip3o_fast.files import replacing

ROOT = Path(__file__).resolve().parent.parent
BEGIN = re.compile(r"<!-- table: (?P<file>\S+) isa=(?P<isa>\w+) -->\n")
END = "<!-- end of table -->"
HEAD = ("`make bench-cpu`", "eager", "`torch.compile`", "frozen", "ours", "ours, packed", "packed, int8")
STORAGE = {"float32": "fp32", "bfloat16": "bf16"}
# (suite, mode, dtype, batch) of a line
LINES = (
    *(("cpu_block", "forward", dtype, batch) for dtype in STORAGE for batch in (1, 4)),
    *(("model_block", "both", "float32", batch) for batch in (1, 4)),
)


def _cell(run: Recorded, suite: str, provider: str, mode: str, dtype: str, batch: int) -> str:
    """A speed-up, the first provider's time, the word of a row that has none, or nothing where there is no row."""
    row = Rows(run.rows).find(suite, provider, mode, dtype=dtype, batch=batch)
    if row is not None:
        return seconds(row["median_s"]) if provider == "eager" else f"{row['speedup']:.2f}"
    case = {"dtype": dtype, "batch": batch}.items()
    for row in run.rows:
        if (row["suite"], row["provider"], row["mode"]) == (suite, provider, mode) and case <= row["case"].items():
            return str(row["status"])
    return ""


def lines(run: Recorded) -> Iterator[str]:
    """The table in Markdown: eager's median, then how many times faster the others are."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + "---|" * len(HEAD)
    for suite, mode, dtype, batch in LINES:
        providers = ("eager", "compile", "frozen", "ours", STORAGE[dtype], "int8")
        kind = "forward" if mode == "forward" else "forward + backward"
        cells = (_cell(run, suite, provider, mode, dtype, batch) for provider in providers)
        yield f"| batch {batch}, {STORAGE[dtype]}, {kind} |" + "".join(f" {c} |" if c else " |" for c in cells)


def rewritten(text: str, root: Path = ROOT, file: str | None = None, isa: str | None = None) -> str:
    """The document with its table made anew; file, isa: name another run. ValueError where it has no place for one."""
    begin = BEGIN.search(text)
    end = text.find(END)
    if begin is None or end < begin.end():
        raise ValueError(f"no table between `<!-- table: FILE isa=ISA -->` and `{END}`")
    file, isa = file or begin["file"], isa or begin["isa"]
    run = choose(root / file, isa=isa)
    if run.machine["dirty"] is not False:
        raise ValueError(f"{file}: run {run.name} had uncommitted changes: a document quotes only what can be repeated")
    body = "\n".join(lines(run))
    return f"{text[: begin.start()]}<!-- table: {file} isa={isa} -->\n\n{body}\n\n{text[end:]}"


def main(arguments: list[str], readme: Path = ROOT / "README.md") -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the table is another")
    parser.add_argument("--file", help="another result file, from the checkout's root")
    parser.add_argument("--isa", help="another instruction set of the file")
    options = parser.parse_args(arguments)
    text = readme.read_text()
    try:
        made = rewritten(text, readme.parent, options.file, options.isa)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.check:
        print("the table is the file's" if made == text else "the table differs from its file: make readme-table")
        return int(made != text)
    with replacing(readme) as beside:
        beside.write_text(made)
    print(f"{readme.name}: {'unchanged' if made == text else 'rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
