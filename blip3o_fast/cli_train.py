"""The flags of `blip3o-fast train`: those of the original training script with its defaults, then ours.

One parameter per field of `blip3o_fast.training.arguments.TrainSettings`, same name, same default; a test compares
the two. They are repeated here because that module needs torch, and help must not.
"""

from pathlib import Path
from typing import Annotated, Any

import typer


def option(name: str, panel: str, text: str) -> Any:
    return typer.Option(f"--{name}", help=text, rich_help_panel=panel)


NETWORK = "Network (channels and grid come from the embeddings)"
OPTIMISATION = "Optimisation"
FLOW = "Flow matching"
DATA = "Data"
LOGGING = "Logging, evaluation, checkpoints"
HARDWARE = "Hardware"
OTHER = "Other"


def train(
    ctx: typer.Context,
    embeddings_path: Annotated[
        Path | None, typer.Option("--embeddings_path", help="Folder that `extract` wrote, or a pickle of the original.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output_dir", help="Where the run is written.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Settings to begin with: demo, seed or blip3o; flags win over it.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of flags; the command line wins over it."),
    ] = None,
    preset: Annotated[str | None, option("preset", NETWORK, "tiny, small, base, blip3o-4b or blip3o-8b.")] = None,
    model_dim: Annotated[int | None, option("model_dim", NETWORK, "Width; 1792 without a preset.")] = None,
    num_layers: Annotated[int | None, option("num_layers", NETWORK, "Blocks; 24 without a preset.")] = None,
    num_heads: Annotated[int | None, option("num_heads", NETWORK, "Query heads; 28 without a preset.")] = None,
    num_kv_heads: Annotated[int | None, option("num_kv_heads", NETWORK, "Key heads; as many as query heads.")] = None,
    multiple_of: Annotated[int | None, option("multiple_of", NETWORK, "The FFN width is a multiple of this.")] = None,
    ffn_dim_multiplier: Annotated[float | None, option("ffn_dim_multiplier", NETWORK, "Scales the FFN width.")] = None,
    context_projection: Annotated[
        bool | None,
        typer.Option(
            "--context_projection/--no_context_projection",
            help="Project the condition to the model's width first (BLIP3-o), or not (stock diffusers).",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    init_from: Annotated[
        str | None, option("init_from", NETWORK, "Folder or hub name of a trained model to start from.")
    ] = None,
    init_optimizer: Annotated[
        str | None,
        option("init_optimizer", NETWORK, "And its AdamW state: optimizer.pt, a checkpoint, or .safetensors."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, option("gradient_checkpointing", NETWORK, "Recompute the blocks in backward: less memory, slower.")
    ] = False,
    checkpointing_mode: Annotated[
        str,
        option("checkpointing_mode", NETWORK, "With --gradient_checkpointing: block, or selective (cheap ops only)."),
    ] = "block",
    num_epochs: Annotated[float, option("num_epochs", OPTIMISATION, "Passes over the training split.")] = 10,
    max_steps: Annotated[int | None, option("max_steps", OPTIMISATION, "Steps; wins over --num_epochs.")] = None,
    batch_size: Annotated[int, option("batch_size", OPTIMISATION, "Samples per device and step.")] = 32,
    eval_batch_size: Annotated[int, option("eval_batch_size", OPTIMISATION, "Samples per evaluation batch.")] = 64,
    gradient_accumulation_steps: Annotated[
        int, option("gradient_accumulation_steps", OPTIMISATION, "Batches per optimizer step.")
    ] = 1,
    learning_rate: Annotated[float, option("learning_rate", OPTIMISATION, "Peak learning rate of AdamW.")] = 1e-4,
    weight_decay: Annotated[float, option("weight_decay", OPTIMISATION, "Of matrices; none for norms, biases.")] = 0.01,
    warmup_steps: Annotated[
        int | None, option("warmup_steps", OPTIMISATION, "Steps to the peak; 1000, but at most a tenth of the run.")
    ] = None,
    warmup_ratio: Annotated[
        float | None, option("warmup_ratio", OPTIMISATION, "Warmup as a share of the run, instead of --warmup_steps.")
    ] = None,
    lr_scheduler: Annotated[
        str, option("lr_scheduler", OPTIMISATION, "cosine, linear, constant or constant_with_warmup.")
    ] = "cosine",
    min_learning_rate: Annotated[float, option("min_learning_rate", OPTIMISATION, "Where the cosine ends.")] = 0.0,
    adam_beta1: Annotated[float, option("adam_beta1", OPTIMISATION, "AdamW's first decay.")] = 0.9,
    adam_beta2: Annotated[float, option("adam_beta2", OPTIMISATION, "AdamW's second decay.")] = 0.999,
    max_grad_norm: Annotated[float, option("max_grad_norm", OPTIMISATION, "Gradients are clipped to it.")] = 1.0,
    ema_decay: Annotated[float, option("ema_decay", OPTIMISATION, "Of the fp32 average of weights; 0: none.")] = 0.9999,
    max_bad_steps: Annotated[
        int,
        option("max_bad_steps", OPTIMISATION, "So many NaN or infinite steps in a row stop the run; each is left out."),
    ] = 3,
    seed: Annotated[int, option("seed", OPTIMISATION, "Of weights, order, noise and everything else.")] = 42,
    sigma_min: Annotated[float, option("sigma_min", FLOW, "Noise left on the data at sigma = 0.")] = 1e-4,
    sigma_max: Annotated[float, option("sigma_max", FLOW, "Noise at sigma = 1.")] = 1.0,
    prediction_type: Annotated[str, option("prediction_type", FLOW, "v_prediction or epsilon.")] = "v_prediction",
    schedule_type: Annotated[str, option("schedule_type", FLOW, "linear or cosine.")] = "linear",
    regularization_weight: Annotated[
        float, option("regularization_weight", FLOW, "Times the mean norm of the predicted tokens.")
    ] = 0.0,
    timestep_sampling: Annotated[
        str, option("timestep_sampling", FLOW, "uniform, logit_normal or shifted.")
    ] = "uniform",
    logit_mean: Annotated[float, option("logit_mean", FLOW, "Mean of logit_normal.")] = 0.0,
    logit_std: Annotated[float, option("logit_std", FLOW, "Spread of logit_normal.")] = 1.0,
    timestep_shift: Annotated[float, option("timestep_shift", FLOW, "Shift of shifted; 1 is uniform.")] = 1.0,
    condition_dropout: Annotated[
        float, option("condition_dropout", FLOW, "Share of samples trained without their condition.")
    ] = 0.1,
    loss_weighting: Annotated[
        str, option("loss_weighting", FLOW, "none, sigma_sqrt or cosmap: how much each noise level counts.")
    ] = "none",
    subset_size: Annotated[
        int | None, option("subset_size", DATA, "Train on so many samples; normalisation uses all.")
    ] = None,
    eval_split: Annotated[float, option("eval_split", DATA, "Share of samples held out.")] = 0.1,
    normalize: Annotated[str, option("normalize", DATA, "none, standardize, l2 or pca:K (targets).")] = "none",
    normalize_embeddings: Annotated[
        bool, option("normalize_embeddings", DATA, "The original's flag: the same as --normalize l2.")
    ] = False,
    num_workers: Annotated[int, option("num_workers", DATA, "Processes that load data.")] = 0,
    loading: Annotated[
        str, option("loading", DATA, "memory, stream (shards, block shuffle), or auto: stream above 4 GiB.")
    ] = "auto",
    split: Annotated[
        str, option("split", DATA, "random (the original's), hash (of keys: stable when data is added), or auto.")
    ] = "auto",
    on_bad_shard: Annotated[
        str, option("on_bad_shard", DATA, "stop, or skip and count; where shards are streamed.")
    ] = "stop",
    logging_steps: Annotated[int, option("logging_steps", LOGGING, "Steps between log lines.")] = 100,
    save_steps: Annotated[int, option("save_steps", LOGGING, "Steps between checkpoints.")] = 1000,
    eval_steps: Annotated[int, option("eval_steps", LOGGING, "Steps between evaluations.")] = 1000,
    eval_generation_samples: Annotated[
        int, option("eval_generation_samples", LOGGING, "Held-out samples generated at each evaluation; 0: none.")
    ] = 16,
    guidance_scale: Annotated[float, option("guidance_scale", LOGGING, "Of those samples; 1 is none.")] = 2.0,
    num_inference_steps: Annotated[int, option("num_inference_steps", LOGGING, "Of those samples.")] = 20,
    save_total_limit: Annotated[int | None, option("save_total_limit", LOGGING, "Checkpoints that are kept.")] = 3,
    load_best_model_at_end: Annotated[
        bool, option("load_best_model_at_end", LOGGING, "The result is the checkpoint of the lowest held-out loss.")
    ] = False,
    wandb_project: Annotated[str, option("wandb_project", LOGGING, "Used where you are logged in.")] = "blip3o-dit",
    wandb_run_name: Annotated[str | None, option("wandb_run_name", LOGGING, "Name of the run there.")] = None,
    no_wandb: Annotated[bool, option("no_wandb", LOGGING, "Never use wandb.")] = False,
    report_to: Annotated[
        str | None,
        option("report_to", LOGGING, "wandb, tensorboard, both with a comma, none; else wandb where logged in."),
    ] = None,
    profile_steps: Annotated[
        str | None, option("profile_steps", LOGGING, "10:15 traces steps 10 to 15 and prints where their time went.")
    ] = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no_progress",
            help="A bar on a terminal and one line per log elsewhere, or nothing.",
            rich_help_panel=LOGGING,
            show_default="automatic",
        ),
    ] = None,
    fp16: Annotated[bool, option("fp16", HARDWARE, "Autocast to fp16, with loss scaling.")] = False,
    bf16: Annotated[bool, option("bf16", HARDWARE, "Autocast to bf16.")] = False,
    device: Annotated[str, option("device", HARDWARE, "auto, cpu or cuda.")] = "auto",
    compile_model: Annotated[bool, option("compile_model", HARDWARE, "Use torch.compile.")] = False,
    backend: Annotated[str, option("backend", HARDWARE, "Kernels: auto, reference, triton, cuda or cpu.")] = "auto",
    attention_backend: Annotated[
        str, option("attention_backend", HARDWARE, "Who computes attention: auto, sdpa, flash-attn or xformers.")
    ] = "auto",
    resume_from_checkpoint: Annotated[
        str | None, option("resume_from_checkpoint", OTHER, "auto (the newest), or a checkpoint folder.")
    ] = None,
    debug: Annotated[
        bool, option("debug", OTHER, "1000 samples, 2 epochs, frequent logs, no wandb, and a small network.")
    ] = False,
    dry_run: Annotated[bool, option("dry_run", OTHER, "Check everything, print the plan, train nothing.")] = False,
    force: Annotated[bool, option("force", OTHER, "Begin although the memory seems too small.")] = False,
) -> None:
    """Train a BLIP3-o DiT on embeddings.

    Every flag of transformers' TrainingArguments is taken too (--optim, --adam_epsilon, --ddp_timeout, ...).

    Examples:

      blip3o-fast train --embeddings_path runs/embeddings --output_dir runs/first --preset small --normalize pca:64

      blip3o-fast train --embeddings_path shards --output_dir run --bf16 --resume_from_checkpoint auto

      blip3o-fast train --recipe blip3o --config run.yaml --output_dir run

      blip3o-fast train --embeddings_path shards --output_dir run --report_to tensorboard --profile_steps 10:15

      torchrun --nproc_per_node 2 -m blip3o_fast train --embeddings_path shards --output_dir run
    """
    explicit = {
        name: value
        for name, value in locals().items()
        if name not in ("ctx", "recipe", "config") and _was_given(ctx, name)
    }
    from blip3o_fast.training.files import settings_from
    from blip3o_fast.training.run import train as run_training

    run_training(settings_from(explicit, recipe=recipe, config=config, passed_on=ctx.args))


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
