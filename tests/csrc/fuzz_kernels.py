"""Calls every function of the extension with right and wrong arguments: `python fuzz_kernels.py EXTENSION EXAMPLES`.

The outcome of a call must be a ValueError or TypeError that names an argument and has changed nothing, or a run that
wrote into its outputs only. Each kernel is tried in a process of its own, so a crash is one line of the report: the
call is written down before it is made.

Right arguments are found by asking: what a kernel's message says is wrong is put right until it runs. So no kernel
needs a table here, and a message that does not help shows as a kernel that is never called well.
"""

import importlib.util
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from arena import SLOT, Arena, Tensor, contiguous
from fuzz_calls import HUGE, JUNK, Raw, calls
from hypothesis import HealthCheck, given, settings

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int64": 3, "uint8": 4, "bool": 4, "int8": 5, "int32": 6}
SIZES = (1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128)
SECONDS = 120  # for one kernel, before it counts as one that hangs


class Violation(AssertionError):
    pass


class Kernel:
    def __init__(self, module: Any, name: str, arena: Arena, notes: int) -> None:
        self.name, self.arena, self.notes = name, arena, notes
        self.module, self.function = module, getattr(module, name)
        self.arguments = [(n, kind) for n, kind in module.signatures[name]]
        self.isas = [i for i in range(len(module.isas)) if module.runs_here(i)]
        self.outputs: set[str] | None = None

    def given(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return (self.arena.address(argument), argument.dtype, argument.shape, argument.strides)
        return argument.value if isinstance(argument, Raw) else argument

    def call(self, arguments: list[Any], isa: Any = 0, threads: Any = 1) -> str:
        """The message of the refusal, "" where the kernel ran; raises Violation."""
        os.pwrite(self.notes, f"{self.name}({isa!r}, {threads!r}, *{arguments!r})\0".encode(), 0)
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.content:
                self.arena.write_content(argument)
        try:
            self.function(isa, threads, *(self.given(a) for a in arguments))
        except (ValueError, TypeError) as error:
            message = str(error)
        except Exception as error:
            raise Violation(f"{type(error).__name__} instead of ValueError: {error}") from error
        else:
            message = ""
        self.check_memory(arguments, refused=bool(message))
        broken = any(isinstance(a, Tensor) and a.flipped for a in arguments)  # the message tells what is written there
        if message and not broken and not self.named_in(message):
            raise Violation(f"the message names no argument: {message}")
        return message

    def named_in(self, message: str) -> str | None:
        names = [name for name, _ in self.arguments] + ["isa", "threads", "takes"]
        return next((word for word in re.findall(r"\w+", message) if word in names), None)

    def check_memory(self, arguments: list[Any], refused: bool) -> None:
        tensors = [(name, a) for (name, _), a in zip(self.arguments, arguments, strict=False) if isinstance(a, Tensor)]
        allowed = {t.slot: [(n, u) for n, u in tensors if u.slot == t.slot] for _, t in tensors}
        written = set()
        for slot, users in allowed.items():
            changed = self.arena.changed(slot)
            if not changed.any():
                continue
            self.arena.restore(slot)
            if refused:
                raise Violation(f"{users[0][0]} was written to by a call that was refused")
            for _, tensor in users:
                changed &= ~self.arena.elements(tensor)
            if changed.any():
                raise Violation(f"{users[0][0]}: {changed.sum()} bytes beside the tensor were written to")
            if len(users) == 1:
                written.add(users[0][0])
        if self.outputs is not None and not written <= self.outputs:
            raise Violation(f"changed its input {', '.join(sorted(written - self.outputs))}")
        if self.outputs is None and not refused:
            self.outputs = written

    # ---- right arguments -------------------------------------------------------------------------------------------

    def start(self, rng: random.Random, isa: int) -> list[Any]:
        made: list[Any] = []
        for slot, (name, kind) in enumerate(self.arguments):
            if name == "packed" and "N" not in dict(self.arguments):
                made.append(packed_weight(self, rng, isa, slot))
            elif kind == "tensor":
                made.append(self.fresh(rng, slot, rng.choice((1, 2, 3, 4))))
            else:
                made.append(self.scalar(rng, kind))
        return made

    def fresh(self, rng: random.Random, slot: int, rank: int) -> Tensor:
        while True:
            tensor = contiguous(Tensor(0, (), (), slot), tuple(rng.choice(SIZES) for _ in range(rank)))
            if tensor.bytes <= SLOT // 8:
                return tensor

    def scalar(self, rng: random.Random, kind: str) -> Any:
        if kind == "bool":
            return rng.random() < 0.5
        return rng.choice((0, 1, 1, 2, 4, 8, 16, 32, 64)) if kind == "int" else rng.choice((1e-5, 0.125, 0.5, 1.0))

    def mended(self, arguments: list[Any], message: str, rng: random.Random) -> list[Any]:
        """The arguments with the first that the message names changed to what it asks for."""
        names = [name for name, _ in self.arguments]
        name = self.named_in(message)
        index = names.index(name) if name in names else rng.randrange(len(names))
        old, kind = arguments[index], self.arguments[index][1]
        shape = re.search(r"of (?:the )?shape \(([\d, ]*)\)", message.split(", got")[0])
        rank = re.search(r"(\d+) dimensions", message)
        size = re.search(r" of (\d+) bytes", message)
        asked = message.split(", got")[0]
        dtypes = [code for word, code in DTYPES.items() if re.search(rf"\b{word}\b", asked)]
        if kind != "tensor":
            new = self.scalar(rng, kind)
        elif old is None or "must be None" in message or "absent" in message or rng.random() < 0.05:
            absent = old is not None and ("None" in asked or "absent" in message)
            new = None if absent else self.fresh(rng, index, rng.choice((1, 2, 3, 4)))
        elif shape:
            new = contiguous(old, tuple(int(n) for n in shape[1].split(",") if n.strip()))
        elif rank:
            new = replace(self.fresh(rng, index, int(rank[1])), dtype=old.dtype)
        elif size:
            new = contiguous(replace(old, dtype=DTYPES["uint8"]), (int(size[1]),))
        elif "contiguous" in asked:
            new = contiguous(old, old.shape)
        elif "aligned" in asked:
            new = replace(old, at_end=False)
        elif dtypes and old.dtype not in dtypes:
            new = replace(contiguous(old, old.shape), dtype=rng.choice(dtypes))
        else:
            new = replace(self.fresh(rng, index, max(len(old.shape), 1)), dtype=old.dtype)
        return [*arguments[:index], new, *arguments[index + 1 :]]

    def good_call(self, rng: random.Random, tries: int = 40) -> list[tuple[int, list[Any]]]:
        """[(isa, arguments)] that the kernel takes, or nothing."""
        for _ in range(tries):
            isa = rng.choice(self.isas)
            arguments = self.start(rng, isa)
            for _ in range(150):
                if any(isinstance(a, Tensor) and a.bytes > SLOT for a in arguments):
                    break
                message = self.call(arguments, isa)
                if not message:
                    return [(isa, arguments)]
                arguments = self.mended(arguments, message, rng)
        return []


def packed_weight(kernel: Kernel, rng: random.Random, isa: int, slot: int) -> Tensor:
    """A buffer that packed_linear knows by its first bytes: no message can lead there."""
    n, k, mode, swiglu = 2 * rng.randint(1, 40), rng.randint(1, 100), rng.randrange(3), rng.random() < 0.5
    w = contiguous(Tensor(0, (), (), 0, at_end=False), (n, k))
    size = kernel.module.packed_size(isa, 1, n, k, mode, swiglu)
    packed = contiguous(Tensor(DTYPES["uint8"], (), (), 1, at_end=False), (size,))
    kernel.module.pack_linear(isa, 1, kernel.given(w), kernel.given(packed), n, 0, mode, swiglu)
    start = kernel.arena.offset(packed)
    name = f"packed {n} {k} {mode} {swiglu} {isa}"
    kernel.arena.contents[name] = kernel.arena.bytes[start : start + size].tobytes()
    kernel.arena.restore(1)
    return replace(packed, slot=slot, content=name)


def fuzz(kernel: Kernel, examples: int) -> str:
    """What was found wrong, or ""."""
    rng = random.Random(kernel.name)
    try:
        good = kernel.good_call(rng)
        for _ in range(5):
            good += kernel.good_call(rng, 3)
    except Violation as violation:
        return f"{violation}: {last_call(kernel.notes)}"
    if not good:
        return f"no arguments found that it takes; the last: {last_call(kernel.notes)}"

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(kernel, good))
    def try_one(call: tuple[list[Any], Any, Any]) -> None:
        kernel.call(*call)

    try:
        try_one()
    except Violation as violation:
        return f"{violation}: {last_call(kernel.notes)}"
    return ""


