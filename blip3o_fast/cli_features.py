"""The flags of `blip3o-fast inspect` and `blip3o-fast convert`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from blip3o_fast.cli_verbs import option


def inspect(
    path: Annotated[Path, typer.Argument(help="A folder of shards, a pickle, or a folder of chunked pickles.")],
    figure: Annotated[Path | None, option("figure", "Write a plot of norms and grids there (.png or .svg).")] = None,
    captions: Annotated[int, option("captions", "How many captions are shown.")] = 5,
) -> None:
    """Say what a set of features holds, what is wrong with it, and how many GPUs it can feed.

    Examples:

      blip3o-fast inspect runs/demo/embeddings

      blip3o-fast inspect embeddings/blip3o_grid_embeddings.pkl --figure embeddings.png
    """
    from blip3o_fast.data.inspection import inspect_features

    found = inspect_features(path, captions=captions, figure=figure, quiet=not sys.stderr.isatty())
    typer.echo(found)
    if figure is not None:
        typer.echo(f"figure      {figure}")
    if found.faults:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(help="A pickle, a folder of chunked pickles, or a folder of shards.")],
    output: Annotated[Path, option("output", "The folder of shards, or the pickle, that is written.")],
    format: Annotated[str, option("format", "shards, or pickle for the original's single file.")] = "shards",
    samples_per_shard: Annotated[int, option("samples_per_shard", "Pictures of one shard.")] = 1000,
    dtype: Annotated[
        str | None, option("dtype", "On disk: float32, float16 or bfloat16; as stored (int8: float32).")
    ] = None,
) -> None:
    """Write features in another form: the original's pickles as shards, or shards as its single pickle.

    Examples:

      blip3o-fast convert embeddings/blip3o_grid_embeddings.pkl --output shards --dtype bfloat16

      blip3o-fast convert runs/demo/embeddings --format pickle --output embeddings.pkl
    """
    given = locals()
    from blip3o_fast.data.convert import convert as run_convert

    count = run_convert(**given, quiet=not sys.stderr.isatty())
    typer.echo(f"{count} pictures: {output}")
