"""Flags of transformers' TrainingArguments that this package does not have itself.

They are parsed by transformers' own parser, and refused where they would break a run or where a flag of ours says it.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn

from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.optimizers import check_optimizer

# TrainingArguments' names for what flags of ours say.
OURS = {
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "lr_scheduler_type": "lr_scheduler",
    "activation_checkpointing": "gradient_checkpointing",
    "use_cpu": "device cpu",
    "run_name": "wandb_run_name",
    "project": "wandb_project",
    "dataloader_num_workers": "num_workers",
    "torch_compile": "compile_model",
    "disable_tqdm": "no_progress",
}
# What would break a run, and why.
REFUSED = {
    "remove_unused_columns": "the batches are not the network's arguments",
    "label_names": "the loss finds its targets itself",
    "ignore_data_skip": "a continued run begins at the right sample by itself",
    "logging_nan_inf_filter": "it would hide a loss that is not finite",
    "logging_strategy": "logs come every --logging_steps steps",
    "eval_strategy": "evaluations come every --eval_steps steps",
    "save_strategy": "checkpoints come every --save_steps steps",
    "save_only_model": "a run could not be continued from such checkpoints",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint already",
    "data_seed": "the order of the data follows --seed, whatever the number of processes",
    "train_sampling_strategy": "the order of the data follows --seed, whatever the number of processes",
    "dataloader_drop_last": "the stream of samples has no short batch",
    "auto_find_batch_size": "another batch size would be another run",
    "average_tokens_across_devices": "every batch has the same number of tokens",
    "neftune_noise_alpha": "there are no embeddings of words here",
    "label_smoothing_factor": "there are no classes here",
    "use_liger_kernel": "the network has fused kernels already",
    "gradient_checkpointing_kwargs": "--checkpointing_mode says how",
    "activation_checkpointing_kwargs": "--checkpointing_mode says how",
    "dataloader_prefetch_factor": "the loader of the stream has its own; see --num_workers",
    "dataloader_persistent_workers": "the workers live as long as the run: its stream has no end of an epoch",
    "metric_for_best_model": "--load_best_model_at_end goes by the held-out loss",
    "greater_is_better": "--load_best_model_at_end goes by the held-out loss",
    "fp16_full_eval": "evaluation runs under the training's autocast",
    "bf16_full_eval": "evaluation runs under the training's autocast",
    "do_train": "`blip3o-fast train` trains and evaluates",
    "do_eval": "`blip3o-fast train` trains and evaluates",
    "do_predict": "`blip3o-fast sample` predicts",
    "fsdp": "a sharded run is a loop of your own, with blip3o_fast.training.fsdp (docs/training.md)",
    "fsdp_config": "a sharded run is a loop of your own, with blip3o_fast.training.fsdp (docs/training.md)",
    "deepspeed": "it could not be tested; what ZeRO does, blip3o_fast.training.fsdp does (docs/training.md)",
    "local_rank": "torchrun says which process this is",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # "argument --adam_epsilon/--adam-epsilon: invalid ..."
        raise ValueError(re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message))


def parse_passed_on(words: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments` from words of a command line (``["--adam_epsilon", "1e-7"]``).

    Raises ValueError naming a flag that nobody has (and the nearest that there is), one that a run of ours cannot have,
    and a value of the wrong type.
    """
    words = list(words)
    if not words:
        return {}
    for word in words:
        if not word.startswith("--"):
            continue
        name = word[2:].split("=")[0]
        if name in OURS:
            raise ValueError(f"--{name} is --{OURS[name]} here")
        if name in REFUSED:
            raise ValueError(f"--{name} cannot be given: {REFUSED[name]}")
    if not words[0].startswith("--"):
        raise ValueError(f"Got unexpected extra argument {words[0]!r}")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(_unknown(words[0][2:].split("=")[0], ()))
    from transformers import HfArgumentParser, TrainingArguments

    # transformers' parser knows how each field is written; of its result only what was given counts.
    made: Any = HfArgumentParser
    known = {field.name for field in fields(TrainingArguments)}
    for word in words:
        if word.startswith("--") and (name := word[2:].split("=")[0]).removeprefix("no_") not in known:
            raise ValueError(_unknown(name, known))
    parser = made(TrainingArguments, add_help=False, allow_abbrev=False)
    parser.__class__ = type("Parser", (_Parser, made), {})
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    namespace, rest = parser.parse_known_args(words)
    if rest:
        raise ValueError(f"Got unexpected extra argument {rest[0]!r}")
    given = {name: value.value if isinstance(value, enum.Enum) else value for name, value in vars(namespace).items()}
    check_optimizer(str(given.get("optim", "")))
    return given


def _unknown(name: str, known: Iterable[str]) -> str:
    ours = [*(field.name for field in fields(TrainSettings)), "recipe", "config"]
    near = difflib.get_close_matches(name, [*ours, *(k for k in known if k not in REFUSED)], n=1, cutoff=0.6)
    return f"No such option: --{name}" + (f"\nhint: did you mean --{near[0]}?" if near else "")
