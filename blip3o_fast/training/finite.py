"""A loss or gradient norm that is not finite stops the run, by the step's name.

The Trainer would log a loss of 0.0 and go on to the end with weights of NaN.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.training import checkpoints

# fp16's scaler skips steps with infinite gradients while it looks for its scale; more than this in a row is no search.
MAX_SKIPPED_STEPS = 20


class NonFiniteError(ValueError):
    """Training produced a loss or gradient norm that is NaN or infinite."""


class FiniteWatch:
    """Looks at each step's loss and gradient norm.

    reads_are_free: True on a CPU: the error is raised at once and the optimizer never sees the bad step. On an
        accelerator, reading a value would make the host wait at every step, so the verdict is collected on the device
        and read by `raise_if_bad`, with the next log and before every save.
    scaled: fp16 with a loss scaler, which itself leaves out steps whose gradients are infinite.
    """

    def __init__(self, output_dir: Path, *, reads_are_free: bool, scaled: bool) -> None:
        self.output_dir, self.reads_are_free, self.scaled = output_dir, reads_are_free, scaled
        self.skipped = 0
        self._bad_step: Tensor | None = None

    def value(self, value: Tensor, what: str, step: int) -> None:
        """Note, or raise NonFiniteError for, a 0-d value of ``step``."""
        if self.reads_are_free:
            if not bool(torch.isfinite(value)):
                raise NonFiniteError(self._message(what, step, float(value)))
            return
        bad = torch.where(torch.isfinite(value.detach()), 0, step)
        # The first bad step is the one to name: everything after it is NaN anyway.
        self._bad_step = bad if self._bad_step is None else torch.where(self._bad_step == 0, bad, self._bad_step)

    def gradient_norm(self, norm: Tensor, step: int) -> None:
        """As `value`; with a loss scaler only an endless search for its scale is an error."""
        if not self.scaled:
            self.value(norm, "gradient norm", step)
            return
        self.skipped = 0 if bool(torch.isfinite(norm)) else self.skipped + 1
        if self.skipped > MAX_SKIPPED_STEPS:
            raise NonFiniteError(
                f"the gradient norm was not finite for {self.skipped} steps in a row (step {step}): "
                "fp16 overflows here; train with --bf16 or in fp32"
            )

    def raise_if_bad(self) -> None:
        """Read the verdict that was collected on an accelerator."""
        if self._bad_step is not None and (step := int(self._bad_step)) > 0:
            raise NonFiniteError(self._message("loss or gradient norm", step, float("nan")))

    def _message(self, what: str, step: int, value: float) -> str:
        last = checkpoints.last_whole(self.output_dir)
        resume = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        return (
            f"{what} is {value} at step {step}; training stopped, nothing was saved after it ({resume}). "
            "Likely causes: a learning rate that is too high, NaN in the embeddings, fp16 overflow"
        )
