"""Says, once and in words, that a run is not below the line that needs no network."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blip3o_fast.training.resume import say


class LinearLine(TrainerCallback):
    """After the warm-up the first loss that is measured is held against the best linear prediction's.

    The held-out loss where there is one, at fixed noise levels and noise; else the training loss, whose noise levels
    scatter. Below the line nothing is said: the progress shows ``x linear``.

    Args:
        evaluates: whether the run has a held-out loss.
    """

    def __init__(self, evaluates: bool) -> None:
        self.key = "eval_loss_over_linear" if evaluates else "loss_over_linear"
        self.told = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        ratio = (logs or {}).get(self.key)
        if ratio is None or self.told or state.global_step <= args.get_warmup_steps(state.max_steps):
            return
        self.told = True
        if not ratio < 1:
            say(not_below(ratio, state.global_step, held_out=self.key.startswith("eval")))


def not_below(ratio: float, step: int, *, held_out: bool) -> str:
    """The sentence for a loss that is ``ratio`` >= 1 times the best linear prediction's."""
    which = "held-out" if held_out else "training"
    return (
        f"note: at step {step}, after the warm-up, the {which} loss is {ratio:.2f} times that of the best linear "
        "prediction: so far the network does nothing that least squares could not. It should fall below 1; if it "
        "stays, look at --learning_rate, --normalize and whether the network is wider than its target's channels"
    )
