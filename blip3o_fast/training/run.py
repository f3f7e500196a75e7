"""`train(settings)`: the whole training job behind `blip3o-fast train`.

Order: the flags, the output folder, the device, the embeddings, the network; only then transformers is imported (which
takes seconds) and training begins. A run's folder is described in `checkpoints`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blip3o_fast import __version__, env
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.recognise import read_config
from blip3o_fast.ops import use_attention, use_backend
from blip3o_fast.training import checkpoints, estimate, group, prepare, saving
from blip3o_fast.training.arguments import TrainSettings, steps_named, warmup_steps
from blip3o_fast.training.finite import NonFiniteError
from blip3o_fast.training.optimizer_state import read_named_state
from blip3o_fast.training.resume import (
    check_same_run,
    finished_without_checkpoints,
    is_finished,
    resume_point,
    say,
    stored_normalizer,
    tell_other_length,
)
from blip3o_fast.training.yardstick_lines import yardstick_for

if TYPE_CHECKING:
    from blip3o_fast.training.trainer import BLIP3oTrainer


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train as the settings say, and leave the trained model in ``output_dir``.

    Returns:
        ``{"status": "finished" | "dry run", "step": ..., "output_dir": ..., **the last evaluation's metrics}``.

    Raises:
        ValueError: everything that is wrong with flags, folders or data, before anything is written; and
            `finite.NonFiniteError` (a ValueError) where training diverges.
        ModuleNotFoundError: without the extra ``train``.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; a checkpoint of the last finished step has been written.
    """
    settings.check()
    with use_backend(settings.backend), use_attention(settings.attention_backend):
        if (settings.backend, settings.attention_backend) != ("auto", "auto"):
            _try_backends(settings)
        return _train(settings)


def _try_backends(settings: TrainSettings) -> None:
    """A forward of a tiny network: what the backends that were named cannot do is said before any data is read."""
    device = prepare.device_for(settings)
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny")).to(device)
    x, condition = torch.zeros(1, 64, 16, device=device), torch.zeros(1, 64, 24, device=device)
    dtype = torch.float16 if settings.fp16 else torch.bfloat16
    try:
        with torch.autocast(device.type, dtype, enabled=settings.fp16 or settings.bf16):
            model(x, torch.ones(1, device=device), condition).square().mean().backward()
    except RuntimeError as error:
        names = f"--backend {settings.backend}, --attention_backend {settings.attention_backend}"
        raise ValueError(f"{names} on {device.type}: {str(error).splitlines()[0]}") from error


def _train(settings: TrainSettings) -> dict[str, Any]:
    _need_libraries()
    resume = resume_point(settings)
    earlier = checkpoints.read_run(Path(settings.output_dir)) if resume else None
    if resume is None and (steps := finished_without_checkpoints(settings)) is not None:
        return _nothing_to_do(settings, steps)
    device = prepare.device_for(settings)
    start = BLIP3oDiT.from_pretrained(settings.init_from) if settings.init_from and not resume else None
    if start is not None and settings.init_optimizer:
        read_named_state(settings.init_optimizer, start)  # what is wrong with it is said now
    data = prepare.load_data(settings, normalizer=stored_normalizer(resume) or getattr(start, "normalizer", None))
    world = int(env.read("WORLD_SIZE") or "1")
    check_same_run(settings, earlier, data, resume, world)
    steps = prepare.total_steps(settings, len(data.conditions), world)
    if resume and is_finished(settings, resume, earlier, steps):
        return _nothing_to_do(settings, checkpoints.step_of(resume), "; more with a larger --max_steps or --num_epochs")
    if (profiled := steps_named(settings.profile_steps)) and profiled[0] > steps:
        raise ValueError(f"--profile_steps {settings.profile_steps}: the run has only {steps} steps")
    if start is not None:
        config = start.config
    else:
        config = read_config(resume) if resume else prepare.config_for(settings, data)
    estimate.check_memory(settings, data, device, config, world)
    model = prepare.model_for(settings, data, start, config)
    if resume:
        tell_other_length(earlier, steps)
    say(prepare.header(settings, data, model, device, steps, world))
    if warmup_steps(settings, steps) >= steps:
        say(f"warning: --warmup_steps {settings.warmup_steps} does not end within the {steps} steps of this run")
    if resume:
        say(f"resuming    {resume}")
    if settings.dry_run:
        text, seconds = _dry_step(settings, data, model, device)
        say(f"dry run     {text}")
        say(
            estimate.plan(settings, data, model.config, device, steps, world, seconds)
            + f"\nNothing was written to {settings.output_dir}."
        )
        return {"status": "dry run", "step": 0, "output_dir": str(settings.output_dir)}
    try:
        return _run(settings, data, model, device, steps, resume, earlier)
    except BaseException:
        group.abandon()
        raise


