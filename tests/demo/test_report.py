"""The report is one file, says what each number means, and judges by the numbers that it is given."""

import re

import pytest
from PIL import Image

from blip3o_fast.demo import plots
from blip3o_fast.demo.report import METRICS, Report, headline, render

METRIC_VALUES = {
    "recall_at_1": 0.62, "recall_at_1_chance": 0.0127, "recall_at_1_ridge": 0.93, "recall_at_1_mean_embedding": 0.0127,
    "token_cosine": 0.45, "token_cosine_mean_embedding": 0.33, "token_cosine_ridge": 0.53,
    "token_cosine_shuffled_condition": 0.21, "l2_distance": 3.0, "l2_distance_ridge": 2.0,
    "max_abs_vs_diffusers": 3e-6, "speedup_vs_diffusers": 1.25, "loss_over_linear": 0.9,
}  # fmt: skip


def page(**changes):
    return render(Report(METRIC_VALUES | changes, facts={"CPU": "<two> cores"}, commands=["blip3o-fast demo"]))


def test_headline_has_five_numbers_with_their_comparison():
    lines = headline(METRIC_VALUES)
    assert [name for name, _, _ in lines] == [
        "recall@1", "token cosine", "shuffled condition", "difference to diffusers", "speed against diffusers"
    ]  # fmt: skip
    assert lines[0][1:] == ("62.0%", "49 times chance (1.27%)")
    assert lines[4][1] == "1.25x"


def test_page_is_self_contained_and_escaped():
    text = page()
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    assert "&lt;two&gt; cores" in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "0.93"), ({"l2_distance": 1.0}, "1.000")],
)
def test_the_best_of_a_row_is_bold(changes, expected):
    bold = re.findall(r"<td class='best'>([^<]*)", page(**changes))
    assert any(value.startswith(expected) for value in bold)
    assert len(bold) == 3  # one per metric that is there: lower is better for the distance


def test_sentences_follow_the_numbers():
    sheet = Report(METRIC_VALUES, {}, figures=dict.fromkeys(("recall", "cosine", "loss"), b""))
    assert "49 times chance: good" in render(sheet)
    assert "Below 1 is good" in render(sheet)
    few = METRIC_VALUES | {"recall_at_1": 1.0, "recall_at_1_chance": 1 / 3}
    assert "3 times chance: good" in render(Report(few, {}, figures=sheet.figures))
    bad = METRIC_VALUES | {"recall_at_1": 0.02, "token_cosine": 0.3, "loss_over_linear": 1.1}
    text = render(Report(bad, {}, figures=sheet.figures))
    assert "too low" in text and "it should beat both" in text and "train longer" in text


def test_every_metric_says_what_it_is():
    for name, meaning, _ in METRICS.values():
        assert name and len(meaning) > 20


def test_figures_are_pictures(tmp_path):
    red = Image.new("RGB", (40, 30), "red")
    row = {"condition": red, "caption": "A frog.", "neighbour": red, "generated": [(red, True), (red, False)]}
    figures = [
        plots.sigma_levels([0.25, 0.75], [0.4, 0.6], [0.5, 0.7]),
        plots.metric_bars({"model": 0.5, "ridge": 0.6}, chance=0.01, unit="recall@1", highlight="model"),
        plots.retrieval_sheet([row, row]),
    ]
    for png in figures:
        path = tmp_path / "figure.png"
        path.write_bytes(png)
        with Image.open(path) as picture:
            picture.verify()
            assert picture.format == "PNG" and picture.size[0] > 300
