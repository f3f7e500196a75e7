"""Why was a step's loss or gradient not finite? The step is computed again, sample by sample and op by op.

A bad step left the weights alone, its samples are found by its number, and noise and sigma are functions of the
sample's number: so the same numbers come out again, after the fact and only in a run that is about to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip3o_fast.training import checkpoints
from blip3o_fast.training.streamed import SideView, names_of, to_network

if TYPE_CHECKING:
    from blip3o_fast.training.trainer import BLIP3oTrainer

NAMED = 8  # so many samples and parameters are named


class FirstNonFinite(TorchDispatchMode):
    """Inside, the first op whose result is not finite though its inputs are, and where it was.

    It sees every dispatched op, of the forward and of the backward pass, and the fused ones whole. An infinity may be
    meant (a mask), a NaN never is: the first of each is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nan: str | None = None
        self.infinity: str | None = None
        self.phase = "forward"
        self._names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self._last_weight: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        weights = [self._names[leaf.data_ptr()] for leaf in inputs if leaf.data_ptr() in self._names]
        had_nan, had_infinity = _any(torch.isnan, inputs), _any(torch.isinf, inputs)
        result = func(*args, **(kwargs or {}))
        self._last_weight = weights[-1] if weights else self._last_weight
        if not inputs or "empty" in str(func):  # memory that nothing was written to yet
            return result
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self.nan is None and not had_nan and _any(torch.isnan, results):
            self.nan = self._place(func, weights)
        if self.infinity is None and not had_infinity and not had_nan and _any(torch.isinf, results):
            self.infinity = self._place(func, weights)
        return result

    def _place(self, func: Any, weights: list[str]) -> str:
        name = str(func).removesuffix(".default")
        if weights:
            return f"{name} with {', '.join(weights[:3])} ({self.phase})"
        return f"{name} ({self.phase}" + (f", after the op with {self._last_weight})" if self._last_weight else ")")


def _any(test: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> bool:
    return any(t.is_floating_point() and bool(test(t).any()) for t in tensors)


def diagnose(
    model: nn.Module,
    loss_of: Callable[[dict[str, Any]], Tensor],
    batches: Iterator[tuple[dict[str, Any], list[str]]],
) -> list[str]:
    """Lines that say which samples, which op and which gradients of a step are not finite.

    model: unwrapped, with the weights that the step saw. loss_of: a batch -> its 0-d loss.
    batches: the step's micro-batches on the device, as `BatchStream` makes them, and their samples' names.
    """
    lines: list[str] = []
    for batch, keys in batches:
        bad = [i for i in range(len(keys)) if not _step_is_finite(model, loss_of, _sample(batch, i))]
        whole = not bad
        if whole and _step_is_finite(model, loss_of, batch):
            continue
        if not whole:
            lines.append("samples: " + _list([keys[i] for i in bad]) + f" of a batch of {len(keys)}")
        else:
            lines.append("samples: none alone, only the whole batch of " + _list(keys))
        lines += _where(model, loss_of, batch if whole else _sample(batch, bad[0]))
        break  # the first bad micro-batch says enough
    return lines


def _where(model: nn.Module, loss_of: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any]) -> list[str]:
    not_finite = [name for name, value in batch.items() if isinstance(value, Tensor) and not _finite(value)]
    lines = [f"data: {' and '.join(not_finite)} not finite" if not_finite else "data: finite"]
    if bad_weights := [name for name, parameter in model.named_parameters() if not _finite(parameter)]:
        lines.append(f"weights: {_list(bad_weights)} not finite before the step")
    names, parameters = _trained(model)
    with FirstNonFinite(model) as first:
        loss = loss_of(batch)
        first.phase = "backward"
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    places = [f"first {what} from {place}" for what, place in (("inf", first.infinity), ("NaN", first.nan)) if place]
    lines.append("op: " + ("; ".join(places) if places else "none by itself"))
    bad = [name for name, value in zip(names, gradients, strict=True) if value is not None and not _finite(value)]
    # Backward runs from the last to the first: the last of the bad ones is where it began.
    begun = f", the first on the way back {bad[-1]}" if bad else ""
    lines.append(f"loss: {float(loss.detach())}; gradients: {len(bad)} of {len(names)} parameters not finite{begun}")
    return lines


