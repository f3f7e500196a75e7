"""The whole job on real pictures: fetch, extract, train, sample, judge, compare with stock diffusers, report.

Every stage is one verb of the command line that a user would type, run in the same way; this module only strings them
together, remembers what is done, and draws the report.
"""

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from blip3o_fast import __version__
from blip3o_fast.data.images import find_sources
from blip3o_fast.demo import fetch, plots
from blip3o_fast.demo.gallery import directions, find_pictures, nearest
from blip3o_fast.demo.report import Report, headline, render
from blip3o_fast.demo.stages import Stages, write_text
from blip3o_fast.demo.try_pictures import example_command

STAGES = ("pictures", "extract", "train", "sample", "compare", "report")
# (condition, target) encoders by what `--encoders` says.
ENCODERS = {
    "efficientnet": ("efficientnet-lite0", "efficientnet-lite2"),
    "clip": ("eva02-clip-b-16", "clip-vit-b-32"),
    "full": ("eva-clip-8b", "clip-vit-l-14"),
}
GUIDANCE, NUM_STEPS = 2.0, 30
# How many held-out pictures stock diffusers and ours sample against the clock.
COMPARED = 8
REFERENCE_CURVE = Path(__file__).resolve().parents[2] / "docs" / "curves" / "demo.jsonl"


@dataclass(frozen=True)
class DemoSettings:
    """images: "" fetches captioned pictures, else a folder with at least 32; encoders: a key of ENCODERS.

    trust_remote_code and the revisions go to `extract`.
    """

    output_dir: Path = Path("runs/demo")
    images: str = ""
    encoders: str = "efficientnet"
    train_steps: int = 500
    seed: int = 0
    trust_remote_code: bool = False
    condition_revision: str | None = None
    target_revision: str | None = None

    def __post_init__(self) -> None:
        if self.encoders not in ENCODERS:
            raise ValueError(f"encoders must be one of {', '.join(ENCODERS)}, got {self.encoders!r}")
        if self.images and not Path(self.images).is_dir():
            raise ValueError(f"images must be a folder of pictures, got {self.images!r}, which is not a folder")
        if self.train_steps < 1:
            raise ValueError(f"train_steps must be at least 1, got {self.train_steps}")


def run_demo(settings: DemoSettings) -> dict[str, float]:
    """Run what is not done yet, print the five numbers that matter and return all of metrics.json."""
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder, STAGES)
    pictures, tars, embeddings = folder / "pictures", folder / "tars", folder / "embeddings"
    model, samples, metrics_file = folder / "model", folder / "samples.safetensors", folder / "metrics.json"

    chosen = [source.fingerprint for source in find_sources(settings.images)] if settings.images else []
    stages.run(
        "pictures", "Pictures with captions, as webdataset tars", {"images": settings.images, "files": chosen}, [tars],
        lambda: _pictures_of(settings, pictures, tars),
    )  # fmt: skip
    condition, target = ENCODERS[settings.encoders]
    encoders = ["--condition_encoder", condition, "--target_encoder", target, *_hub_flags(settings)]
    extract = stages.note("extract", "--images", tars, "--output_dir", embeddings, *encoders)
    stages.run(
        "extract", f"Features of two networks: {condition} -> {target}", {"command": extract},
        [embeddings], lambda: stages.command(*extract),
    )  # fmt: skip
    train = stages.note("train", *_train_flags(settings, embeddings, model))
    stages.run(
        "train", f"A small BLIP3-o DiT, {settings.train_steps} steps", {"command": train},
        [model], lambda: stages.command(*train),
    )  # fmt: skip
    # All of it is said, as in `compare_with_stock`: a sampler.json that the user had made since changes nothing.
    sampling = ["--embeddings_path", embeddings, "--guidance_scale", GUIDANCE, "--num_steps", NUM_STEPS]
    sampling += ["--solver", "euler", "--guidance_start", 1, "--guidance_end", 0]
    sample = stages.note("sample", "--model", model, *sampling, "--split", "eval", "--output", samples)
    judge = stages.note(
        "evaluate", "--model", model, *sampling, "--samples", samples, "--output", folder / "evaluation.json"
    )

    def sample_and_judge() -> None:
        stages.command(*sample)
        stages.command(*judge)

    stages.run(
        "sample", "Samples for the held-out pictures, and their judgement", {"commands": [sample, judge]},
        [samples, folder / "evaluation.json"], sample_and_judge,
    )  # fmt: skip
    stages.run(
        "compare", "The same weights through stock diffusers", {"pictures": COMPARED, "steps": NUM_STEPS},
        [folder / "comparison.json"],
        lambda: write_text(folder / "comparison.json", json.dumps(compare_with_stock(model, embeddings), indent=1)),
    )  # fmt: skip

    def report() -> None:
        metrics = _read(folder / "evaluation.json") | _read(folder / "comparison.json")
        metrics |= {k.removeprefix("eval_"): v for k, v in _last_evaluation(model).items() if "over_linear" in k}
        write_text(metrics_file, json.dumps(metrics, indent=1, sort_keys=True))
        commands = [*stages.commands, example_command(folder, settings.images)]
        page = Report(metrics, _facts(settings, metrics), _figures(folder, metrics), commands, stages.seconds)
        for name, png in page.figures.items():
            (folder / f"{name}.png").write_bytes(png)
        write_text(folder / "report.html", render(page))

    stages.run("report", "Report", {"version": __version__}, [folder / "report.html", metrics_file], report)
    metrics = _read(metrics_file)
    typer.echo("")
    for name, value, meaning in headline(metrics):
        typer.echo(f"  {name:24}{value:>9}   {meaning}")
    typer.echo(f"\nreport: {(folder / 'report.html').resolve()}")
    typer.echo(f"try it: {example_command(folder, settings.images)}")
    return metrics


