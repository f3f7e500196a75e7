"""The flags of `blip3o-fast download`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from blip3o_fast.cli_verbs import option


def download(
    files: Annotated[list[Path] | None, typer.Argument(help="With --verify: tars to look at.")] = None,
    dataset: Annotated[
        str, option("dataset", "short-caption, long-caption, journeydb, or OWNER/NAME on the hub.")
    ] = "short-caption",
    shards: Annotated[str, option("shards", "Which: 3, or 0-11, or 0,3,7-9.")] = "0",
    shard: Annotated[int | None, option("shard", "One shard (the original's flag).")] = None,
    output_dir: Annotated[Path, option("output_dir", "Where the tars are put.")] = Path("data"),
    data_dir: Annotated[Path | None, option("data_dir", "The same (the original's flag).")] = None,
    list_: Annotated[bool, option("list", "Show the set's shards with their sizes; fetch nothing.")] = False,
    verify: Annotated[
        bool, option("verify", "Read the tars named, or all of the folder, to their end; fetch nothing.")
    ] = False,
    force: Annotated[bool, option("force", "Fetch again what is there.")] = False,
    workers: Annotated[int, option("workers", "Shards at once.")] = 4,
    revision: Annotated[str | None, option("revision", "Branch, tag or commit of the set.")] = None,
) -> None:
    """Fetch shards of BLIP3-o's public pretraining sets, or check the tars that are there.

    Examples:

      blip3o-fast download

      blip3o-fast download --dataset journeydb --shards 0-11 --output_dir data

      blip3o-fast download --list

      blip3o-fast download --verify data/00000.tar
    """
    from blip3o_fast.data import download as work

    if shard is not None and shards != "0":
        raise ValueError(f"--shard {shard} and --shards {shards}: give one of them")
    if data_dir is not None and output_dir not in (Path("data"), data_dir):
        raise ValueError(f"--output_dir {output_dir} and --data_dir {data_dir}: give one of them")
    folder = output_dir if data_dir is None else data_dir
    if files and not verify:
        raise ValueError(f"{files[0]}: files are for --verify; a set is chosen by --dataset and --shards")
    if verify:
        there = [path for path in folder.rglob("*.tar") if not path.relative_to(folder).parts[0].startswith(".")]
        raise typer.Exit(_verify(files or sorted(there), folder))
    if list_:
        found = work.list_shards(dataset, revision=revision)
        for one in found:
            typer.echo(f"{one.name}  {one.size / 1e6:10.1f} MB")
        typer.echo(f"{len(found)} shards, {sum(one.size for one in found) / 1e9:.1f} GB in {work.repository(dataset)}")
        return
    which = shards if shard is None else str(shard)
    quiet = not sys.stderr.isatty()
    paths = work.download(
        dataset, which, folder, force=force, workers=workers, revision=revision, quiet=quiet, say=typer.echo
    )
    images = " ".join(f"--images {place}" for place in sorted({path.parent for path in paths}))
    typer.echo(f"{len(paths)} shards in {folder}; next: blip3o-fast extract {images}")


def _verify(paths: list[Path], folder: Path) -> int:
    from blip3o_fast.data.verify import verify_tar

    if not paths:
        raise FileNotFoundError(f"{folder}: holds no .tar to verify")
    bad = 0
    for path in paths:
        try:
            typer.echo(f"{path}: {verify_tar(path)}")
        except (ValueError, OSError) as error:
            bad += 1
            typer.echo(f"error: {error}", err=True)
    if bad:
        typer.echo(f"hint: {bad} of {len(paths)} are damaged or missing: fetch them again with --force", err=True)
    return 1 if bad else 0
