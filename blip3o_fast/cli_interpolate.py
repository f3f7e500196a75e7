"""The flags of `blip3o-fast interpolate`: one parameter per field of `evaluation.interpolation.InterpolateSettings`."""

from pathlib import Path
from typing import Annotated

from blip3o_fast.cli_verbs import option


def interpolate(
    model: Annotated[str, option("model", "A run's folder, a checkpoint's folder or a hub name.")],
    embeddings_path: Annotated[Path, option("embeddings_path", "The embeddings whose conditions are the two ends.")],
    pair: Annotated[str, option("pair", "Two pictures of the split by their place in it, as 3,17.")],
    output: Annotated[Path, option("output", "The file that is written.")] = Path("interpolation.safetensors"),
    count: Annotated[int, option("count", "Steps from one to the other, both included.")] = 8,
    method: Annotated[str, option("method", "linear, or spherical: each token keeps its length.")] = "linear",
    split: Annotated[str, option("split", "eval, train or all.")] = "eval",
    eval_split: Annotated[float, option("eval_split", "As in training, or other pictures are held out.")] = 0.1,
    num_steps: Annotated[int | None, option("num_steps", "ODE steps; 30.")] = None,
    guidance_scale: Annotated[float | None, option("guidance_scale", "1 is none, 0 ignores the condition; 2.")] = None,
    solver: Annotated[str | None, option("solver", "euler, midpoint, heun or ab2; euler.")] = None,
    guidance_start: Annotated[float | None, option("guidance_start", "Guide from this noise level on; 1.")] = None,
    guidance_end: Annotated[float | None, option("guidance_end", "Guide down to this noise level; 0.")] = None,
    seed: Annotated[int, option("seed", "Of the one noise that all steps start from.")] = 0,
    device: Annotated[str, option("device", "auto, cpu or cuda.")] = "auto",
    storage: Annotated[
        str, option("storage", "Of the weights on a CPU: auto (exact), fp32, bf16, or int8 (fastest, approximate).")
    ] = "auto",
) -> None:
    """Generate features between two pictures and print which picture of the split each step is nearest to.

    What no flag says of the sampler comes from sampler.json beside the weights (see tune-sampler), if there is one.

    Example:

      blip3o-fast interpolate --model runs/first --embeddings_path runs/embeddings --pair 3,17 --count 8
    """
    given = locals()
    from blip3o_fast.evaluation.interpolation import InterpolateSettings, run_interpolation

    run_interpolation(InterpolateSettings(**given))