# ---- a process per kernel --------------------------------------------------------------------------------------------


def last_call(notes: int) -> str:
    return os.pread(notes, 100_000, 0).split(b"\0")[0].decode()


def in_a_child(kernel: Kernel, examples: int) -> str:
    """What fuzz says, or how its process died."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            os.pwrite(answer.fileno(), fuzz(kernel, examples).encode() or b"fine", 0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said = os.pread(answer.fileno(), 100_000, 0).decode()
    if os.WIFSIGNALED(status):
        return f"died of {signal.Signals(os.WTERMSIG(status)).name}: {last_call(kernel.notes)}"
    return "" if said == "fine" else said or f"ended with status {status}: {last_call(kernel.notes)}"


def plain_functions(module: Any) -> Iterator[str]:
    """The functions that are no kernels get anything, too."""
    for name in dir(module):
        function = getattr(module, name)
        if name.startswith("_") or not callable(function) or name in module.signatures:
            continue
        for arguments in ((), *((junk,) for junk in (*JUNK, *HUGE, 0, 1)), (1, 2, 3)):
            try:
                function(*arguments)
            except (TypeError, ValueError, MemoryError):
                continue
            except Exception as error:
                yield f"{name}{arguments!r}: {type(error).__name__}"


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("blip3o_fast._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str, examples: int, *only: str) -> int:
    module, arena = load(path), Arena()
    problems = list(plain_functions(module))
    with tempfile.TemporaryFile() as notes:
        for name in only or sorted(module.signatures):
            began = time.monotonic()
            problem = in_a_child(Kernel(module, name, arena, notes.fileno()), examples)
            print(f"{name}: {problem or 'fine'} ({time.monotonic() - began:.1f} s)", flush=True)
            problems += [f"{name}: {problem}"] if problem else []
    print(f"{len(problems)} problems")
    return len(problems) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
