"""A step whose loss or gradient is not finite is left out, counted and named; several in a row stop the run.

The Trainer would log a loss of 0.0 and go on to the end with weights of NaN.

How a step is judged. A loss that is NaN or infinite multiplies its gradients by NaN, so after the ranks' gradients have
been averaged every rank has the same gradient norm that is not finite, and all ranks leave the step out together: no
exchange of its own. On a CPU the verdict is read at once. On an accelerator, reading would make the host wait at every
step: the verdict stays on the device, the fused optimizer obeys it there (``found_inf``, as from torch's GradScaler),
and the host reads it with the next log or save. Once the limit is reached no later step is taken, so the weights are
still those of the last good step when the host finds out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

# fp16's scaler skips steps with infinite gradients while it looks for its scale; more than this in a row is no search.
MAX_SCALER_SKIPS = 20

# Verdicts, ordered so that the smallest over all ranks is the cause.
_GOOD, _BAD_LOSS, _BAD_GRADIENT, _AFTER_THE_LIMIT = 0, 1, 2, 3


class NonFiniteError(ValueError):
    """Several steps in a row had a loss or a gradient that is NaN or infinite."""


class BadStep(NamedTuple):
    """A step that was left out. what: ``"loss"`` or ``"gradient norm"``."""

    step: int
    what: str


class FiniteWatch:
    """Judges each step before the optimizer takes it.

    max_bad_steps: so many in a row reach the limit.
    reads_are_free: True on a CPU; see the module's text.
    scaled: fp16 with a loss scaler, which itself leaves out steps whose gradients overflow. Those are part of its
        search for a scale; a loss that is not finite is not, and counts.
    """

    def __init__(self, max_bad_steps: int, *, reads_are_free: bool, scaled: bool) -> None:
        if type(max_bad_steps) is not int or max_bad_steps < 1:
            raise ValueError(f"max_bad_steps must be a whole number >= 1, got {max_bad_steps!r}")
        self.max_bad_steps, self.reads_are_free, self.scaled = max_bad_steps, reads_are_free, scaled
        self.total = 0  # left out so far, as far as they were read
        self.row: list[BadStep] = []  # the present ones in a row
        self.scaler_skips = 0
        self._in_a_row: Tensor | None = None  # int32, 0-d, on the device
        self._loss_is_finite: Tensor | None = None  # of this step's micro-batches
        self._unread: list[tuple[int, Tensor]] = []

    def gated(self, loss: Tensor) -> Tensor:
        """The loss (0-d) to differentiate: the same value, and gradients of NaN where it is not finite."""
        finite = torch.isfinite(loss.detach())
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        return loss * torch.where(finite, 1.0, torch.nan)

    def judge(self, gradient_norm: Tensor, step: int, optimizer: Optimizer) -> None:
        """Between clipping and the optimizer's step: see to it that a bad step changes nothing.

        gradient_norm: 0-d, of all gradients together and equal on all ranks.
        Raises NonFiniteError where fp16's scaler finds no scale.
        """
        if hasattr(gradient_norm, "full_tensor"):  # of sharded parameters
            gradient_norm = gradient_norm.full_tensor()
        norm_is_finite = torch.isfinite(gradient_norm)
        loss_is_finite = torch.ones_like(norm_is_finite) if self._loss_is_finite is None else self._loss_is_finite
        self._loss_is_finite = None
        if self.scaled:
            self._judge_scaled(norm_is_finite, loss_is_finite, step)
            return
        self._note(~norm_is_finite, loss_is_finite, step)
        assert self._in_a_row is not None
        _leave_out(optimizer, self._in_a_row > 0, self.reads_are_free)

    def _judge_scaled(self, norm_is_finite: Tensor, loss_is_finite: Tensor, step: int) -> None:
        # The scaler reads its own verdict at every step, so reading costs nothing more here.
        if bool(norm_is_finite):
            self.scaler_skips = 0
            self._note(~norm_is_finite, loss_is_finite, step)
        elif not bool(_smallest(loss_is_finite.int())):
            self._note(~norm_is_finite, torch.zeros_like(loss_is_finite), step)
        else:
            self.scaler_skips += 1
            if self.scaler_skips > MAX_SCALER_SKIPS:
                raise NonFiniteError(
                    f"the gradient norm was not finite for {self.scaler_skips} steps in a row (step {step}): "
                    "fp16 overflows here; train with --bf16 or in fp32"
                )

    def _note(self, bad: Tensor, loss_is_finite: Tensor, step: int) -> None:
        if self._in_a_row is None:
            self._in_a_row = torch.full_like(bad, len(self.row), dtype=torch.int32)
        over = self._in_a_row >= self.max_bad_steps
        self._in_a_row = torch.where(bad | over, self._in_a_row + 1, 0)
        cause = torch.where(loss_is_finite, _BAD_GRADIENT, _BAD_LOSS)
        self._unread.append((step, torch.where(over, _AFTER_THE_LIMIT, torch.where(bad, cause, _GOOD))))

    def news(self) -> list[BadStep]:
        """The bad steps since the last call, oldest first. With several ranks all must call it at the same steps."""
        if not self._unread:
            return []
        steps, verdicts = [step for step, _ in self._unread], torch.stack([verdict for _, verdict in self._unread])
        self._unread = []
        if not bool(verdicts.any()):
            self.row = []
            return []
        found = []
        for step, verdict in zip(steps, _smallest(verdicts).tolist(), strict=True):
            if verdict == _GOOD:
                self.row = []
            elif verdict != _AFTER_THE_LIMIT:
                found.append(BadStep(step, "loss" if verdict == _BAD_LOSS else "gradient norm"))
                self.row.append(found[-1])
        self.total += len(found)
        return found

    @property
    def limit_reached(self) -> bool:
        """As far as `news` was read."""
        return len(self.row) >= self.max_bad_steps

    def state(self) -> dict[str, int | list[list[int | str]]]:
        """For a checkpoint: plain values."""
        return {"skipped_steps": self.total, "skipped_in_a_row": [list(bad) for bad in self.row]}

    def load_state(self, state: dict[str, object]) -> None:
        """What `state` gave; a checkpoint without these fields begins at zero."""
        self.total = int(state.get("skipped_steps", 0))  # type: ignore[call-overload]
        self.row = [BadStep(*bad) for bad in state.get("skipped_in_a_row", [])]  # type: ignore[attr-defined]
        self._in_a_row, self._unread = None, []


def _smallest(values: Tensor) -> Tensor:
    """Of each element over all ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def _leave_out(optimizer: Optimizer, skip: Tensor, reads_are_free: bool) -> None:
    """Make the optimizer's next step change neither weights nor its own state where ``skip`` (bool, 0-d) is True."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not reads_are_free and getattr(inner, "_step_supports_amp_scaling", False):  # the fused ones
        inner.found_inf = skip.float()
    elif bool(skip):
        for group in inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # torch's optimizers pass over parameters without a gradient
