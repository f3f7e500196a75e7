"""Which share of the sources this process takes, where several run the same command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from blip3o_fast import env

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Process ``rank`` of ``world``; ``local_rank`` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def of(self, items: list[T]) -> list[T]:
        """Every ``world``-th item: large and small tars, which often come sorted, are spread evenly."""
        return items[self.rank :: self.world]


def this_share() -> Share:
    """From torchrun's variables, else those of an srun step; and from those of a Slurm array, which multiplies them.

    Raises ``ValueError`` naming a variable that is not a whole number or out of range.
    """
    if env.read("WORLD_SIZE") is not None:
        rank, world, local = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    elif env.read("SLURM_STEP_NUM_TASKS") is not None:  # set by srun alone: a batch script itself is not one of many
        rank, world = _number("SLURM_PROCID", 0), _number("SLURM_STEP_NUM_TASKS", 1)
        local = _number("SLURM_LOCALID", 0)
    else:
        rank, world, local = 0, 1, 0
    if not 0 <= rank < world:
        raise ValueError(f"RANK: got {rank} of {world} processes; 0 .. {world - 1} is allowed")
    if env.read("SLURM_ARRAY_TASK_ID") is not None:
        first, step = _number("SLURM_ARRAY_TASK_MIN", 0), _number("SLURM_ARRAY_TASK_STEP", 1)
        last = _number("SLURM_ARRAY_TASK_MAX", _number("SLURM_ARRAY_TASK_ID", 0))
        task, tasks = (_number("SLURM_ARRAY_TASK_ID", 0) - first) // step, (last - first) // step + 1
        rank, world = task * world + rank, tasks * world
        if not 0 <= rank < world:
            raise ValueError(f"SLURM_ARRAY_TASK_ID: {task} is not among the {tasks} tasks of the array")
    return Share(rank, world, local)


def _number(name: str, default: int) -> int:
    value = env.read(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise ValueError(f"{name}: the environment has {value!r}; a whole number >= 0 is needed")
    return int(value)
