"""The demo's report: one self-contained HTML page. Each number and figure says what it is and whether it is good."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blip3o_fast import page

# How metrics.json names a metric of each system: the generated embeddings carry no suffix.
SYSTEMS = {
    "generated, guided": "",
    "ridge regression": "_ridge",
    "mean embedding": "_mean_embedding",
    "shuffled condition": "_shuffled_condition",
    "no condition": "_unconditional",
}
METRICS = {
    "recall_at_1": ("recall@1", "share of held-out pictures whose own target is nearest to what was generated", True),
    "recall_at_5": ("recall@5", "the same among the five nearest", True),
    "token_cosine": ("token cosine", "cosine of each generated token with the true one, mean over 64 tokens", True),
    "centred_cosine": ("centred cosine", "the same after subtracting the mean training token from both", True),
    "l2_distance": ("L2 distance", "Euclidean distance between generated and true tokens", False),
    "frechet_distance": ("Fréchet distance", "between the two embedding sets as Gaussians: do they look alike?", False),
}  # fmt: skip


@dataclass
class Report:
    """What the page shows; figures are PNG bytes."""

    metrics: Mapping[str, float]
    facts: Mapping[str, str]
    figures: dict[str, bytes] = field(default_factory=dict)
    commands: Sequence[str] = ()
    stages: Mapping[str, float] = field(default_factory=dict)

    def system(self, metric: str) -> dict[str, float]:
        """The metric for every system that has it."""
        values = {name: self.metrics.get(metric + suffix) for name, suffix in SYSTEMS.items()}
        return {name: value for name, value in values.items() if value is not None}


def headline(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The five numbers that matter: (name, value, what it means)."""
    recall, chance = metrics["recall_at_1"], metrics["recall_at_1_chance"]
    return [
        ("recall@1", f"{recall:.1%}", f"{recall / chance:.0f} times chance ({chance:.2%})"),
        (
            "token cosine",
            f"{metrics['token_cosine']:.3f}",
            f"mean embedding {metrics['token_cosine_mean_embedding']:.3f}, ridge {metrics['token_cosine_ridge']:.3f}",
        ),
        (
            "shuffled condition",
            f"{metrics['token_cosine_shuffled_condition']:.3f}",
            "token cosine when judged against another picture: should be far below the line above",
        ),
        (
            "difference to diffusers",
            f"{metrics['max_abs_vs_diffusers']:.1e}",
            "largest absolute difference of samples, same weights and noise (allowed: 1e-4)",
        ),
        (
            "speed against diffusers",
            f"{metrics['speedup_vs_diffusers']:.2f}x",
            "sampling time of stock diffusers / ours, interleaved in one run on this machine",
        ),
    ]


def _recall_sentence(report: Report) -> str:
    recall, chance = report.metrics["recall_at_1"], report.metrics["recall_at_1_chance"]
    ratio = recall / chance
    # Of few pictures even finding all is less than 30 times chance.
    verdict = "good" if recall >= min(30 * chance, 0.9) else "too low: the model hardly uses its condition"
    best = max((v, n) for n, v in report.system("recall_at_1").items() if not n.startswith("generated"))
    return (
        f"How often the generated embedding finds its own picture among the held-out ones. Chance gives {chance:.4f}, "
        f"the best baseline ({best[1]}) {best[0]:.3f}, the model {recall:.3f}, {ratio:.0f} times chance: {verdict}. "
        "Ridge regression predicts one best guess and is strong here; a generative model draws samples, so it can stay "
        "below it and still be right."
    )


def _cosine_sentence(report: Report) -> str:
    value = report.metrics["token_cosine"]
    mean, shuffled = report.metrics["token_cosine_mean_embedding"], report.metrics["token_cosine_shuffled_condition"]
    verdict = "good" if value > mean and value > shuffled else "not good: it should beat both"
    return (
        f"How close each generated token is to the true one. Always answering the mean embedding gives {mean:.3f} and "
        f"the wrong picture's condition {shuffled:.3f}; the model reaches {value:.3f}: {verdict}. The target was "
        "compressed by PCA for this small model, so not even perfect samples would reach 1."
    )


def _loss_sentence(report: Report) -> str:
    ratio = report.metrics.get("loss_over_linear")
    told = "" if ratio is None else f" At the end the held-out loss is {ratio:.2f} times the best linear velocity's."
    verdict = "" if ratio is None else (" Below 1 is good: the network does what no linear map can." if ratio < 1
               else " At or above 1 the network has not yet beaten a linear map: train longer.")  # fmt: skip
    return (
        "Training loss, and the held-out loss at fixed noise. The lines tell whether a loss is normal: what predicting "
        "zero, the mean, and the best linear velocity would reach. A flow-matching loss never goes to 0: the noise "
        f"cannot be known.{told}{verdict}"
    )


_BUCKETS = (
    "The held-out loss by noise level. The condition helps most at high sigma, where x_t says little of the picture; "
    "below the linear bar is good, and bars near 1 at low sigma only say that fine detail is hard to predict."
)
_SHEET = (
    "Held-out pictures, searched among the held-out ones. Left the condition (blue), then the picture whose true "
    "embedding is nearest to its own, then the four whose embeddings are nearest to what the model generated; a green "
    "frame is the very picture. Chance would show unrelated pictures in every row; green first, as often as recall@1 "
    "says, and kindred pictures after it is good."
)


def _figure(report: Report, name: str, title: str, sentence: str) -> str:
    return page.picture(title, sentence, report.figures[name]) if name in report.figures else ""


def render(report: Report) -> str:
    """The page as HTML text, with every figure inside it."""
    commands = html.escape("\n".join(report.commands))
    return page.page(
        "blip3o_fast demo",
        "blip3o_fast demo",
        "Real pictures became embeddings of two different pretrained networks; a small BLIP3-o diffusion transformer "
        "learned to generate one network's embedding from the other's; here is how well it does on pictures that it "
        "never saw.",
        page.tiles(headline(report.metrics)),
        _figure(report, "sheet", "What the samples mean", _SHEET),
        _figure(report, "loss", "Is the loss normal?", _loss_sentence(report)),
        _figure(report, "recall", "Does it find the right picture?", _recall_sentence(report)),
        _figure(report, "cosine", "How close are the tokens?", _cosine_sentence(report)),
        _figure(report, "buckets", "Where is the loss?", _BUCKETS),
        page.section(
            "Every metric, every baseline",
            "Held-out pictures only; bold: best of its row.",
            page.metric_table(report.metrics, METRICS, SYSTEMS),
        ),
        page.facts("This run", report.facts),
        page.facts("Time", {name: f"{seconds:.0f} s" for name, seconds in report.stages.items()}),
        page.section("The commands behind it", "", f"<pre><code>{commands}</code></pre>"),
    )
