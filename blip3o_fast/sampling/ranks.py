"""Which of several processes this one is, as torchrun says it in RANK, WORLD_SIZE and LOCAL_RANK."""

from dataclasses import dataclass

import torch

from blip3o_fast import env


@dataclass(frozen=True)
class Rank:
    """Process `number` of `world`; `local` counts those of this machine."""

    number: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> "Rank":
        """Of this process; the only one where the variables are not set. ValueError where they make no sense."""
        values = {}
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
            values[name] = _whole(name, env.read(name) or default)
        number, world = values["RANK"], values["WORLD_SIZE"]
        if number >= world:
            raise ValueError(f"RANK must be less than WORLD_SIZE = {world}, got {number}")
        return cls(number, world, _whole("LOCAL_RANK", env.read("LOCAL_RANK") or str(number)))

    @property
    def speaks(self) -> bool:
        """Whether this is the one that prints."""
        return self.number == 0

    def device(self) -> torch.device:
        """The GPU of this process where there is one, else the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local % torch.cuda.device_count())


def _whole(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise ValueError(f"{name} must be a whole number >= 0 (torchrun sets it), got {value!r}")
    return int(value)
