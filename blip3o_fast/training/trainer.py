"""BLIP3oTrainer: the HuggingFace Trainer for a flow-matching model of embeddings.

What differs from the Trainer, and why:

- the batches come from a stateless stream (`stream`), so a run is continued in no time and bit for bit;
- a loss or gradient norm that is not finite stops the run with an error that names the step. The Trainer would log a
  loss of 0.0 and train NaN weights to the end;
- `evaluate` measures the velocity error at fixed noise levels and fixed noise (`validation`);
- a checkpoint also holds config.json, normalizer.safetensors and the averaged weights, and no pickled arguments; it
  counts as whole only when its last file is written (`checkpoints`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainingArguments

from blip3o_fast.models.reading import read_weights
from blip3o_fast.training import checkpoints, fsdp, group
from blip3o_fast.training.ema import EMA
from blip3o_fast.training.finite import FiniteWatch
from blip3o_fast.training.parts import Sized, Window, without_config
from blip3o_fast.training.stream import BatchStream, SampleOrder, stream_loader
from blip3o_fast.training.validation import Validation

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class BLIP3oTrainer(Trainer):
    """Trains ``model`` on in-memory embeddings.

    Args:
        model: called as ``model(x_t, timestep, encoder_hidden_states, ...)`` by the loss function.
        args: transformers' TrainingArguments; `arguments.training_arguments` makes suitable ones.
        conditions, targets: ``[n, T, E]`` and ``[n, T, C]`` of the training pictures, as the network sees them
            (normalised), on the CPU.
        loss_function: ``(model, data, encoder_hidden_states, *, seed, sample_index) -> (loss, metrics)``; sample_index
            is the global index of the first sample, metrics are 0-d on the device. `flow.FlowMatchingLoss`.
        validation: what `evaluate` measures, or None.
        ema_decay: of the float32 average of the weights; 0: none.
        linear_loss: the training loss of the best linear velocity (`flow.yardstick`); with it the log
            has ``loss_over_linear``.
        callbacks: as in the Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        conditions: Tensor,
        targets: Tensor,
        loss_function: LossFunction,
        validation: Validation | None = None,
        ema_decay: float = 0.0,
        linear_loss: float | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        if len(conditions) != len(targets) or not len(conditions):
            raise ValueError(
                f"conditions and targets must be equally many and at least 1, got {len(conditions)} and {len(targets)}"
            )
        if args.remove_unused_columns:
            raise ValueError("args.remove_unused_columns must be False: the batches are not forward()'s arguments")
        fsdp.check_trainer(args, ema_decay)
        self.conditions, self.targets = conditions, targets
        self.order = SampleOrder(len(conditions), args.seed)
        self.loss_function = loss_function
        self.validation = validation
        self.linear_loss = linear_loss
        self._sums: dict[str, Tensor] = {}
        self._sum_count = 0
        self.grad_norm: Tensor | None = None
        self.watch = FiniteWatch(Path(args.output_dir), reads_are_free=args.device.type == "cpu", scaled=args.fp16)
        self._window = Window()
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
        self._remember_grad_norm()

    # ---- data ------------------------------------------------------------------------------------------------------

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def samples_seen(self) -> int:
        return self.state.global_step * self.effective_batch

    def begin_window(self) -> None:
        """Throughput is counted from here (the first step, not the construction)."""
        self._window.start(self.samples_seen())

    def get_train_dataloader(self) -> DataLoader:
        """The stream from the present step on. Each rank reads its own part, so accelerate must not shard again."""
        accumulate = self.args.gradient_accumulation_steps
        stream = BatchStream(
            self.conditions,
            self.targets,
            self.order,
            self._train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return stream_loader(
            stream,
            self.args.max_steps * accumulate,
            lambda: self.state.global_step * accumulate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    # ---- optimizer -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices. The Trainer goes by class and name, and would decay most RMSNorms and gates."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    # ---- a step ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, metrics = self.loss_function(
            model,
            inputs["target"],
            inputs["encoder_hidden_states"],
            seed=self.args.seed,
            sample_index=inputs["sample_index"],
        )
        if model.training:
            for name, value in metrics.items():
                value = value.detach()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._sum_count += 1
        return (loss, metrics) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.value(loss, "loss", self.state.global_step + 1)
        return loss

    def check_grad_norm(self) -> None:
        """Called after clipping, before the optimizer's step."""
        if self.grad_norm is not None:
            self.watch.gradient_norm(self.grad_norm, self.state.global_step + 1)

    def _remember_grad_norm(self) -> None:
        # The Trainer keeps the clipped norm in a local variable; a callback needs it before the optimizer's step.
        clip = self.accelerator.clip_grad_norm_

        def clip_and_remember(*args: Any, **kwargs: Any) -> Tensor:
            self.grad_norm = clip(*args, **kwargs)
            return self.grad_norm

        self.accelerator.clip_grad_norm_ = clip_and_remember

    # ---- logs ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.watch.raise_if_bad()
        if "loss" in logs and self._sum_count:
            logs.update(self._drain_metrics())
            if self.linear_loss:
                logs["loss_over_linear"] = logs.get("mse", logs["loss"]) / self.linear_loss
            logs["samples"] = self.samples_seen()
            logs["samples_per_second"] = self._window.rate(self.samples_seen())
        super().log(logs, start_time)

    def _drain_metrics(self) -> dict[str, float]:
        """Means of the loss's metrics since the last log, over all ranks; one transfer for all of them."""
        names = [name for name in self._sums if name != "loss"]
        if not names:
            return {}
        values = torch.stack([self._sums[name].float().reshape(()) for name in names]) / self._sum_count
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        self._sums.clear()
        self._sum_count = 0
        return dict(zip(names, values.tolist(), strict=True))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`validation` with the averaged weights where there are some: those become the trained model."""
        if self.validation is None:
            raise ValueError("validation is None: this trainer was made without held-out data")
        with self._window.excluding(), self.evaluated_weights():
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
        self.watch.raise_if_bad()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self._window.excluding():
            if self.args.should_save:
                checkpoints.unmark(folder)
            super()._save_checkpoint(model, trial)
            if self.args.should_save and self.ema is not None:
                self.ema.save(folder)
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