def _pictures_of(settings: DemoSettings, cache: Path, tars: Path) -> None:
    count = fetch.pictures_to_tars(settings.images, cache, tars)
    typer.echo(f"      {count} pictures in {tars}")


def _hub_flags(settings: DemoSettings) -> list[str]:
    """What encoders of the hub that bring code of their own need to be told."""
    flags = ["--trust_remote_code"] if settings.trust_remote_code else []
    for side, revision in (("condition", settings.condition_revision), ("target", settings.target_revision)):
        if revision is not None:
            flags += [f"--{side}_revision", revision]
    return flags


def _train_flags(settings: DemoSettings, embeddings: Path, model: Path) -> list[str | Path]:
    steps = settings.train_steps
    flags: dict[str, Any] = {
        "embeddings_path": embeddings, "output_dir": model, "model_dim": 256, "num_layers": 4, "num_heads": 4,
        "normalize": "pca:64", "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.0, "max_steps": steps,
        "warmup_steps": max(1, steps // 25), "condition_dropout": 0.1, "ema_decay": 0, "seed": settings.seed,
        "logging_steps": 10, "eval_steps": max(1, steps // 5), "save_steps": max(1, steps // 5),
        "eval_generation_samples": 0, "save_total_limit": 1, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def compare_with_stock(model_dir: Path, embeddings: Path) -> dict[str, float]:
    """Sample the same pictures with stock diffusers and with ours: largest difference, and time side by side."""
    from blip3o_fast.data.dataset import EmbeddingDataset
    from blip3o_fast.demo.stock import StockBLIP3o, sample_stock
    from blip3o_fast.models.nextdit import BLIP3oDiT
    from blip3o_fast.sampling.sample import sample
    from blip3o_fast.timing import interleaved

    ours = BLIP3oDiT.from_pretrained(model_dir)
    assert ours.normalizer is not None, "the demo trains with --normalize pca:K"
    target = ours.normalizer.target
    raw = EmbeddingDataset(embeddings, split="eval").conditions[:COMPARED]
    condition = ours.normalizer.condition(raw)
    noise = torch.randn(len(raw), 64, ours.config.in_channels, generator=torch.Generator().manual_seed(0))
    stock = StockBLIP3o.with_weights(ours.config, ours.state_dict())

    def run_stock() -> Tensor:
        x = sample_stock(stock, condition, noise, num_steps=NUM_STEPS, guidance_scale=GUIDANCE)
        return target.inverse(x)

    def run_ours() -> Tensor:
        return sample(ours, raw, num_steps=NUM_STEPS, guidance_scale=GUIDANCE, noise=noise)

    providers, rounds = {"diffusers": run_stock, "ours": run_ours}, 5
    with tqdm(total=len(providers) * (2 + rounds), desc="      diffusers and ours in turn", disable=None) as bar:

        def shown(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def step() -> Tensor:
                result = run()
                bar.update()
                return result

            return step

        watched = {name: shown(run) for name, run in providers.items()}
        difference = (watched["ours"]() - watched["diffusers"]()).abs().max().item()
        times = interleaved(watched, rounds=rounds)
    return {
        "max_abs_vs_diffusers": difference,
        "seconds_diffusers": times["diffusers"].median,
        "seconds_ours": times["ours"].median,
        "speedup_vs_diffusers": times["ours"].speedups(times["diffusers"]).median,
    }


def _figures(folder: Path, metrics: dict[str, float]) -> dict[str, bytes]:
    from blip3o_fast.training.checkpoints import METRICS_FILE, read_metrics
    from blip3o_fast.training.plots import plot_loss

    model = folder / "model"
    lines = _read(model / "run.json")["yardstick"]
    reference = read_metrics(REFERENCE_CURVE) if REFERENCE_CURVE.is_file() else None
    loss = plot_loss(read_metrics(model / METRICS_FILE), folder / "loss.png", yardstick=lines, reference=reference)
    by_level = {
        float(name.rpartition("_")[2]): value
        for name, value in _last_evaluation(model).items()
        if name.startswith("eval_loss_sigma_")
    }
    page = Report(metrics, {})
    return {
        "loss": loss.read_bytes(),
        "buckets": plots.sigma_levels(list(by_level), list(by_level.values()), lines["linear_at_levels"]),
        "recall": plots.metric_bars(
            page.system("recall_at_1"), chance=metrics["recall_at_1_chance"], unit="recall@1",
            highlight="generated, guided",
        ),
        "cosine": plots.metric_bars(
            page.system("token_cosine"), chance=None, unit="token cosine", highlight="generated, guided"
        ),
        "sheet": _sheet(folder),
    }  # fmt: skip


def _sheet(folder: Path, rows: int = 8, found: int = 4) -> bytes:
    """Eight held-out pictures, evenly spread; neighbours among the held-out ones, as in recall@1."""
    from safetensors.torch import load_file

    from blip3o_fast.data.dataset import EmbeddingDataset

    train, held_out = EmbeddingDataset.splits(folder / "embeddings")
    assert held_out is not None, "the samples are of the held-out split"
    generated = load_file(folder / "samples.safetensors")["generated"]
    mean = train.targets.mean((0, 1))
    gallery, found = directions(held_out.targets, mean), min(found, len(held_out))
    owns = torch.linspace(0, len(generated) - 1, min(rows, len(generated))).long().tolist()
    true_similarity = gallery @ gallery.T
    true_similarity.fill_diagonal_(-2)  # a picture is not its own neighbour
    neighbours = true_similarity[owns].argmax(1).tolist()
    near = nearest(directions(generated[owns], mean), gallery, found)[0].tolist()
    keys, captions = held_out.keys, held_out.captions
    pictures = {key: picture for (_, key), picture in find_pictures([folder / "tars"], [("", k) for k in keys]).items()}
    return plots.retrieval_sheet(
        [
            {
                "condition": pictures[keys[own]],
                "caption": captions[own],
                "neighbour": pictures[keys[neighbour]],
                "generated": [(pictures[keys[i]], i == own) for i in row],
            }
            for own, neighbour, row in zip(owns, neighbours, near, strict=True)
        ]
    )


def _facts(settings: DemoSettings, metrics: dict[str, float]) -> dict[str, str]:
    run = _read(settings.output_dir / "model" / "run.json")
    return {
        "Pictures": f"{settings.images or 'fetched, with captions'}; the last tenth of a random order is held out",
        "Condition, target": " -> ".join(ENCODERS[settings.encoders]),
        "Network": "4 layers, width 256, 4 heads; targets whitened by PCA to 64 channels",
        "Training": f"{settings.train_steps} steps of 32 pictures, AdamW 1e-3 with cosine decay, seed {settings.seed}",
        "Sampling": f"{NUM_STEPS} Euler steps, guidance {GUIDANCE}",
        "Sampling time": f"stock diffusers {metrics['seconds_diffusers']:.2f} s, ours {metrics['seconds_ours']:.2f} s "
        f"for {COMPARED} pictures (medians of 5 interleaved runs)",
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "Machine": f"{_cpu_name()}, {torch.get_num_threads()} threads, {platform.platform()}",
    }


def _cpu_name() -> str:
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model name")]
    return names[0] if names else platform.machine()


def _last_evaluation(model: Path) -> dict[str, float]:
    from blip3o_fast.training.checkpoints import METRICS_FILE, read_metrics

    return [entry for entry in read_metrics(model / METRICS_FILE) if "eval_loss" in entry][-1]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
