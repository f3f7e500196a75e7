"""BLIP3oTrainer: the HuggingFace Trainer for a flow-matching model of embeddings.

What differs from the Trainer, and why:

- the batches come from a stateless stream (`stream`), so a run is continued in no time and bit for bit;
- a step whose loss or gradient is not finite is left out and named, several in a row stop the run (`finite`). The
  Trainer would log a loss of 0.0 and train NaN weights to the end;
- `evaluate` measures the velocity error at fixed noise levels and fixed noise (`validation`);
- a checkpoint also holds config.json, normalizer.safetensors and the averaged weights, and no pickled arguments; it
  counts as whole only when its last file is written (`checkpoints`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments

from blip3o_fast.models.reading import read_weights
from blip3o_fast.training import checkpoints, fsdp, group, saving
from blip3o_fast.training.callbacks import EachStep
from blip3o_fast.training.clock import StepClock, StepCost
from blip3o_fast.training.diagnosis import explain
from blip3o_fast.training.ema import EMA
from blip3o_fast.training.finite import FiniteWatch, NonFiniteError
from blip3o_fast.training.loader import dead_workers_named
from blip3o_fast.training.optimizer_state import load_named_state, read_named_state
from blip3o_fast.training.optimizers import check_optimizer
from blip3o_fast.training.parts import Sized, without_config
from blip3o_fast.training.stream import stream_loader
from blip3o_fast.training.streamed import SideView, batches, order_for, to_network
from blip3o_fast.training.sums import MetricSums
from blip3o_fast.training.validation import Validation

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class BLIP3oTrainer(Trainer):
    """Trains ``model`` on embeddings, in memory or streamed from their folder.

    Args:
        model: called as ``model(x_t, timestep, encoder_hidden_states, ...)`` by the loss function.
        args: transformers' TrainingArguments; `trainer_args.training_arguments` makes suitable ones.
        conditions, targets: ``[n, T, E]`` and ``[n, T, C]`` of the training pictures, as the network sees them
            (normalised), on the CPU; or views of a folder (`streamed`), normalised on the device.
        loss_function: ``(model, data, encoder_hidden_states, *, seed, sample_index) -> (loss, metrics)``; sample_index
            is the global index of the first sample, metrics are 0-d on the device. `flow.FlowMatchingLoss`.
        validation: what `evaluate` measures, or None.
        ema_decay: of the float32 average of the weights; 0: none.
        linear_loss: the training loss of the best linear velocity (`flow.yardstick`); with it the log
            has ``loss_over_linear``.
        max_bad_steps: so many steps in a row whose loss or gradient is not finite stop the run (`finite`).
        keys: names of the training pictures, for such a message.
        record: settings, data and versions, kept in each checkpoint's state.json.
        init_optimizer: what `optimizer_state.read_named_state` takes: the state that the optimizer begins with.
        cost: of a sample, for tokens per second and MFU in the log; None: neither.
        callbacks: as in the Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        conditions: Tensor | SideView,
        targets: Tensor | SideView,
        loss_function: LossFunction,
        validation: Validation | None = None,
        ema_decay: float = 0.0,
        linear_loss: float | None = None,
        max_bad_steps: int = 3,
        keys: Sequence[str] | None = None,
        record: dict[str, Any] | None = None,
        init_optimizer: str | Path | None = None,
        cost: StepCost | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        if len(conditions) != len(targets) or not len(conditions):
            raise ValueError(
                f"conditions and targets must be equally many and at least 1, got {len(conditions)} and {len(targets)}"
            )
        if args.remove_unused_columns:
            raise ValueError("args.remove_unused_columns must be False: the batches are not forward()'s arguments")
        check_optimizer(args.optim)
        fsdp.check_trainer(args, ema_decay)
        self.conditions, self.targets = conditions, targets
        self.order = order_for(conditions, args.seed)
        self.replaced = 0  # pictures of bad shards, for which others stood (streaming with on_bad_shard="skip")
        self.loss_function = loss_function
        self.validation = validation
        self.linear_loss = linear_loss
        self.keys, self.init_optimizer = keys, init_optimizer
        self.record = {} if record is None else record
        self.last_evaluation: tuple[int, float] = (-1, 0.0)  # step and loss
        self.sums = MetricSums()
        self.grad_norm: Tensor | None = None
        self.watch = FiniteWatch(max_bad_steps, reads_are_free=args.device.type == "cpu", scaled=args.fp16)
        self.clock, self.cost = StepClock(args.device), cost
        with without_config(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=Sized(len(conditions)),
                eval_dataset=Sized(len(validation.pictures)) if validation is not None else None,
                callbacks=callbacks,
            )
        group.settle_ddp(self, args.gradient_accumulation_steps)
        # Its guess from forward()'s signature would change how accumulated losses are scaled.
        self.model_accepts_loss_kwargs = False
        self.ema = EMA(model, ema_decay) if ema_decay else None
        self.add_callback(EachStep(self))
        self._remember_grad_norm()

    # ---- data ------------------------------------------------------------------------------------------------------

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def samples_seen(self) -> int:
        return self.state.global_step * self.effective_batch

    def get_train_dataloader(self) -> DataLoader:
        """The stream from the present step on. Each rank reads its own part, so accelerate must not shard again."""
        accumulate = self.args.gradient_accumulation_steps
        stream = batches(
            self.conditions,
            self.targets,
            self.order,
            self._train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            workers=self.args.dataloader_num_workers,
        )
        return stream_loader(
            stream,
            self.args.max_steps * accumulate,
            lambda: self.state.global_step * accumulate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """To the device; from pinned memory without the host waiting for what the device has still to do."""
        if isinstance(data, Tensor) and data.is_pinned() and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # ---- optimizer -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices. The Trainer goes by class and name, and would decay most RMSNorms and gates."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.init_optimizer is not None:
            load_named_state(self.model, optimizer, read_named_state(self.init_optimizer, self.model))
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with dead_workers_named():
            return super().train(*args, **kwargs)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.replaced += inputs.get("replaced", 0)
        with self.clock.forward():
            loss, metrics = self.loss_function(
                model,
                *to_network(inputs, self.conditions, self.targets),
                seed=self.args.seed,
                sample_index=inputs["sample_index"],
            )
        if model.training:
            self.sums.add(loss, metrics)
            loss = self.watch.gated(loss)
        return (loss, metrics) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The Trainer's running sum would never get rid of a NaN.
        return torch.where(torch.isfinite(loss), loss, 0)

    def check_grad_norm(self) -> None:
        """Called after clipping, before the optimizer's step, which a bad step is kept from."""
        if self.grad_norm is not None:
            self.watch.judge(self.grad_norm, self.state.global_step + 1, self.optimizer)

    def tell_bad_steps(self) -> None:
        """Name the steps that were left out since the last call; NonFiniteError where the limit is reached."""
        should_log = self.control.should_log  # a log of ours must not stand for that of the step
        for bad in self.watch.news():
            if self.is_world_process_zero():
                print(f"step {bad.step}: {bad.what} is not finite; the step was left out", flush=True)
            kind = "loss" if bad.what == "loss" else "gradient"
            super().log({"skipped_step": bad.step, f"skipped_for_{kind}": 1, "skipped_steps": self.watch.total})
        self.control.should_log = should_log
        if self.watch.limit_reached:
            raise NonFiniteError(explain(self))

    def _remember_grad_norm(self) -> None:
        # The Trainer keeps the clipped norm in a local variable; a callback needs it before the optimizer's step.
        clip = self.accelerator.clip_grad_norm_

        def clip_and_remember(*args: Any, **kwargs: Any) -> Tensor:
            self.grad_norm = clip(*args, **kwargs)
            return self.grad_norm

        self.accelerator.clip_grad_norm_ = clip_and_remember

    # ---- logs ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.tell_bad_steps()
        if "loss" in logs and self.sums.count:
            self.sums.log(logs, self._mean_over_ranks)
            if self.watch.total:
                logs["skipped_steps"] = self.watch.total
            if self.linear_loss and "loss" in logs:
                logs["loss_over_linear"] = logs.get("mse", logs["loss"]) / self.linear_loss
            if self.replaced:
                logs["replaced_pictures"] = self.replaced
            logs["samples"] = self.samples_seen()
            gather = self.accelerator.gather if self.args.world_size > 1 else None
            logs.update(self.clock.read(self.samples_seen(), gather, self.cost))
        super().log(logs, start_time)

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean") if self.args.world_size > 1 else values

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`validation` with the averaged weights where there are some: those become the trained model."""
        if self.validation is None:
            raise ValueError("validation is None: this trainer was made without held-out data")
        with self.clock.excluding(), self.evaluated_weights():
            # model_wrapped carries accelerate's autocast; unwrapped DDP, because no gradient is exchanged.
            wrapped: Any = self.model_wrapped
            model = getattr(wrapped, "module", wrapped)
            metrics = self.validation.run(
                model,
                self.args.device,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                reduce=self._sum_over_ranks if self.args.world_size > 1 else None,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if f"{metric_key_prefix}_loss" in metrics:
            self.last_evaluation = self.state.global_step, metrics[f"{metric_key_prefix}_loss"]
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """The model in eval mode with the weights that the finished run will have."""
        training = self.model.training
        self.model.eval()
        try:
            if self.ema is not None and self.ema.updates:
                with self.ema.applied(self.model):
                    yield
            else:
                yield
        finally:
            self.model.train(training)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """For `predict`: the training loss of a batch without gradients."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if state_dict is None and hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            from safetensors.torch import save_file

            state = model.state_dict() if state_dict is None else state_dict
            state = {name: value.detach().contiguous() for name, value in state.items()}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            if hasattr(getattr(model, "config", None), "to_dict"):
                checkpoints.write_json(folder / "config.json", model.config.to_dict())
            if getattr(model, "normalizer", None) is not None:
                model.normalizer.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.tell_bad_steps()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self.clock.excluding(), saving.whole_or_nothing(folder):
            if self.args.should_save:
                checkpoints.unmark(folder)
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                if self.ema is not None:
                    self.ema.save(folder)
                saving.write_state(folder, self)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.mark_complete(folder, self.state.global_step)

    def restore(self, folder: str | Path) -> None:
        """Weights, average and step of a checkpoint, without training on."""
        self._load_from_checkpoint(str(folder))
        self.state.global_step = checkpoints.step_of(Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        weights = read_weights(Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            fsdp.load_whole(target, weights)
        else:
            target.load_state_dict(weights, strict=True)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)
        saving.restore_state(Path(resume_from_checkpoint), self)
