"""The flags of `blip3o-fast export`."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from blip3o_fast.cli_verbs import option


def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, a checkpoint's folder or file, or a hub name.")],
    to: Annotated[str, option("to", "Who shall read it: diffusers or blip3o.")],
    output: Annotated[Path, option("output", "The folder that is written.")],
    base: Annotated[
        Path | None, option("base", "For blip3o: the whole BLIP3-o checkpoint that is copied, its DiT replaced.")
    ] = None,
    dtype: Annotated[
        str | None, option("dtype", "float32, bfloat16 or float16; as it is, or for blip3o as the base.")
    ] = None,
    raw_weights: Annotated[
        bool, option("raw_weights", "Of a training checkpoint the weights themselves, not their average.")
    ] = False,
    hard_links: Annotated[
        bool, option("hard_links", "For blip3o: shards that stay as they are share the base's disk space.")
    ] = False,
    overwrite: Annotated[bool, option("overwrite", "Replace an output that exists.")] = False,
) -> None:
    """Write a network for another program: a folder of diffusers, or a copy of a BLIP3-o checkpoint with it inside.

    Examples:

      blip3o-fast export runs/stock --to diffusers --output exported/lumina

      blip3o-fast export runs/first --to blip3o --base models/BLIP3o-8B --output exported/blip3o
    """
    given = locals()
    from blip3o_fast.models.exporting import export as run_export

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        done = run_export(**given)
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    typer.echo(done)
