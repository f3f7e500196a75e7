"""Which implementation runs an op: `reference` (PyTorch), `triton`, `cuda` and `cpu` (csrc), or `auto`.

The choice is made once, in the op's public function, travels to the raw op as a string, and is saved for backward.
"""

import warnings
from collections.abc import Callable

from torch import Tensor

from blip3o_fast.ops._switch import State, Switch

NAMES = ("auto", "reference", "triton", "cuda", "cpu")
# What `auto` tries on each device before the reference.
_PREFERRED = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}

_warned: set[str] = set()


class use_backend(Switch):
    """Run every op on one backend: `use_backend("reference")` from here on, `with use_backend("reference"):` inside.

    name: "auto" (the default: the fastest that can run the op on the tensors' device), "reference", "triton", "cuda"
    or "cpu". A backend asked for by name that cannot run an op raises RuntimeError when the op is called.
    Raises ValueError for another name.
    """

    state = State("auto")

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        super().__init__(NAMES[NAMES.index(name)])  # a plain str: with a subclass PyTorch 2.11 cannot compile


class Backends:
    """The backends of one op beside `reference`.

    Each is given as a function of the op's tensors that returns None where the backend can run them, else the reason
    why it cannot; a reason that starts with "not available" is told once under `auto`, since installing would help.
    """

    def __init__(self, op: str, **refusals: Callable[..., str | None]) -> None:
        self.op = op
        self.refusals = refusals

    def choose(self, x: Tensor, *others: Tensor | None) -> str:
        """The backend for a call whose activation is x. RuntimeError where the one asked for cannot run it."""
        active = use_backend.state.active
        if active == "reference":
            return "reference"
        if active != "auto":
            reason = self.refusal(active, x, *others)
            if reason is not None:
                raise RuntimeError(f"backend {active!r} cannot run {self.op}: {reason}")
            return active
        for name in _PREFERRED.get(x.device.type, ()):
            if name not in self.refusals:
                continue
            reason = self.refusals[name](x, *others)
            if reason is None:
                return name
            if reason.startswith("not available") and reason not in _warned:
                _warned.add(reason)
                warnings.warn(
                    f"blip3o_fast runs its PyTorch reference: backend {name!r} is {reason}",
                    stacklevel=3,
                )
        return "reference"

    def refusal(self, name: str, x: Tensor, *others: Tensor | None) -> str | None:
        if name not in self.refusals:
            return f"it has no {name} kernel yet (there are: {', '.join(('reference', *self.refusals))})"
        # the others say for themselves where they run: interpreted or emulated, that is the CPU too
        if name == "cpu" and x.device.type != "cpu":
            return f"it needs cpu tensors, got {x.device}"
        return self.refusals[name](x, *others)
