"""The flags of the verbs beside `train`: one parameter per field of the settings class that the verb fills.

Names and defaults are those of the classes; a test compares them. They are repeated here because the classes need
torch, and help must not.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from blip3o_fast import env

FOLDER = "A folder of results (--output_dir)"


def option(name: str, text: str, panel: str | None = None) -> Any:
    return typer.Option(f"--{name}", help=text, rich_help_panel=panel)


def show_env() -> None:
    """Print versions, devices, and which backends work here and why others do not; paste it into a bug report.

    Example:

      blip3o-fast env
    """
    typer.echo(env.report(), nl=False)


def sample(
    model: Annotated[str, option("model", "A run's folder, a checkpoint's folder or a hub name.")],
    embeddings_path: Annotated[Path, option("embeddings_path", "The embeddings whose conditions are sampled.")],
    output: Annotated[Path | None, option("output", "The file that is written; else samples.safetensors.")] = None,
    output_dir: Annotated[
        Path | None,
        option("output_dir", "Instead a folder, filled shard by shard; continued when it was interrupted.", FOLDER),
    ] = None,
    split: Annotated[str, option("split", "eval, train or all.")] = "eval",
    eval_split: Annotated[float, option("eval_split", "As in training, or other pictures are held out.")] = 0.1,
    num_samples: Annotated[int | None, option("num_samples", "Only the first so many pictures of the split.")] = None,
    num_samples_per_condition: Annotated[
        int, option("num_samples_per_condition", "Samples of each picture, from different noise.")
    ] = 1,
    num_steps: Annotated[int | None, option("num_steps", "ODE steps; 30.")] = None,
    guidance_scale: Annotated[float | None, option("guidance_scale", "1 is none, 0 ignores the condition; 2.")] = None,
    solver: Annotated[str | None, option("solver", "euler, midpoint, heun or ab2; euler.")] = None,
    guidance_start: Annotated[float | None, option("guidance_start", "Guide from this noise level on; 1.")] = None,
    guidance_end: Annotated[float | None, option("guidance_end", "Guide down to this noise level; 0.")] = None,
    batch_size: Annotated[int, option("batch_size", "Samples at a time; changes nothing in the result.")] = 64,
    seed: Annotated[int, option("seed", "Of the noise.")] = 0,
    device: Annotated[str, option("device", "auto, cpu or cuda.")] = "auto",
    storage: Annotated[
        str, option("storage", "Of the weights on a CPU: auto (exact), fp32, bf16, or int8 (fastest, approximate).")
    ] = "auto",
    samples_per_shard: Annotated[int, option("samples_per_shard", "Samples in a file of the folder.", FOLDER)] = 4096,
    overwrite: Annotated[
        bool, option("overwrite", "Drop what the folder holds of other settings, weights or pictures.", FOLDER)
    ] = False,
) -> None:
    """Generate features for the conditions of a split, into one safetensors file or a folder of them.

    What no flag says of the sampler comes from sampler.json beside the weights (see tune-sampler), if there is one.

    Examples:

      blip3o-fast sample --model runs/first --embeddings_path runs/embeddings --output runs/samples.safetensors

      blip3o-fast sample --model runs/first --embeddings_path runs/embeddings --split all --output_dir runs/samples

      torchrun --nproc_per_node 2 -m blip3o_fast sample --model runs/first --embeddings_path runs/embeddings
      --output_dir runs/samples
    """
    given = locals()
    from blip3o_fast.evaluation.samples import run_sample
    from blip3o_fast.evaluation.settings import SampleSettings

    run_sample(SampleSettings(**given))


def evaluate(
    model: Annotated[str, option("model", "A run's folder, a checkpoint's folder or a hub name.")],
    embeddings_path: Annotated[Path, option("embeddings_path", "The embeddings that were trained on.")],
    output: Annotated[Path | None, option("output", "A JSON file for the numbers.")] = None,
    split: Annotated[str, option("split", "eval: the baselines are fitted on the rest.")] = "eval",
    eval_split: Annotated[float, option("eval_split", "As in training, or other pictures are held out.")] = 0.1,
    num_samples: Annotated[int | None, option("num_samples", "Only the first so many pictures of the split.")] = None,
    num_steps: Annotated[int | None, option("num_steps", "ODE steps; 30.")] = None,
    guidance_scale: Annotated[float | None, option("guidance_scale", "1 is none, 0 ignores the condition; 2.")] = None,
    solver: Annotated[str | None, option("solver", "euler, midpoint, heun or ab2; euler.")] = None,
    guidance_start: Annotated[float | None, option("guidance_start", "Guide from this noise level on; 1.")] = None,
    guidance_end: Annotated[float | None, option("guidance_end", "Guide down to this noise level; 0.")] = None,
    batch_size: Annotated[int, option("batch_size", "Pictures at a time; changes nothing in the result.")] = 64,
    seed: Annotated[int, option("seed", "Of the noise.")] = 0,
    device: Annotated[str, option("device", "auto, cpu or cuda.")] = "auto",
    storage: Annotated[
        str, option("storage", "Of the weights on a CPU: auto (exact), fp32, bf16, or int8 (fastest, approximate).")
    ] = "auto",
    samples: Annotated[
        Path | None, option("samples", "A file or folder that `sample` wrote, instead of sampling again.")
    ] = None,
    unconditional: Annotated[
        bool,
        typer.Option("--unconditional/--no_unconditional", help="Also sample without a condition, to compare."),
    ] = True,
) -> None:
    """Judge a trained model on held-out pictures, beside chance and honest baselines.

    What no flag says of the sampler comes from sampler.json beside the weights (see tune-sampler), if there is one.

    Examples:

      blip3o-fast evaluate --model runs/first --embeddings_path runs/embeddings

      blip3o-fast evaluate --model runs/first --embeddings_path runs/embeddings --samples runs/samples.safetensors
    """
    given = locals()
    from blip3o_fast.evaluation.evaluate import EvaluateSettings, evaluate_checkpoint

    evaluate_checkpoint(EvaluateSettings(**given))


def warmup(
    model: Annotated[str, option("model", "A folder or hub name whose network is meant.")] = "",
    preset: Annotated[str, option("preset", "Instead: tiny, small, base, blip3o-4b or blip3o-8b.")] = "",
    precision: Annotated[
        list[str], option("precision", "bfloat16, float16, float32 or autocast (bf16 training); repeatable.")
    ] = ("bfloat16", "autocast"),  # type: ignore[assignment]
    arch: Annotated[
        list[int], option("arch", "The GPU: 80 A100, 89 L4 and RTX 40, 90 H100, 100 B200, 120 RTX 50; this one's.")
    ] = (),  # type: ignore[assignment]
    training: Annotated[
        bool, typer.Option("--training/--no_training", help="Also the kernels of the backward pass and the loss.")
    ] = True,
    context_tokens: Annotated[int, option("context_tokens", "Tokens of the context; 0: as the network's grid.")] = 0,
) -> None:
    """Compile the kernels of a network into Triton's cache (TRITON_CACHE_DIR), with or without a GPU.

    Examples:

      blip3o-fast warmup

      blip3o-fast warmup --preset blip3o-8b --arch 90 --precision bfloat16 --no_training
    """
    given = locals()
    from blip3o_fast.models.warmup import WarmupSettings
    from blip3o_fast.models.warmup import warmup as run_warmup

    typer.echo(run_warmup(WarmupSettings(**given)))


def compare(
    path: Annotated[Path, typer.Argument(help="A LuminaNextDiT2DModel's folder, a pipeline's, or one of ours.")],
    tolerance: Annotated[float, option("tolerance", "Of the largest difference; past it the exit code is 1.")] = 1e-4,
    json: Annotated[Path | None, option("json", "A JSON file for the numbers.")] = None,
    batch_size: Annotated[int, option("batch_size", "Samples of the random inputs.")] = 1,
    context_tokens: Annotated[int, option("context_tokens", "Tokens of the random context.")] = 64,
    rounds: Annotated[int, option("rounds", "Timed calls of each, in turn.")] = 5,
    seed: Annotated[int, option("seed", "Of the inputs.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Also block by block.")] = False,
    dtype: Annotated[str, option("dtype", "float32, bfloat16 or float16, of weights and inputs.")] = "float32",
    device: Annotated[str, option("device", "cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Run a stock network and the same one fused on random inputs: difference, error against fp64, time, memory.

    Examples:

      blip3o-fast compare models/lumina --tolerance 1e-4 --json compare.json

      blip3o-fast compare models/lumina --layers --dtype bfloat16 --tolerance 0.05
    """
    given = locals()
    from blip3o_fast.models.compare_folder import CompareSettings, compare_folder

    found, within = compare_folder(CompareSettings(**given))
    typer.echo(found)
    if not within:
        typer.echo(f"the largest difference is past the tolerance of {tolerance:g}", err=True)
        raise typer.Exit(1)


