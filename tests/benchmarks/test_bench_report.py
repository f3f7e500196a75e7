"""The report of a result file, its figures, the live table, and the README's table from its file."""

import base64
import io
import json
import re
import struct
import sys
from pathlib import Path

import pytest

from benchmarks import breakdown, live, plots, readme_table, report, rows, style, table
from benchmarks.cpu_goals import IN_A_BLOCK

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "amd-epyc-2t" / "2026-11-25-bd2527ba2f.jsonl"
MACHINE = {
    "cpu": {"model": "Example <CPU>", "flags": ["avx2"]}, "affinity": None, "logical_cores": 2, "threads": 2,
    "cache_bytes": 1 << 20, "versions": {"torch": "2"}, "commit": "abc", "dirty": False, "isa": "avx2",
    "load_average_at_start": 0.1,
}  # fmt: skip
LIMITS = {
    "copy_gbps": 50.0, "copy_probes": 20, "copy_bytes": 2e8, "fma_gflops": 200.0, "fma_gflops_one_core": None,
    "fma_probes": 20, "fma_probe": "test", "bf16_gflops": None,
}  # fmt: skip


def row(suite="swiglu", provider="ours", mode="forward", status="ok", median=1e-3, speedup=2.0, flops=10**6, **case):
    ok = status == "ok"
    return {
        "suite": suite, "case": {"batch": 1, "dtype": "float32", **case}, "mode": mode, "provider": provider,
        "detail": None, "status": status, "reason": None if ok else "broke <here>", "errors": {"y": 1e-7},
        "inexact": None, "bytes": 10**6, "flops": flops, "median_s": median if ok else None,
        "p20_s": 0.9 * median, "p80_s": 1.1 * median, "speedup": speedup if ok else None,
        "speedup_p20": 0.9 * speedup, "speedup_p80": 1.1 * speedup, "gbps": 1.0, "gflops": flops / median * 1e-9,
        "rounds": 3, "calls": 1,
    }  # fmt: skip


def pair(**changes):
    return [row(provider="eager", speedup=1.0, median=2e-3, **changes), row(**changes)]


