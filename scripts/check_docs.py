"""Checks that the documents speak of what exists: links, paths, make targets, verbs and flags, Python blocks.

`make docs` runs it; tests/test_docs.py runs the same checks. Needs no network: links to other sites are not followed.
"""

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("blip3o_fast", "csrc", "kernels", "tests", "docs", "scripts", "benchmarks", "examples", ".ci")
PARTS = ("ops", "models", "flow", "sampling", "data", "training", "evaluation", "demo")


def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "kernels" / "README.md"]
    return sorted([*found, *ROOT.glob("benchmarks/*.md")])


def anchors(text: str) -> set[str]:
    """The anchors that headings get: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> Iterator[str]:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            yield f"link to {target}: no such heading"


def missing_paths(path: Path) -> Iterator[str]:
    """Paths in backticks from the root, and `part/file` in figures from the package."""
    text = path.read_text()
    for token in re.findall(r"`([^`\s]+)`", text):
        if token.split("/")[0] in FOLDERS and "/" in token and not re.search(r"[<>*{}()$]", token):
            if not (ROOT / token).exists():
                yield f"`{token}`: no such file or folder"
    for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for name in re.findall(rf"(?<![\w/.])((?:{'|'.join(PARTS)})/[a-z_0-9]+(?:\.py)?)", block):
            file = ROOT / "blip3o_fast" / name
            if not file.exists() and not file.with_suffix(".py").exists():
                yield f"figure: {name}: no such file in blip3o_fast"


def unknown_names(path: Path) -> Iterator[str]:
    """`blip3o_fast.some.name` in backticks."""
    for name in re.findall(r"`(blip3o_fast(?:\.[A-Za-z_]\w*)+)", path.read_text()):
        parts = name.split(".")
        found: object = importlib.import_module(parts[0])
        try:
            for depth, part in enumerate(parts[1:], 2):
                if hasattr(found, part):
                    found = getattr(found, part)
                else:
                    found = importlib.import_module(".".join(parts[:depth]))
        except ImportError:
            yield f"`{name}`: no such name"


def unknown_targets(path: Path) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text()
    spoken = re.findall(r"`make ((?:[a-z-]+ ?)+)[^`]*`", text) + re.findall(
        r"^make ((?:[a-z-]+ ?)+)", text, re.MULTILINE
    )
    for words in spoken:
        for target in words.split():
            if target not in targets:
                yield f"make {target}: no such target"


def options() -> dict[str, set[str]]:
    """Every verb of the command line -> its flags."""
    import typer.main

    from blip3o_fast.cli import app

    group = typer.main.get_command(app)
    return {
        name: {o for p in command.params for o in p.opts + p.secondary_opts} for name, command in group.commands.items()
    }  # type: ignore[attr-defined]


def unknown_commands(path: Path, known: dict[str, set[str]]) -> Iterator[str]:
    """`blip3o-fast VERB --flag` in backticks and in shell blocks."""
    text = path.read_text().replace("\\\n", " ")
    lines = re.findall(r"`(blip3o-fast [^`]+)`", text) + re.findall(r"^(?:\$ )?(blip3o-fast .+)$", text, re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        verb = words[0]
        if verb.startswith("-") or verb == "VERB":
            continue
        if verb not in known:
            yield f"{line}: no verb {verb}"
            continue
        for word in words[1:]:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag != "--help" and "--" + flag[2:].replace("-", "_") not in known[verb]:
                yield f"{line}: {verb} has no flag {flag}"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def broken_blocks(path: Path) -> Iterator[str]:
    for block in python_blocks(path):
        try:
            ast.parse(block)
        except SyntaxError as error:
            yield f"Python block: {error}"


def placeholders(path: Path) -> Iterator[str]:
    for line in re.findall(r"<<MEASURE[^>]*>>", path.read_text()):
        yield f"a number is missing: {line}"


def problems() -> list[str]:
    known = options()
    found = []
    for path in documents():
        for check in (broken_links, missing_paths, unknown_names, unknown_targets, broken_blocks, placeholders):
            found += [f"{path.relative_to(ROOT)}: {problem}" for problem in check(path)]
        found += [f"{path.relative_to(ROOT)}: {problem}" for problem in unknown_commands(path, known)]
    return found


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or f"{len(documents())} documents: every link, path, command and Python block is good")
    sys.exit(1 if found else 0)
