"""The flags of `blip3o-fast bench`: those of `python -m benchmarks`, which does the work."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from blip3o_fast.cli_verbs import option

ROOT = Path(__file__).resolve().parent.parent
ABSENT = (
    "the benchmarks are part of a checkout and are never installed; there are none beside {package}\n"
    'hint: in a checkout of the project run `pip install -e ".[bench]"` (or `make setup`), then this again'
)


def bench(
    set_: Annotated[str | None, option("set", "quick (the default), cpu or full.")] = None,
    op: Annotated[list[str] | None, option("op", "Only this file of `--list`; repeatable.")] = None,
    file: Annotated[list[str] | None, option("file", "A benchmark file of your own; repeatable.")] = None,
    list_: Annotated[bool, option("list", "Show the files and what they measure.")] = False,
    device: Annotated[str | None, option("device", "cpu (the default) or cuda.")] = None,
    isa: Annotated[str | None, option("isa", "auto, or avx2: everybody does without AVX-512.")] = None,
    threads: Annotated[int | None, option("threads", "Threads of PyTorch; its own default.")] = None,
    rounds: Annotated[int | None, option("rounds", "Rounds at least; 7.")] = None,
    seconds: Annotated[float | None, option("seconds", "Timed seconds per provider and mode; 1.")] = None,
    check_only: Annotated[bool, option("check_only", "Correctness without times.")] = False,
    results: Annotated[str | None, option("results", "The folder of the rows; benchmarks/results.")] = None,
    no_save: Annotated[bool, option("no_save", "Write no rows, and so no report.")] = False,
    no_report: Annotated[bool, option("no_report", "Write no page and no figures at the end.")] = False,
    pytest: Annotated[list[str] | None, typer.Argument(help="After --: options of pytest(-benchmark).")] = None,
) -> None:
    """Time what exists beside eager and torch.compile, with correctness in the same run; ends with a report. In a
    checkout only.

    Examples:

      blip3o-fast bench --set quick

      blip3o-fast bench --op rms_norm_modulate --set full

      blip3o-fast bench --op model_block -- -k 4
    """
    given: dict[str, Any] = {name.rstrip("_"): value for name, value in locals().items()}
    if not all((ROOT / name).is_file() for name in ("pyproject.toml", "benchmarks/plugin.py")):
        raise ValueError(ABSENT.format(package=Path(__file__).parent))
    rest = given.pop("pytest") or []
    if rest and not rest[0].startswith("-"):  # click hands over the words without their --
        raise ValueError(f"bench takes no argument {rest[0]!r}: a set is --set NAME, options of pytest go after --")
    sys.path.insert(0, str(ROOT))
    code = importlib.import_module("benchmarks.__main__").main(forwarded(given) + (["--", *rest] if rest else []))
    if code:
        raise typer.Exit(code)


def forwarded(flags: dict[str, Any]) -> list[str]:
    """The flags that were given, as `python -m benchmarks` spells them."""
    words: list[str] = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, list) else [] if value in (None, False) else [value]
            words += [word for each in values for word in (flag, str(each))]
    return words
