"""TrainSettings: every flag of `blip3o-fast train`, its default, and what is wrong with it before anything starts.

Names and defaults are those of the original training script where it had the flag.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from blip3o_fast.data.splits import default_rule
from blip3o_fast.flow.timesteps import check_distribution
from blip3o_fast.flow.weighting import WEIGHTINGS
from blip3o_fast.models.checkpointing import MODES as CHECKPOINTING_MODES
from blip3o_fast.models.normalizer import parse_spec
from blip3o_fast.ops._attention import NAMES as ATTENTION
from blip3o_fast.ops._backend import NAMES as BACKENDS

LR_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
DEVICES = ("auto", "cpu", "cuda")
TRACKERS = ("wandb", "tensorboard", "none")
DEFAULT_WARMUP = 1000

# Without any of these, --debug trains the preset `small`.
SIZES = (
    *("preset", "model_dim", "num_layers", "num_heads", "num_kv_heads", "multiple_of", "ffn_dim_multiplier"),
    "init_from",
)

# What may differ when a run is continued: nothing here changes the numbers that the run produces. Batch size and
# accumulation are compared as a product with the number of processes, the effective batch; epochs and steps are told.
FREE_ON_RESUME = frozenset(
    {
        "batch_size", "gradient_accumulation_steps", "eval_batch_size", "num_workers", "logging_steps", "save_steps",
        "eval_steps", "eval_generation_samples", "guidance_scale", "num_inference_steps", "save_total_limit",
        "max_bad_steps", "load_best_model_at_end", "wandb_project", "wandb_run_name", "no_wandb", "device",
        "compile_model", "gradient_checkpointing", "checkpointing_mode", "resume_from_checkpoint", "debug", "dry_run",
        "output_dir", "embeddings_path", "init_from", "init_optimizer", "max_steps", "num_epochs", "progress",
        "normalize_embeddings", "backend", "attention_backend", "force", "report_to", "profile_steps", "on_bad_shard",
    }
)  # fmt: skip

# Of transformers' own: what only watches or waits.
FREE_PASSED_ON = frozenset({"ddp_timeout", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step"})


@dataclass
class TrainSettings:
    """Settings of one training run. `None` means "decided when the embeddings are known"; see each group."""

    embeddings_path: str | Path
    output_dir: str | Path

    # Network. With a preset, the sizes given beside it replace the preset's; without one, `None` is the original's
    # width 1792, 24 layers, 28 heads. Channels and grid always come from the embeddings.
    preset: str | None = None
    model_dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    multiple_of: int | None = None
    ffn_dim_multiplier: float | None = None
    context_projection: bool | None = None
    init_from: str | None = None  # folder or hub name of a trained model whose weights are the start
    init_optimizer: str | None = None  # and the state of its optimizer, see `optimizer_state`
    gradient_checkpointing: bool = False
    checkpointing_mode: str = "block"  # what --gradient_checkpointing makes again: whole blocks, or the cheap ops only

    # Optimisation. `max_steps` wins over `num_epochs`.
    num_epochs: float = 10
    max_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int | None = None  # None: 1000, but at most a tenth of the run
    warmup_ratio: float | None = None  # of the run's steps, instead of warmup_steps
    lr_scheduler: str = "cosine"
    min_learning_rate: float = 0.0  # where the cosine ends
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999  # 0 turns the average off
    max_bad_steps: int = 3  # in a row whose loss or gradient is not finite; each one is left out
    seed: int = 42

    # Flow matching
    sigma_min: float = 1e-4
    sigma_max: float = 1.0
    prediction_type: str = "v_prediction"
    schedule_type: str = "linear"
    regularization_weight: float = 0.0
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 1.0
    condition_dropout: float = 0.1
    loss_weighting: str = "none"

    # Data
    subset_size: int | None = None  # of the train split; the normalisation comes from all of it
    eval_split: float = 0.1
    normalize: str = "none"
    normalize_embeddings: bool = False  # the original's flag: the same as normalize="l2"
    num_workers: int = 0
    loading: str = "auto"  # memory, stream (from a folder of shards), or auto: by the folder's size
    split: str = "auto"  # random, hash (of each picture's key), or auto: what the set says (data.splits)
    on_bad_shard: str = "stop"  # or skip; streaming only

    # Logging, evaluation, checkpoints
    logging_steps: int = 100
    save_steps: int = 1000
    eval_steps: int = 1000
    eval_generation_samples: int = 16  # held-out pictures generated at each evaluation; 0: none
    guidance_scale: float = 2.0
    num_inference_steps: int = 20
    save_total_limit: int | None = 3
    load_best_model_at_end: bool = False  # the trained model is the checkpoint with the lowest held-out loss
    wandb_project: str = "blip3o-dit"
    wandb_run_name: str | None = None
    no_wandb: bool = False
    report_to: str | None = None  # of TRACKERS, with commas; None: wandb where it is ready
    profile_steps: str | None = None  # first:last, both included
    progress: bool | None = None  # None: a bar on a terminal, one line per log elsewhere; False: silent

    # Hardware
    fp16: bool = False
    bf16: bool = False
    device: str = "auto"
    compile_model: bool = False
    backend: str = "auto"
    attention_backend: str = "auto"

    # Other
    resume_from_checkpoint: str | None = None  # "auto", or a checkpoint folder
    debug: bool = False
    dry_run: bool = False
    force: bool = False  # begin although the estimate says that the memory does not suffice
    # More of transformers' TrainingArguments, by their names there (`passed_on`).
    training_arguments: dict[str, Any] = field(default_factory=dict, metadata={"flag": False})

    def __post_init__(self) -> None:
        self.embeddings_path = Path(self.embeddings_path)
        self.output_dir = Path(self.output_dir)
        if self.debug:
            self.subset_size = min(self.subset_size or 1000, 1000)
            self.num_epochs = min(self.num_epochs, 2)
            for name, steps in (("logging_steps", 10), ("save_steps", 100), ("eval_steps", 100)):
                if getattr(self, name) == getattr(TrainSettings, name):  # a number that was given stays
                    setattr(self, name, steps)
            self.no_wandb = True
            if all(getattr(self, name) is None for name in SIZES):
                self.preset = "small"
        if self.normalize_embeddings and self.normalize == "none":
            self.normalize = "l2"

    def split_rule(self) -> str:
        """``"random"`` or ``"hash"``: as asked for, else what the set says (`data.splits.default_rule`)."""
        return default_rule(self.embeddings_path) if self.split == "auto" else self.split

    def check(self) -> None:
        """Raise one ValueError that names every bad flag, what it is and what is allowed."""
        problems = [
            f"--{name} must be {allowed}, got {getattr(self, name)!r}"
            for name, good, allowed in self._rules()
            if not good
        ]
        if self.normalize_embeddings and self.normalize != "l2":
            problems.append(f"--normalize_embeddings means --normalize l2, but --normalize is {self.normalize!r}")
        if self.init_optimizer and not self.init_from:
            problems.append("--init_optimizer needs --init_from: an optimizer's state belongs to the weights")
        if self.fp16 and self.bf16:
            problems.append("--fp16 and --bf16 exclude each other: give one of them")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            problems.append("--warmup_steps and --warmup_ratio exclude each other: give one of them")
        if self.min_learning_rate and self.lr_scheduler != "cosine":
            problems.append(f"--min_learning_rate belongs to --lr_scheduler cosine, got {self.lr_scheduler!r}")
        if self.loss_weighting != "none" and self.regularization_weight:
            problems.append("--loss_weighting and --regularization_weight exclude each other: give one of them")
        if self.load_best_model_at_end and (self.eval_split == 0 or self.save_steps % self.eval_steps):
            problems.append(
                "--load_best_model_at_end needs an evaluation at each checkpoint: --eval_split above 0, --save_steps a "
                f"multiple of --eval_steps; got {self.eval_split}, {self.save_steps} and {self.eval_steps}"
            )
        for check in (
            lambda: parse_spec(self.normalize),
            lambda: trackers_named(self.report_to),
            lambda: steps_named(self.profile_steps),
            lambda: check_distribution(self.timestep_sampling, self.logit_mean, self.logit_std, self.timestep_shift),
        ):
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
        if self.no_wandb and "wandb" in str(self.report_to):
            problems.append(f"--no_wandb and --report_to {self.report_to} exclude each other: give one of them")
        if problems:
            raise ValueError("\n".join(problems))

    def _rules(self) -> list[tuple[str, bool, str]]:
        def whole(name: str, least: int, optional: bool = False) -> tuple[str, bool, str]:
            value = getattr(self, name)
            good = (value is None and optional) or (type(value) is int and value >= least)
            return name, good, f"a whole number >= {least}"

        def number(name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> tuple[str, bool, str]:
            value = getattr(self, name)
            good = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
            good = good and not (open_low and value == low)
            bracket = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            return name, good, f"a number {bracket}"

        def one_of(name: str, choices: tuple[str, ...]) -> tuple[str, bool, str]:
            return name, getattr(self, name) in choices, "one of " + ", ".join(choices)

        rules = [
            whole(name, 1)
            for name in (
                "batch_size", "eval_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps",
                "eval_steps", "num_inference_steps", "max_bad_steps",
            )
        ]  # fmt: skip
        rules += [
            whole(name, 1, optional=True)
            for name in (
                "model_dim", "num_layers", "num_heads", "num_kv_heads", "multiple_of", "max_steps", "subset_size",
                "save_total_limit",
            )
        ]  # fmt: skip
        rules += [
            whole("warmup_steps", 0, optional=True),
            whole("num_workers", 0),
            whole("seed", 0),
            whole("eval_generation_samples", 0),
            number("num_epochs", 0, open_low=True),
            number("learning_rate", 0, open_low=True),
            number("weight_decay", 0),
            number("max_grad_norm", 0, open_low=True),
            number("adam_beta1", 0, 0.999999),
            number("adam_beta2", 0, 0.999999),
            number("ema_decay", 0, 0.999999),
            number("sigma_min", 0, 0.999999),
            number("sigma_max", 0, 1, open_low=True),
            number("regularization_weight", 0),
            number("min_learning_rate", 0, self.learning_rate if _is_number(self.learning_rate) else math.inf),
            ("warmup_ratio", self.warmup_ratio is None or number("warmup_ratio", 0, 1)[1], "a number >= 0 and <= 1"),
            number("condition_dropout", 0, 1),
            number("eval_split", 0, 0.9),
            number("guidance_scale", 0),
            one_of("lr_scheduler", LR_SCHEDULERS),
            one_of("device", DEVICES),
            one_of("loading", ("auto", "memory", "stream")),
            one_of("split", ("auto", "random", "hash")),
            one_of("on_bad_shard", ("stop", "skip")),
            one_of("checkpointing_mode", CHECKPOINTING_MODES),
            one_of("prediction_type", ("v_prediction", "epsilon")),
            one_of("schedule_type", ("linear", "cosine")),
            one_of("loss_weighting", WEIGHTINGS),
            one_of("backend", BACKENDS),
            one_of("attention_backend", ATTENTION),
        ]
        return rules

    def to_dict(self) -> dict[str, Any]:
        """For run.json: paths as strings."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Settings in which continuing an earlier run would change what it computes, one line each."""
        mine, theirs = self.to_dict(), dict(earlier)
        for settings in (mine, theirs):
            more = dict(settings.get("training_arguments") or {})
            settings["training_arguments"] = {name: more[name] for name in more if name not in FREE_PASSED_ON}
        lines = [
            f"--{field.name}: the run has {theirs[field.name]!r}, now {mine[field.name]!r}"
            for field in fields(self)
            if field.name not in FREE_ON_RESUME and field.name in theirs and theirs[field.name] != mine[field.name]
        ]
        return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def warmup_steps(settings: TrainSettings, total_steps: int) -> int:
    """The warmup in steps: as given, or the original's 1000 but at most a tenth of the run."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * total_steps)
    return min(DEFAULT_WARMUP, total_steps // 10)


def trackers_named(report_to: str | None) -> tuple[str, ...] | None:
    """``"wandb,tensorboard"`` as names, None for None; ValueError for a name that is none of TRACKERS."""
    if report_to is None:
        return None
    names = tuple(name.strip() for name in str(report_to).split(","))
    if not set(names) <= set(TRACKERS) or ("none" in names and len(names) > 1):
        raise ValueError(f"--report_to must be none, wandb, tensorboard or wandb,tensorboard, got {report_to!r}")
    return () if names == ("none",) else names


def steps_named(profile_steps: str | None) -> tuple[int, int] | None:
    """``"10:15"`` as (10, 15), None for None; ValueError for anything but first:last with 1 <= first <= last."""
    if profile_steps is None:
        return None
    first, _, last = str(profile_steps).partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile_steps must be first:last with 1 <= first <= last (10:15), got {profile_steps!r}")
    return int(first), int(last)