def _nothing_to_do(settings: TrainSettings, step: int, more: str = "") -> dict[str, Any]:
    say(f"{settings.output_dir} is finished: {step} steps. Nothing to do{more}")
    return {"status": "finished", "step": step, "output_dir": str(settings.output_dir)}


def _need_libraries() -> None:
    for name in ("transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'training needs {name}: pip install "blip3o_fast[train]"', name=name)


# ---- the run ---------------------------------------------------------------------------------------------------------


def _flow_loss(settings: TrainSettings, model: BLIP3oDiT) -> Any:
    from blip3o_fast.flow.loss import FlowMatchingLoss

    return FlowMatchingLoss.from_config(
        model.config,
        distribution=settings.timestep_sampling,
        logit_mean=settings.logit_mean,
        logit_std=settings.logit_std,
        shift=settings.timestep_shift,
        condition_dropout=settings.condition_dropout,
        regularization_weight=settings.regularization_weight,
        weighting=settings.loss_weighting,
    )


def _dry_step(settings: TrainSettings, data: prepare.Data, model: BLIP3oDiT, device: torch.device) -> tuple[str, float]:
    """Forward and backward of the first batch, twice: what happened, and the seconds of a step by the second."""
    from blip3o_fast.training.streamed import order_for

    model.to(device)
    pictures = order_for(data.conditions, settings.seed).pictures(0, settings.batch_size)
    dtype = torch.float16 if settings.fp16 else torch.bfloat16
    for _ in range(2):  # the first one also warms up
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=settings.fp16 or settings.bf16):
            loss, _ = _flow_loss(settings, model)(
                model,
                data.targets[pictures].to(device),
                data.conditions[pictures].to(device),
                seed=settings.seed,
                sample_index=0,
            )
        loss.backward()
        value = float(loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if device.type == "cuda" else ""
    text = f"one batch forward and backward works, loss {value:.4f}{memory}"
    return text, seconds * settings.gradient_accumulation_steps


def _run(
    settings: TrainSettings,
    data: prepare.Data,
    model: BLIP3oDiT,
    device: torch.device,
    steps: int,
    resume: Path | None,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    output = Path(settings.output_dir)
    from blip3o_fast.training.callbacks import MetricsFile, Progress, StepCallback, StopRequest
    from blip3o_fast.training.quality import generation_quality
    from blip3o_fast.training.trainer import BLIP3oTrainer
    from blip3o_fast.training.trainer_args import training_arguments
    from blip3o_fast.training.validation import Validation
    from blip3o_fast.training.watch import step_cost, watchers

    watching = watchers(settings, resume, evaluates=bool(len(data.held_out_conditions)))
    lines = (earlier or {}).get("yardstick") or yardstick_for(settings, data, model.config)
    say(_yardstick_line(lines))
    quality = generation_quality(settings, data)
    validation = None
    if len(data.held_out_conditions):
        validation = Validation(
            data.held_out_conditions,
            data.held_out_targets,
            model.config,
            settings.eval_batch_size,
            lines["linear_at_levels"],
            quality,
        )
    args = training_arguments(
        settings, total_steps=steps, on_cpu=device.type == "cpu", evaluates=validation is not None
    )
    if settings.compile_model:
        model.compile()
    trainer = BLIP3oTrainer(
        model,
        args,
        conditions=data.conditions,
        targets=data.targets,
        loss_function=_flow_loss(settings, model),
        validation=validation,
        ema_decay=settings.ema_decay,
        linear_loss=lines["training"],
        max_bad_steps=settings.max_bad_steps,
        keys=data.keys,
        init_optimizer=None if resume else settings.init_optimizer,
        record={"settings": settings.to_dict(), "data": data.describe(), "versions": _versions()},
        cost=step_cost(settings, data, model, device),
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    stop = StopRequest()
    progress = Progress()
    keep, best = settings.save_total_limit, settings.load_best_model_at_end
    trainer.add_callback(StepCallback(trainer, stop, keep, keep_best=best))
    trainer.add_callback(MetricsFile(output / checkpoints.METRICS_FILE))
    for callback in watching:
        trainer.add_callback(callback)
    if settings.progress is not False:
        trainer.add_callback(progress)

    run = {
        "format_version": 1,
        "status": "running",
        "job": group.job(),
        "steps": steps,
        "world_size": args.world_size,
        "effective_batch": prepare.effective_batch(settings, args.world_size),
        "settings": settings.to_dict(),
        "data": data.describe(),
        "yardstick": lines,
        "versions": _versions(),
    }
    main = trainer.is_world_process_zero()
    if main:
        checkpoints.write_json(output / checkpoints.RUN_FILE, run)
        saving.point_to_interrupted(output, None)
        for aside in checkpoints.set_aside(output, resume):
            say(f"note: {aside} comes from steps that are now made again; it is not used, delete it at will")
    try:
        with stop.listening():
            if resume and checkpoints.step_of(resume) >= steps:
                trainer.restore(resume)  # only the final model was missing, and perhaps the last clearing
                if main:
                    checkpoints.rotate(output, keep, keep_best=best)
            else:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except NonFiniteError as error:  # on every rank at the same step
        if main:
            checkpoints.write_json(output / checkpoints.RUN_FILE, run | {"status": "stopped", "reason": str(error)})
        group.leave()
        raise
    except torch.OutOfMemoryError as error:
        raise ValueError(_out_of_memory(settings, error)) from error
    finally:
        progress.close()
    step = trainer.state.global_step
    if stop.requested and step < steps:
        if main:
            checkpoints.write_json(output / checkpoints.RUN_FILE, run | {"status": "interrupted"})
            saving.point_to_interrupted(output, checkpoints.last_whole(output))
        say(f"stopped at step {step} of {steps}; continue with --resume_from_checkpoint auto")
        group.leave()
        raise KeyboardInterrupt
    last = _finish(trainer, output, run, quality, best=best) if main else {}
    if main:
        checkpoints.write_json(output / checkpoints.RUN_FILE, run | {"status": "finished", "result": last})
        say(f"trained model: {output}")
    group.leave()
    return {**last, "status": "finished", "step": step, "output_dir": str(output)}


def _out_of_memory(settings: TrainSettings, error: Exception) -> str:
    half = max(1, settings.batch_size // 2)
    more = settings.gradient_accumulation_steps * 2
    also = "" if settings.gradient_checkpointing else ", or add --gradient_checkpointing"
    return (
        f"out of GPU memory: {str(error).splitlines()[0]}\n"
        f"hint: the same training with less memory: --batch_size {half} --gradient_accumulation_steps {more}{also}"
    )


def _yardstick_line(lines: dict[str, Any]) -> str:
    values = ", ".join(
        f"{text} {lines[name]['overall']:.4f}"
        for name, text in (
            ("zero", "zero"),
            ("mean", "mean"),
            ("linear_unconditional", "linear without condition"),
            ("linear_conditional", "linear"),
        )
    )
    return f"yardstick   loss of predicting {values}: a network that works ends below the last"


def _finish(trainer: BLIP3oTrainer, output: Path, run: dict[str, Any], quality: Any, *, best: bool) -> dict[str, Any]:
    """The trained model at the root of the run's folder, the plot and the report. Returns the model's evaluation."""
    if best and (chosen := checkpoints.best_whole(output)) is not None:
        trainer.restore(chosen)
        say(f"best model: {chosen.name}, held-out loss {checkpoints.read_state(chosen)['eval_loss']:.4f}")
    if trainer.ema is not None:
        trainer.ema.copy_to(trainer.model)
    trainer.model.eval()
    trainer.save_model(str(output))
    entries = checkpoints.read_metrics(output / checkpoints.METRICS_FILE)
    try:
        from blip3o_fast.training.neighbours import neighbours_of
        from blip3o_fast.training.plots import plot_loss
        from blip3o_fast.training.report import write_report

        say(f"loss curve: {plot_loss(entries, output / 'loss.png', yardstick=run['yardstick'])}")
        say(f"report: {write_report(output, entries, run, neighbours_of(quality))}")
    except ModuleNotFoundError as error:
        say(f'no loss curve and no report: {error.name} is not installed (pip install "blip3o_fast[report]")')
    return saving.evaluation_of(entries, trainer.state.global_step)


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"blip3o_fast": __version__, "python": platform.python_version(), **versions}
