"""The verb `try`: a trained run on any picture. Its flags are the fields of `demo.try_pictures.TrySettings`."""

from pathlib import Path
from typing import Annotated

import typer

from blip3o_fast.cli_verbs import option


def try_pictures(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="PNG, JPEG or WebP files.")],
    run: Annotated[Path, option("run", "A demo's folder, or a training run's.")] = Path("runs/demo"),
    model: Annotated[
        str | None, option("model", "Instead of the run's: a run's or checkpoint's folder, or a hub name.")
    ] = None,
    embeddings_path: Annotated[
        Path | None, option("embeddings_path", "Instead of the run's: the embeddings that were trained on.")
    ] = None,
    images: Annotated[
        list[Path], option("images", "Where the collection's pictures are, if not beside the embeddings; repeatable.")
    ] = (),  # type: ignore[assignment]
    output: Annotated[Path | None, option("output", "The PNG that is written; try.png in the run.")] = None,
    num_samples: Annotated[int, option("num_samples", "Generations of each picture.")] = 1,
    neighbours: Annotated[int, option("neighbours", "Shown of each feature.")] = 5,
    num_steps: Annotated[int | None, option("num_steps", "ODE steps; 30.")] = None,
    guidance_scale: Annotated[float | None, option("guidance_scale", "1 is none, 0 ignores the condition; 2.")] = None,
    seed: Annotated[int, option("seed", "Of the noise; generation number s (from 0) has seed + s.")] = 0,
    device: Annotated[str, option("device", "auto, cpu or cuda.")] = "auto",
    storage: Annotated[
        str, option("storage", "Of the weights on a CPU: auto (exact), fp32, bf16, or int8 (fastest, approximate).")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, option("trust_remote_code", "Let an encoder run the Python code of its hub repository.")
    ] = False,
) -> None:
    """Try a run on pictures: is what it generates near the same pictures as the truth? Writes one PNG.

    The encoders are those that the run's embeddings name. What no flag says of the sampler comes from sampler.json
    beside the weights (see tune-sampler), if there is one.

    Examples:

      blip3o-fast try photo.jpg

      blip3o-fast try frog.png yak.png --run runs/demo --num_samples 2 --output try.png
    """
    given = locals() | {"pictures": tuple(pictures), "images": tuple(images)}
    from blip3o_fast.demo.try_pictures import TrySettings
    from blip3o_fast.demo.try_pictures import try_pictures as run_try

    run_try(TrySettings(**given))