def demo(
    output_dir: Annotated[Path, option("output_dir", "Where everything lands.")] = Path("runs/demo"),
    images: Annotated[str, option("images", "A folder of 32 or more pictures, instead of fetching some.")] = "",
    encoders: Annotated[str, option("encoders", "efficientnet (packages), clip or full (hub).")] = "efficientnet",
    train_steps: Annotated[int, option("train_steps", "Training steps.")] = 500,
    seed: Annotated[int, option("seed", "Of weights, order and noise.")] = 0,
    trust_remote_code: Annotated[
        bool, option("trust_remote_code", "For full: let an encoder run the Python code of its hub repository.")
    ] = False,
    condition_revision: Annotated[
        str | None, option("condition_revision", "Commit of the condition encoder's repository.")
    ] = None,
    target_revision: Annotated[
        str | None, option("target_revision", "Commit of the target encoder's repository.")
    ] = None,
) -> None:
    """The whole job on real pictures: fetch, extract, train, sample, judge, compare with diffusers, report.

    What is done is kept: running it again, also after Ctrl-C, continues.

    Examples:

      blip3o-fast demo

      blip3o-fast demo --images my_pictures --output_dir runs/mine
    """
    given = locals()
    from blip3o_fast.demo.run import DemoSettings, run_demo

    run_demo(DemoSettings(**given))
