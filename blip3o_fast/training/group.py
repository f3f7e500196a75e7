"""The process group of a distributed run: leaving it, and knowing that a launcher has started this process again.

Which engine exchanges the gradients is the Trainer's matter (DDP by accelerate); nothing here depends on gloo or NCCL.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from blip3o_fast import env


def restarts() -> int:
    """How often torchrun (``--max-restarts``) has started this group of processes again; 0 in the first life."""
    return int(env.read("TORCHELASTIC_RESTART_COUNT") or "0")


def job() -> str | None:
    """What torchrun calls this job, the same in all its processes and lives; None without torchrun."""
    return env.read("TORCHELASTIC_RUN_ID") or None


def leave() -> None:
    """All ranks together, at the end. Without this a process of a torchrun job may abort after it has succeeded."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def abandon() -> None:
    """This rank alone, because of an error: no barrier, since the others may wait for something else or be dead."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if "nccl" in dist.get_backend():
        # Destroying would wait for collectives that nobody will finish.
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def settle_ddp(trainer: Any, accumulate: int) -> None:
    """How DistributedDataParallel is to exchange the gradients of ``trainer``; before it wraps the model.

    gradient_as_bucket_view: the gradients lie in the buckets that are sent. One copy of all gradients less, in time
    and in memory. static_graph: every step uses the same parameters (all of them, hence no search for unused ones), so
    the order of the first step's gradients decides the buckets, and gradient checkpointing may run a block twice. Not
    with accumulation, where the first pass of a step exchanges nothing and so would not be what later steps are like.
    """
    handler = getattr(trainer.accelerator, "ddp_handler", None)
    if handler is not None:
        handler.gradient_as_bucket_view = True
        handler.static_graph = accumulate == 1
