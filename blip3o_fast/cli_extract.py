"""The verb `extract`. Names and defaults are those of `data.extract.extract`; a test compares them."""

from pathlib import Path
from typing import Annotated

import typer

from blip3o_fast.cli_verbs import option

_ENCODERS, _SPEED = "Encoders", "Speed and precision"


def extract(
    images: Annotated[
        list[str] | None,
        option("images", "A folder of pictures or of tars, a tar, or hf:DATASET; repeatable. The folder data."),
    ] = None,
    output_dir: Annotated[Path, option("output_dir", "The folder of shards; made, or continued.")] = Path("embeddings"),
    condition_encoder: Annotated[
        str, option("condition_encoder", "The network whose features condition the model.", _ENCODERS)
    ] = "eva-clip-8b",
    target_encoder: Annotated[
        str, option("target_encoder", "The network whose features are generated.", _ENCODERS)
    ] = "clip-vit-l-14",
    tower: Annotated[
        str,
        option(
            "tower", "projected (into CLIP's joint space) or hidden (the last layer); the first there is.", _ENCODERS
        ),
    ] = "",
    batch_size: Annotated[
        int | None, option("batch_size", "Pictures per forward pass; 4 on a CPU, 64 on a GPU.", _SPEED)
    ] = None,
    workers: Annotated[int | None, option("workers", "Threads; as many as cores.", _SPEED)] = None,
    device: Annotated[str, option("device", "auto, cpu, cuda or cuda:1.", _SPEED)] = "auto",
    precision: Annotated[str, option("precision", "Of the encoders: fp32, bf16, or fp16 on a GPU.", _SPEED)] = "fp32",
    compile_encoders: Annotated[
        bool, option("compile_encoders", "Run the encoders through torch.compile.", _SPEED)
    ] = False,
    dtype: Annotated[
        str, option("dtype", "On disk: float32, float16, bfloat16, or int8 with one scale per token.")
    ] = "float32",
    samples_per_shard: Annotated[
        int, option("samples_per_shard", "Pictures of a tar that make a shard; bounds the memory.")
    ] = 1000,
    format: Annotated[str, option("format", "shards, or pickle to write the original's file as well.")] = "shards",
    limit: Annotated[int | None, option("limit", "At most so many pictures of each tar, folder or dataset.")] = None,
    overwrite: Annotated[
        bool, option("overwrite", "Drop what the folder holds of other encoders, settings or pictures.")
    ] = False,
    yes: Annotated[bool, option("yes", "Do not ask before more than two hours on a CPU.")] = False,
    trust_remote_code: Annotated[
        bool, option("trust_remote_code", "Let an encoder run the Python code of its hub repository.", _ENCODERS)
    ] = False,
    condition_revision: Annotated[
        str, option("condition_revision", "Commit of the condition encoder's repository.", _ENCODERS)
    ] = "",
    target_revision: Annotated[
        str, option("target_revision", "Commit of the target encoder's repository.", _ENCODERS)
    ] = "",
    quiet: Annotated[
        bool, option("quiet", "No progress bar; there is none anyway where the output is no terminal.")
    ] = False,
) -> None:
    """Turn pictures into embeddings: 64 tokens of two pretrained networks per picture.

    A caption is the first line of the .txt beside a picture. Interrupted, the same command continues. Under torchrun,
    srun or in a Slurm array each process takes its share of the tars. Without arguments: data/*.tar through
    EVA-CLIP-8B and CLIP ViT-L/14, as the original project does.

    Examples:

      blip3o-fast extract

      blip3o-fast extract --images pictures --output_dir runs/embeddings --condition_encoder efficientnet-lite0
      --target_encoder efficientnet-lite2

      blip3o-fast extract --images "hf:FOLDER?split=train&image=image&caption=text" --output_dir clip
      --condition_encoder eva02-clip-l-14 --target_encoder clip-vit-l-14 --tower hidden

      torchrun --nproc_per_node 8 -m blip3o_fast extract --images tars --output_dir runs/embeddings --precision bf16
    """
    given = locals() | {"quiet": quiet or None, "images": images or None}
    from blip3o_fast.data.extract import extract as run_extraction

    typer.echo(run_extraction(**given))
