"""Which optimizers can be had: torch's fused AdamW is the default, bitsandbytes' only where it can be imported."""

from __future__ import annotations

import importlib


def check_optimizer(optim: str) -> None:
    """ValueError for a ``TrainingArguments.optim`` that needs bitsandbytes where importing that fails."""
    of_bitsandbytes = "bnb" in optim or optim.startswith("paged_") or ("8bit" in optim and "torch" not in optim)
    if not of_bitsandbytes or "galore" in optim:
        return
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # a build for another CUDA fails in many ways
        raise ValueError(
            f"--optim {optim} needs bitsandbytes, which cannot be imported ({type(error).__name__}: {error}): "
            "pip install bitsandbytes, or use --optim adamw_torch_fused"
        ) from error
