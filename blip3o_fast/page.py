"""The pieces of a report: one self-contained HTML page that reads well on a light and on a dark screen.

Every function returns HTML text and escapes what it is given.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --page: #f6f7f9; --card: #ffffff; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b0; --page: #14171a; --card: #1e2328; --line: #343b42; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0 0 4px; font-size: 30px; } h2 { margin: 0 0 6px; font-size: 20px; }
p { color: var(--soft); margin: 0 0 12px; max-width: 78ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(175px, 1fr)); gap: 12px; margin: 20px 0; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.tile b { display: block; font-size: 28px; } .tile span { color: var(--soft); font-size: 13px; display: block; }
section { margin: 16px 0; overflow-x: auto; } img { max-width: 100%; height: auto; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 9px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th.row, .facts td, .words td, .words th { text-align: left; }
th small, td small { display: block; font-weight: 400; color: var(--soft); max-width: 30ch; }
td.best { font-weight: 700; } code { font-size: 13px; } pre { white-space: pre-wrap; margin: 0; }
"""


def page(title: str, heading: str, introduction: str, *parts: str) -> str:
    """The whole document around its parts."""
    return "".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>{escape(heading)}</h1><p>{escape(introduction)}</p>",
            *parts,
            "</main></body></html>",
        ]
    )


def tiles(lines: Sequence[tuple[str, str, str]]) -> str:
    """The numbers that matter: (name, value, what it means)."""
    made = "".join(
        f"<div class='tile'><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(meaning)}</span></div>"
        for name, value, meaning in lines
    )
    return f"<div class='tiles'>{made}</div>"


def section(title: str, sentence: str, body: str) -> str:
    """A card. body: HTML of the functions here."""
    told = f"<p>{escape(sentence)}</p>" if sentence else ""
    return f"<section><h2>{escape(title)}</h2>{told}{body}</section>"


def picture(title: str, sentence: str, png: bytes) -> str:
    """A card with a figure inside the page."""
    data = base64.b64encode(png).decode()
    return section(title, sentence, f"<img alt='{escape(title)}' src='data:image/png;base64,{data}'>")


def facts(title: str, rows: Mapping[str, str]) -> str:
    """A card with a table of names and texts; nothing where there are no rows."""
    body = "".join(f"<tr><th class='row'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return section(title, "", f"<table class='facts'>{body}</table>") if rows else ""


def metric_table(
    metrics: Mapping[str, float], names: Mapping[str, tuple[str, str, bool]], systems: Mapping[str, str]
) -> str:
    """A row per metric, a column per system, the best of a row in bold, chance at the end.

    metrics: ``<metric><suffix>`` and ``<metric>_chance`` -> value. names: metric -> (title, what it says, whether
    higher is better). systems: title of a column -> suffix.
    """
    lines = []
    for key, (name, meaning, higher) in names.items():
        values = {suffix: metrics[key + suffix] for suffix in systems.values() if key + suffix in metrics}
        if not values:
            continue
        best = (max if higher else min)(values.values())
        cells = "".join(
            f"<td class='{'best' if values.get(s) == best else ''}'>{_number(values.get(s))}</td>"
            for s in systems.values()
        )
        chance = f"{metrics[key + '_chance']:.4f}" if key + "_chance" in metrics else ""
        arrow = "higher is better" if higher else "lower is better"
        lines.append(
            f"<tr><th class='row'>{escape(name)}<small>{escape(meaning)}; {arrow}</small></th>{cells}"
            f"<td>{chance}</td></tr>"
        )
    head = "".join(f"<th>{escape(title)}</th>" for title in systems)
    return f"<table><tr><th></th>{head}<th>chance</th></tr>{''.join(lines)}</table>"


def _number(value: float | None) -> str:
    """Three places after the point, of small ones three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.05 else f"{value:.3g}"