def _step_is_finite(model: nn.Module, loss_of: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any]) -> bool:
    loss = loss_of(batch)
    if not _finite(loss.detach()):
        return False
    gradients = torch.autograd.grad(loss, _trained(model)[1], allow_unused=True)
    return all(value is None or _finite(value) for value in gradients)


def _trained(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    pairs = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name, _ in pairs], [parameter for _, parameter in pairs]


def _sample(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """One sample of a batch, with the noise and sigma that it had in it."""
    one = {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    if isinstance(batch["sample_index"], int):  # of the first sample; the others follow
        one["sample_index"] = batch["sample_index"] + i
    return one


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _list(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


# ---- the message that stops a run ------------------------------------------------------------------------------------


def explain(trainer: BLIP3oTrainer) -> str:
    """What to say when too many steps in a row were bad. With several ranks all must call it."""
    row = trainer.watch.row
    last = checkpoints.last_good(Path(trainer.args.output_dir))
    steps = ", ".join(f"{bad.step} ({bad.what})" for bad in row)
    found: list[str] = _computed_again(trainer, row[0].step)
    if trainer.args.world_size > 1:
        of_all: list[Any] = [None] * trainer.args.world_size
        dist.all_gather_object(of_all, found)
        found = [f"rank {rank}, {line}" for rank, lines in enumerate(of_all) for line in lines]
    return "\n".join(
        [
            f"loss or gradient was not finite {len(row)} steps in a row: {steps}; none of them was taken, training "
            f"stopped ({f'the last good checkpoint is {last}' if last else 'there is no good checkpoint yet'})",
            f"step {row[0].step}, computed again:",
            *(f"  {line}" for line in found or ["finite this time: the cause is outside the samples and the weights"]),
            "likely causes: a learning rate that is too high, NaN in the embeddings, fp16 overflow",
        ]
    )


def _computed_again(trainer: BLIP3oTrainer, step: int) -> list[str]:
    wrapped: Any = trainer.model_wrapped
    model = getattr(wrapped, "module", wrapped)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return ["not done: the parameters are sharded over the ranks"]
    accumulate = trainer.args.gradient_accumulation_steps

    def loss_of(batch: dict[str, Any]) -> Tensor:
        return trainer.loss_function(
            model,
            *to_network(batch, trainer.conditions, trainer.targets),
            seed=trainer.args.seed,
            sample_index=batch["sample_index"],
        )[0]

    def batches() -> Iterator[tuple[dict[str, Any], list[str]]]:
        stream = trainer.get_train_dataloader().dataset
        for micro_batch in range((step - 1) * accumulate, step * accumulate):
            batch = stream[micro_batch]
            pictures = trainer.order.pictures(batch["sample_index"], len(batch["target"]))
            yield trainer._prepare_inputs(batch), _names(trainer, pictures)

    try:
        return diagnose(model, loss_of, batches())
    except Exception as error:  # the run stops for another reason, which must be told
        return [f"not possible: {type(error).__name__}: {error}"]


def _names(trainer: BLIP3oTrainer, pictures: Tensor) -> list[str]:
    if trainer.keys is not None:
        return [trainer.keys[picture] for picture in pictures.tolist()]
    if isinstance(trainer.conditions, SideView):
        each, places = pictures.unique(return_inverse=True)  # a batch over the end of an epoch may have one twice
        names = names_of(trainer.conditions, each)
        return [names[place] for place in places.tolist()]
    return [f"picture {picture}" for picture in pictures.tolist()]
