"""Peak memory and time of a training step, per precision and per mode of gradient checkpointing.

    python -m benchmarks.train_memory --preset small --batch_size 16

The peak is what PyTorch's allocator holds at its height above weights, gradients and AdamW's moments: the activations
kept for the backward and what is live beside them. Modes take turns, so that a slow minute of the machine hits all.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.peak import peak_bytes

MODES = (None, "selective", "block")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Forward, loss, backward and AdamW of one network, in one mode."""

    def __init__(self, config: BLIP3oConfig, batch_size: int, device: torch.device) -> None:
        self.model = BLIP3oDiT(config).to(device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)
        self.loss = FlowMatchingLoss.from_config(config)
        self.target = torch.randn(batch_size, config.num_tokens, config.in_channels, device=device)
        self.condition = torch.randn(batch_size, 64, config.cross_attention_dim, device=device)

    def set(self, mode: str | None) -> None:
        self.model.gradient_checkpointing_disable()
        if mode is not None:
            self.model.gradient_checkpointing_enable({"mode": mode})

    def __call__(self, dtype: torch.dtype | None) -> Tensor:
        device = self.target.device.type
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            loss, _ = self.loss(self.model, self.target, self.condition, seed=0, sample_index=0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay, so that the peak is that of the activations
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


def measure(step: Step, precisions: list[str], repeats: int) -> list[tuple[str, str, float, float]]:
    """(precision, mode, MB at the peak, seconds) per row."""
    rows = []
    for precision in precisions:
        dtype, seconds = PRECISIONS[precision], {mode: [] for mode in MODES}  # type: ignore[var-annotated]
        peaks = {}
        for mode in MODES:
            step.set(mode)
            step(dtype)
            peaks[mode] = peak_bytes(lambda: step(dtype), step.target.device) or 0  # noqa: B023 (called at once)
        for _ in range(repeats):
            for mode in MODES:
                step.set(mode)
                start = time.perf_counter()
                step(dtype)
                seconds[mode].append(time.perf_counter() - start)
        for mode in MODES:
            rows.append((precision, mode or "none", peaks[mode] / 1e6, statistics.median(seconds[mode])))
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(words)
    sizes = {} if given.num_layers is None else {"num_layers": given.num_layers}
    config = BLIP3oConfig.preset(given.preset, **sizes)
    step = Step(config, given.batch_size, torch.device(given.device))
    print(
        f"{given.preset}, {config.num_layers} layers of {config.hidden_size}, batch {given.batch_size}, {given.device}"
    )
    print("| precision | checkpointing | peak, MB | step, ms |\n|---|---|---|---|")
    for precision, mode, megabytes, seconds in measure(step, given.precisions, given.repeats):
        print(f"| {precision} | {mode} | {megabytes:.0f} | {1000 * seconds:.0f} |")


if __name__ == "__main__":
    main()
