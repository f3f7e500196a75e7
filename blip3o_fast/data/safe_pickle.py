"""Reading a pickle of arrays, tensors and plain values without running anything it says.

A pickle is a program: its GLOBAL opcodes name any importable function and its REDUCE opcodes call it.
The original project ships its features as pickles, so they have to be readable, by this reader only:

1. Only the opcodes in ``_OPCODES`` exist. What makes objects of classes, asks for extensions or talks
   to the outside (INST, OBJ, NEWOBJ, EXT, PERSID, NEXT_BUFFER ...) is refused by name.
2. A global is looked up in ``DOORS`` and nowhere else: nothing is imported, no attribute is read, and
   what comes back is never the named global but a `Door` to a function of `pickle_doors` that checks its
   arguments and returns plain data. Any other name is refused before anything is done with it.
3. REDUCE calls doors only, and BUILD fills the two stand-ins of that file only, so neither can reach a
   method of a real array or tensor. numpy's object dtype has no way in.
4. A tensor's storage is a nested pickle of its own (``torch.storage._load_from_bytes``, which would
   unpickle it without any restriction): it goes through ``torch.load(weights_only=True)``.

The result holds dict, list, tuple, str, int, float, bool, None, `numpy.ndarray` and `torch.Tensor`,
and nothing else. `pickle._Unpickler` is the standard library's own Python version of the machine: its
table of opcodes can be cut down, which the C version's cannot.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

from .pickle_doors import DOORS, ArrayStub, Door, DTypeStub, TensorStub, UnsafePickleError, describe

__all__ = ["UnsafePickleError", "safe_load", "safe_loads"]

_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL "
    "REDUCE BUILD BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE"
).split()
_ALLOWED = (
    "allowed are numpy arrays (bool, int, float, text), torch tensors, str, numbers, bool, None, list, tuple, dict"
)
_MAX_DEPTH = 100


def safe_load(path: str | os.PathLike[str]) -> Any:
    """The data in a pickle file (protocols 2 to 5), as the module docstring describes.

    Arrays keep their dtype and may be read-only views of the file's bytes; tensors come back on the CPU.

    Raises `UnsafePickleError`, naming the file and what it asked for, where the pickle holds anything but
    data, and ``ValueError`` where it is damaged.
    """
    with open(path, "rb") as file:
        return _read(file, os.path.getsize(path), os.fspath(path))


def safe_loads(data: bytes) -> Any:
    """`safe_load` for a pickle that is already in memory."""
    return _read(io.BytesIO(data), len(data), "pickle")


def _read(file: BinaryIO, size: int, name: str) -> Any:
    try:
        loaded = _Unpickler(_Bounded(file, size)).load()
        return _Plain().convert(loaded, 0)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{name}: {error}; {_ALLOWED}") from None
    # What a truncated or bent opcode stream can raise inside the machine; none of it is a bug of ours.
    except (
        BufferError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
        RecursionError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(f"{name}: not a whole pickle of protocol 2 to 5 ({reason})") from error


class _Bounded:
    """A file that refuses to read past its end: a bent length would otherwise allocate what it claims."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self._left = file, size, size

    def _take(self, count: int) -> int:
        if count < 0 or count > self._left:
            raise EOFError(f"{count} bytes announced, {self._left} left")
        self._left -= count
        return count

    def read(self, count: int) -> bytes:
        return self._file.read(self._take(count))

    def readinto(self, buffer: bytearray) -> int:
        self._take(memoryview(buffer).nbytes)
        return self._file.readinto(buffer)  # type: ignore[attr-defined]

    def readline(self) -> bytes:
        line = self._file.readline(256)  # GLOBAL's two lines; no allowed name is longer
        self._left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """The standard library's machine with the opcodes above, and those that call, fill or allocate replaced."""

    def find_class(self, module: str, name: str) -> Door:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in DOORS:
            raise UnsafePickleError(f"it asks for '{module}.{name}'"[:200])
        return Door(f"{module}.{name}", DOORS[module, name])

    stack: list[Any]
    append: Callable[[Any], None]  # onto the stack
    read: Callable[[int], bytes]

    def __init__(self, file: _Bounded) -> None:
        super().__init__(file)
        self._size = file.size

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        door = self.stack[-1]
        if not isinstance(door, Door) or door.run is None or not isinstance(arguments, tuple):
            raise UnsafePickleError(f"it calls a {describe(door)}")
        try:
            self.stack[-1] = door.run(*arguments)
        except TypeError as error:
            raise UnsafePickleError(f"it calls '{door.name}' with arguments that do not fit") from error

    def _load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (DTypeStub, ArrayStub)):
            raise UnsafePickleError(f"it sets the state of a {describe(self.stack[-1])}")
        self.stack[-1].build(state)

    def _load_bytearray8(self) -> None:
        # the standard machine allocates the announced length before it reads
        length = int.from_bytes(self.read(8), "little")
        if length > self._size:
            raise EOFError(f"{length} bytes announced in a file of {self._size}")
        self.append(bytearray(self.read(length)))


def _refuse(name: str) -> Callable[[Any], None]:
    def refuse(machine: Any) -> None:
        raise UnsafePickleError(f"it uses the opcode {name}")

    return refuse


def _dispatch() -> dict[int, Callable[[Any], None]]:
    standard = pickle._Unpickler.dispatch
    # every byte has an answer, so that no unknown one can ever reach the standard machine's table
    names = {getattr(pickle, name)[0]: name for name in pickle.__all__ if _is_opcode(name)}
    table = {byte: _refuse(names.get(byte, hex(byte))) for byte in range(256)}
    for name in _OPCODES:
        byte = getattr(pickle, name)[0]
        table[byte] = standard[byte]
    table[pickle.REDUCE[0]] = _Unpickler._load_reduce
    table[pickle.BUILD[0]] = _Unpickler._load_build
    table[pickle.BYTEARRAY8[0]] = _Unpickler._load_bytearray8
    return table


def _is_opcode(name: str) -> bool:
    value = getattr(pickle, name)
    return isinstance(value, bytes) and len(value) == 1


_Unpickler.dispatch = _dispatch()


class _Plain:
    """Turns stand-ins into arrays and tensors, and refuses whatever is not data (sharing is kept)."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}

    def convert(self, value: Any, depth: int) -> Any:
        if value is None or type(value) in (str, int, float, bool):
            return value
        if depth > _MAX_DEPTH:
            raise UnsafePickleError(f"it nests deeper than {_MAX_DEPTH} levels")
        if id(value) in self._done:
            if self._done[id(value)] is self:
                raise UnsafePickleError(f"its {type(value).__name__} contains itself")
            return self._done[id(value)]
        self._done[id(value)] = self  # in progress; `value` lives in the tree, so its id stays its own
        result = self._done[id(value)] = self._converted(value, depth + 1)
        return result

    def _converted(self, value: Any, depth: int) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self.convert(item, depth) for item in value)
        if type(value) is dict:
            for key in value:
                if type(key) not in (str, int):
                    raise UnsafePickleError(f"it has a dict key of the type {describe(key)}")
            return {key: self.convert(item, depth) for key, item in value.items()}
        if isinstance(value, ArrayStub) and value.array is not None:
            return value.array
        if isinstance(value, TensorStub) and value.is_tensor():
            return value.value
        raise UnsafePickleError(f"it holds a {describe(value)}")
