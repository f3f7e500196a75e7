"""transformers' TrainingArguments for a run. Only names that exist from transformers 5.5 on."""

from __future__ import annotations

import importlib.util
import netrc
from pathlib import Path

from transformers import TrainingArguments

from blip3o_fast import env
from blip3o_fast.training.arguments import TrainSettings, warmup_steps

WANDB_HOST = "api.wandb.ai"


def training_arguments(
    settings: TrainSettings, *, total_steps: int, on_cpu: bool, evaluates: bool
) -> TrainingArguments:
    """The Trainer's own settings for a run of ``total_steps`` optimizer steps."""
    given = dict(settings.training_arguments)
    scheduler, scheduler_options = settings.lr_scheduler, given.pop("lr_scheduler_kwargs", None)
    if settings.min_learning_rate:
        scheduler, scheduler_options = "cosine_with_min_lr", {"min_lr": settings.min_learning_rate}
    fixed = dict(
        output_dir=str(settings.output_dir),
        max_steps=total_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=scheduler,
        **({} if scheduler_options is None else {"lr_scheduler_kwargs": scheduler_options}),
        warmup_steps=warmup_steps(settings, total_steps),
        bf16=settings.bf16,
        fp16=settings.fp16,
        use_cpu=on_cpu,
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a NaN, and reads the loss at every step
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps if evaluates else None,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=None,  # ours: it deletes only after the new checkpoint is whole
        report_to=[],  # `tracking` adds the trackers itself
        run_name=settings.wandb_run_name or Path(settings.output_dir).name,
        disable_tqdm=True,  # our own progress
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=not on_cpu,
        ignore_data_skip=True,  # the stream begins at the right place by itself
        remove_unused_columns=False,
        label_names=["target"],
        ddp_find_unused_parameters=False,
    )
    args = TrainingArguments(**{**fixed, **given})
    # Several visible GPUs in one process would mean DataParallel; torchrun is the way to use them.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def wandb_is_ready() -> tuple[bool, str]:
    """(True, "") or (False, one line that says how to turn it on), without importing wandb or asking the network."""
    if importlib.util.find_spec("wandb") is None:
        return False, 'wandb is off: not installed; turn it on with: pip install "blip3o_fast[wandb]" && wandb login'
    mode = env.read("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return mode != "disabled", "wandb is off: WANDB_MODE=disabled"
    if env.read("WANDB_API_KEY"):
        return True, ""
    try:
        known = netrc.netrc().authenticators((env.read("WANDB_BASE_URL") or WANDB_HOST).removeprefix("https://"))
    except (OSError, netrc.NetrcParseError):
        known = None
    if known:
        return True, ""
    return False, "wandb is off: no login; turn it on with: wandb login   (or WANDB_MODE=offline)"