def written(path: Path, *runs: tuple[str, dict, list[dict], dict]) -> Path:
    for name, machine, made, limits in runs:
        writer = rows.Writer(path, run=name)
        writer.append("machine", machine)
        for each in made:
            writer.append("time", each)
        if limits:
            writer.append("ceilings", limits)
    return path


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_its_runs_and_one_is_chosen_by_name_or_instruction_set(tmp_path):
    path = written(
        tmp_path / "two.jsonl", ("r1", MACHINE, pair(), LIMITS), ("r2", MACHINE | {"isa": "avx512"}, pair()[:1], {})
    )
    first, second = rows.recorded(path)
    assert (len(first.rows), first.limits["copy_gbps"], len(second.rows), second.limits) == (2, 50.0, 1, {})
    assert rows.choose(path).name == "r2" and rows.choose(path, isa="avx2").name == "r1"
    assert rows.choose(path, run="r1").name == "r1"
    with pytest.raises(ValueError, match=r"no run with isa 'neon'; there are: r1 \(isa avx2\), r2 \(isa avx512\)"):
        rows.choose(path, isa="neon")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 2, "kind": "time"}', "line 1: row of schema 2, this version reads schema 1"),
        ('{"schema": 1, "kind": "time", "run": "x"}', "a row of run x stands before that run's machine"),
        ("", "holds no run"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(line, message, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n" if line else "")
    with pytest.raises(SystemExit) as error:
        report.main([str(path), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert error.value.code == 2 and "other.jsonl" in told and message in told
    assert not (tmp_path / "out").exists()


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert report.main([str(COMMITTED), "--isa", "avx512_bf16", "--output", str(folder)]) == 0
    return folder


def test_the_page_of_the_committed_run_holds_every_figure_and_needs_no_network(page):
    text = (page / "report.html").read_text()
    names = {path.stem for path in page.glob("*.png")}
    kinds = {f"speedup-{what}-{dtype}" for what in ("op", "model", "product") for dtype in ("float32", "bfloat16")}
    assert names == {"roofline", "breakdown", "scaling", "memory", *kinds}
    embedded = {base64.b64decode(data) for data in re.findall(r"src='data:image/png;base64,([^']+)'", text)}
    assert embedded == {path.read_bytes() for path in page.glob("*.png")}
    for data in embedded:
        width, height = size_of(data)
        assert 400 < width < 2400 and 250 < height < 2400
    outside = text.replace("data:image/png", "")
    assert not re.search(r"https?://|<script|<link|url\(|@import", outside)
    run = rows.choose(COMMITTED, isa="avx512_bf16")
    assert table.verdict(run.rows)[1] in text and run.name in text and "AMD EPYC" in text
    assert text.count("<tr class=") == len(run.rows)
    assert not list(page.glob(".*"))  # nothing half written


def test_a_failed_row_is_red_and_text_is_escaped(tmp_path):
    path = written(tmp_path / "r.jsonl", ("r", MACHINE, [*pair(), row(provider="peer", status="FAILED")], LIMITS))
    made = report.make(rows.choose(path), path)
    text = report.render(made)
    assert "<p class='bad'>1 of 3 rows are wrong or broken</p>" in text
    assert "broke &lt;here&gt;" in text and "Example &lt;CPU&gt;" in text and "<here>" not in text
    assert set(made.figures) == {"speedup-op-float32", "roofline"}
    assert set(made.left_out) == {"breakdown", "scaling", "memory"}
    for name, why in made.left_out.items():
        assert f"<li>{name}: {why}</li>" in text


def test_a_run_that_was_cut_short_says_so_and_has_no_roofline(tmp_path):
    path = written(tmp_path / "r.jsonl", ("r", MACHINE, pair(), {}))
    made = report.make(rows.choose(path), path)
    assert "no ceilings" in made.left_out["roofline"]
    assert "This run was cut short" in report.render(made)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    path = written(tmp_path / "r.jsonl", ("r", MACHINE, pair(), LIMITS))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(path)]) == 2
    assert 'the figures need matplotlib: pip install -e ".[bench]"' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


# ---- the figures ---------------------------------------------------------------------------------------------------


def block_rows(faster: float = 3.0):
    """A block whose parts are known: 4 products of 2 ms, each op call 0.1 ms, and as many FLOPs as one more product."""
    made = []
    for provider, scale in (("eager", 1.0), ("fp32", 1 / faster)):
        for product in breakdown.NAMES_OF_PRODUCTS:
            case = {"rows": 64, "product": product, "batch": None}
            made.append(row("packed_linear", provider, median=2e-3 * scale, flops=10**9, **case))
        made.append(row("cpu_block", provider, median=11e-3 * scale, flops=5 * 10**9 + 7 * 10**6))
        for op in (*IN_A_BLOCK, "swiglu"):
            made.append(row(op, "eager" if provider == "eager" else "ours", median=1e-4 * scale))
    return made


def test_the_parts_of_a_block_add_up_and_what_is_estimated_follows_from_flops():
    (found,) = breakdown.bars(block_rows()).values()
    eager, ours = found
    assert eager.whole == pytest.approx(11) and ours.whole == pytest.approx(11 / 3)
    calls = sum(IN_A_BLOCK.values())
    assert eager.parts[breakdown.OTHER] == pytest.approx(2.0, rel=1e-3)
    assert ours.parts[breakdown.OTHER] == pytest.approx(2.0 / 3, rel=5e-3)
    assert eager.parts["rms_norm_modulate"] == pytest.approx(2 * 0.1)
    assert "swiglu" in eager.parts and "swiglu" not in ours.parts  # part of a product there
    assert sum(eager.parts.values()) == pytest.approx(4 * 2 + 2 + 0.1 * (calls + 1), rel=1e-3)
    incomplete = [r for r in block_rows() if r["suite"] != "qk_norm_rope"]
    with pytest.raises(plots.Missing, match="--set cpu"):
        breakdown.breakdown(incomplete)


def test_bars_show_the_right_numbers(monkeypatch):
    """Through the axes that were drawn: lengths, spread, order and the column beside them."""
    made = []
    monkeypatch.setattr(plots, "png", made.append)
    plots.speedups([*pair(), row(provider="peer", status="FAILED"), *pair(batch=4, mode="both")], "float32", "op")
    forward, both = made[0].axes
    (bar,) = forward.patches
    assert bar.get_x() == 1 and bar.get_width() == pytest.approx(1.0)  # from 1 to 2
    spread = next(line for line in forward.lines if len(set(line.get_ydata())) == 1)
    assert list(spread.get_xdata()) == pytest.approx([1.8, 2.2])
    texts = [text.get_text().split() for text in forward.texts]
    assert texts == [["median", "error", "correct"], ["2.00", "1e-07", "ok"], ["1e-07", "FAILED:", "peer"]]
    assert both.get_title() == "forward + backward" and len(both.patches) == 1


def test_scaling_is_per_item_and_memory_reads_what_rows_say(monkeypatch):
    made = []
    monkeypatch.setattr(plots, "png", made.append)
    plots.scaling([*pair(), *[r | {"median_s": 2 * r["median_s"]} for r in pair(batch=4)]])
    ours = made[0].axes[0].lines[1]
    assert list(ours.get_xdata()) == [1, 4] and list(ours.get_ydata()) == pytest.approx([1.0, 0.5])
    sizes = [*pair(suite="model_forward", size="a"), *pair(suite="model_forward", size="b", batch=4)]
    with pytest.raises(plots.Missing):  # two batches, but not of the same work
        plots.scaling(sizes)
    assert plots.megabytes(row() | {"detail": "saves 11.6 MB"}) == ("saved", 11.6)
    assert plots.megabytes(row() | {"detail": "cpu, peak 1.5 GB"}) == ("peak", 1500)
    assert plots.megabytes(row() | {"peak_bytes": 3_000_000}) == ("peak", 3)
    assert plots.megabytes(row() | {"detail": "cpu"}) is None


def test_every_provider_has_a_look_of_its_own_without_colour():
    """As many strangers as a run is likely to bring; a hatch tells the bars of a figure apart."""
    known = style.looks(style.KNOWN)
    assert len({marker for _, _, marker in known.values()}) == len(known)
    assert len({(color, hatch) for color, hatch, _ in known.values()}) == len(known)
    strangers = style.looks(["eager", "ours", *(f"peer{i}" for i in range(6))])
    assert len(set(strangers.values())) == len(strangers)
    assert len(set(plots._shapes(16))) == 16


def test_a_mode_or_suite_that_the_figures_do_not_know_is_drawn_all_the_same(monkeypatch):
    made = []
    monkeypatch.setattr(plots, "png", made.append)
    given = [row("data", "plain", "whole", speedup=1.0, dtype=None), row("data", "reader", "whole", dtype=None)]
    plots.speedups(given, "None", "other")
    (axes,) = made[0].axes
    assert axes.get_title() == "whole" and axes.get_xlabel().startswith("times faster than the first provider")


# ---- the live table ------------------------------------------------------------------------------------------------


def test_the_live_table_shows_the_newest_rows_that_fit(monkeypatch):
    import rich.console

    console = rich.console.Console(width=140, height=12, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(rich.console, "Console", lambda: console)
    shown = live.Live()
    try:
        for batch in range(1, 9):
            shown.add([row(batch=batch), row(batch=batch, provider="peer", status="FAILED")])
        shown.progress("swiglu: in turns")
    finally:
        shown.close()
    with console.capture() as captured:
        console.print(shown.renderable())
    text = captured.get()
    assert "batch=8" in text and "FAILED" in text and "in turns" in text and "batch=1 " not in text
    assert "12 rows above" in text  # of 16, in 4 lines
    assert len(text.splitlines()) <= 12
    assert shown.live.auto_refresh is False  # no thread beside what is timed


def test_there_is_no_live_table_without_a_terminal(capsys):
    assert live.watch() is None


# ---- the README's table --------------------------------------------------------------------------------------------


def test_the_readmes_table_is_what_its_file_says(capsys):
    assert readme_table.main(["--check"]) == 0, "make readme-table"


def test_a_table_that_was_edited_is_found_and_made_again(tmp_path, capsys):
    original = (ROOT / "README.md").read_text()
    copy = tmp_path / "README.md"
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    shown = re.search(r"\| \d\.\d\d \|", original[original.index("<!-- table") :])
    copy.write_text(original.replace(shown[0], "| 99.9 |", 1))
    assert readme_table.main(["--check"], copy) == 1
    assert readme_table.main([], copy) == 0
    assert copy.read_text() == original
    assert readme_table.main(["--isa", "avx2"], copy) == 0  # another run: what failed there has a word, not a time
    assert "| FAILED |" in copy.read_text() and "isa=avx2 -->" in copy.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no table here", "no table between"),
        ("<!-- table: nowhere.jsonl isa=avx2 -->\n<!-- end of table -->", "nowhere.jsonl"),
        ("<!-- table: dirty.jsonl isa=avx2 -->\n<!-- end of table -->", "had uncommitted changes"),
    ],
)
def test_a_table_that_cannot_be_made_changes_nothing(text, message, tmp_path, capsys):
    written(tmp_path / "dirty.jsonl", ("r", MACHINE | {"dirty": True}, pair(), LIMITS))
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(SystemExit) as error:
        readme_table.main([], tmp_path / "README.md")
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_committed_results_are_of_this_schema():
    for path in (ROOT / "benchmarks" / "results").rglob("*.jsonl"):
        for run in rows.recorded(path):
            assert json.dumps(run.machine) and run.rows
