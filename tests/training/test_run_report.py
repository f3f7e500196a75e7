"""A finished run's report is one page with everything in it, and says what is not good."""

import re

import pytest

from blip3o_fast.page import metric_table
from blip3o_fast.training.report import Neighbours, render, write_report
from blip3o_fast.training.validation import levels

LINES = ("zero", "mean", "linear_unconditional", "linear_conditional")
RUN = {
    "steps": 40, "effective_batch": 8, "world_size": 2, "versions": {"torch": "2.13"}, "data": {"train": 40},
    "settings": {"num_inference_steps": 20, "guidance_scale": 2.0, "eval_generation_samples": 16, "preset": None,
                 "output_dir": "<run>", "embeddings_path": "there"},
    "yardstick": {name: {"overall": 2 - k / 2, "per_bucket": [2 - k / 2] * 15} for k, name in enumerate(LINES)},
}  # fmt: skip


def entries(ratio=0.9, **changes):
    train = [
        {"step": s, "loss": 1.5 - s / 100, "cosine_similarity": 0.5, "pred_norm": 2.0, "target_norm": 3.0,
         "grad_norm": 1.0, "learning_rate": 1e-3, "samples_per_second": 100.0 + s, "mfu": 0.4, "data_wait": 0.01,
         "memory_gb": 1.5, "seconds": 6.0 * s}
        for s in (1, 10, 20, 30, 40)
    ]  # fmt: skip
    quality = {f"eval_recall_at_{k}": 0.5 for k in (1, 5, 10)} | {"eval_recall_at_1_chance": 0.0625}
    quality |= {"eval_token_cosine": 0.45, "eval_token_cosine_ridge": 0.53, "eval_token_cosine_mean_embedding": 0.33}
    quality |= {"eval_frechet_distance": 0.0123, "eval_frechet_distance_ridge": 2.0}
    loss = {"eval_loss": 0.8, "eval_loss_over_linear": ratio} | {f"eval_loss_sigma_{s:.2f}": 0.8 for s in levels()}
    return [*train, *({"step": s, **loss, **quality} | changes for s in (20, 40))]


def text_of(page):
    return re.sub(r"<[^>]+>", " ", re.sub(r"base64,[^']+", "", page))


@pytest.fixture
def shown(tmp_path):
    from blip3o_fast.training.plots import plot_loss

    plot_loss(entries(), tmp_path / "loss.png", yardstick=RUN["yardstick"])
    near = [Neighbours("a <frog>", [("a <frog>", 0.98, True), ("a toad", 0.7, False)])]
    path = write_report(tmp_path, entries(), RUN, near)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    return path.read_text()


def test_the_page_is_self_contained_escaped_and_whole(shown):
    assert not re.search(r"(src|href)=['\"](?!data:)", shown)
    assert shown.count("data:image/png;base64,") == 4
    assert "prefers-color-scheme: dark" in shown
    assert "a &lt;frog&gt;" in shown and "&lt;run&gt;" in shown and "<frog>" not in shown
    text = text_of(shown)
    for told in (
        "loss / linear 0.90", "recall@1 50.0% chance 6.2%", "token cosine 0.450 ridge 0.530, mean embedding 0.330",
        "samples per second 130 median; 1.50 GB of memory at most; MFU 40%", "time 4.0 min", "40 steps of 8 samples",
        "At the end it is 0.90 times the best linear velocity's: good", "guidance 2 from fixed noise", "0.0123",
        "num_inference_steps 20", "processes 2", "cpu",
    ):  # fmt: skip
        assert told in re.sub(r"\s+", " ", text).replace("&#x27;", "'"), told
    assert "preset" not in text  # what was left to the default of another setting


def test_a_run_above_the_linear_line_is_told_so(tmp_path):
    text = text_of(render_with_loss(tmp_path, entries(ratio=1.31)))
    assert "at step 40, after the warm-up, the held-out loss is 1.31 times that of the best linear" in text


def render_with_loss(folder, given):
    (folder / "loss.png").write_bytes(b"png")
    return render(folder, given, RUN, [])


def test_a_run_without_held_out_pictures_has_a_report_too(tmp_path):
    trained = [entry | {"loss_over_linear": 0.95} for entry in entries() if "loss" in entry]
    page = render_with_loss(tmp_path, trained)
    assert "Where is the loss?" not in page and "How good are the samples?" not in page
    assert "At the end it is 0.95 times" in page
    # Evaluations without samples: the levels, no table.
    bare = [{k: v for k, v in entry.items() if "eval_loss" in k or "eval" not in k} for entry in entries()]
    page = render_with_loss(tmp_path, bare)
    assert "Where is the loss?" in page and "How good are the samples?" not in page


def test_the_best_of_a_row_is_bold_whichever_way_is_better():
    metrics = {"up": 0.5, "up_b": 0.7, "down": 0.5, "down_b": 0.7, "up_chance": 0.1}
    names = {"up": ("up", "it rises", True), "down": ("down", "it falls", False), "none": ("none", "", True)}
    table = metric_table(metrics, names, {"a": "", "b": "_b"})
    assert re.findall(r"<td class='best'>([^<]*)</td>", table) == ["0.700", "0.500"]
    assert "none" not in table and "0.1000" in table
