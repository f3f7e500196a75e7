"""The flags of `tune-sampler`: one parameter per field of `TuneSettings`, as in `cli_verbs`."""

from pathlib import Path
from typing import Annotated

import typer

from blip3o_fast.cli_verbs import option


def tune_sampler(
    model: Annotated[Path, typer.Argument(help="A run's or a checkpoint's folder; sampler.json is written into it.")],
    embeddings_path: Annotated[Path, option("embeddings_path", "The embeddings whose conditions are sampled.")],
    error: Annotated[float, option("error", "Accepted: relative L2 distance to the reference.")] = 0.01,
    guidance_scale: Annotated[float, option("guidance_scale", "Of the reference and the sampler.")] = 2.0,
    num_samples: Annotated[int, option("num_samples", "The first so many pictures of the split.")] = 16,
    split: Annotated[str, option("split", "eval, train or all.")] = "eval",
    eval_split: Annotated[float, option("eval_split", "As in training, or other pictures are held out.")] = 0.1,
    seed: Annotated[int, option("seed", "Of the noise.")] = 0,
    reference_steps: Annotated[int, option("reference_steps", "Euler steps of the reference.")] = 1000,
    device: Annotated[str, option("device", "auto, cpu or cuda.")] = "auto",
) -> None:
    """Find the cheapest sampler within an error, on your conditions: solver, steps, noise levels, guidance interval.

    What is found is written to sampler.json beside the weights, where `sample`, `evaluate`, `interpolate` and `try`
    look for it. Where nothing is within the error, nothing is written and the exit code is 1.

    Example:

      blip3o-fast tune-sampler runs/demo/model --embeddings_path runs/demo/embeddings --error 0.01
    """
    given = locals()
    from blip3o_fast.evaluation.tune_sampler import TuneSettings, nothing_found
    from blip3o_fast.evaluation.tune_sampler import tune_sampler as run

    settings = TuneSettings(**given)
    if run(settings) is None:
        typer.echo(nothing_found(settings), err=True)
        raise typer.Exit(1)
