"""What stands in for the globals of a pickle (`safe_pickle`): plain functions that check and return data.

The stand-ins for arrays and tensors are wrappers without methods of their own: a real `numpy.ndarray` or
`torch.Tensor` on the stack of the pickle machine would offer it ``__setstate__``, ``append`` and more.
They are opened when the whole pickle has been read.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|U[1-9][0-9]{0,6}")


class UnsafePickleError(ValueError):
    """The pickle names something outside the allowed data; nothing of it was run."""


class Door:
    """What a global becomes: a name, and the function of this file that stands in for it.

    Not callable itself, so that only the reader's REDUCE, which checks for this type, can use it.
    """

    __slots__ = ("name", "run")

    def __init__(self, name: str, run: Callable[..., Any] | None) -> None:
        self.name, self.run = name, run


class DTypeStub:
    """A numpy dtype under construction: a code such as ``f4``, then its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def build(self, state: Any) -> None:
        # numpy's state: (version, byte order, subarray, field names, fields, size, alignment, flags, ...)
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
            raise UnsafePickleError(f"numpy dtype with the state {state!r:.80}")
        if any(part is not None for part in state[2:5]):
            raise UnsafePickleError("numpy dtype with fields or a subarray")
        self.order = state[1]

    def numpy(self) -> numpy.dtype[Any]:
        import numpy

        return numpy.dtype(("" if self.order == "|" else self.order) + self.code)


class ArrayStub:
    """A numpy array under construction; a real array on the stack would offer its ``__setstate__``."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: numpy.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[3], (bool, int)):
            raise UnsafePickleError("numpy array with an unknown kind of state")
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: str) -> None:
        import numpy

        if not isinstance(dtype, DTypeStub):
            raise UnsafePickleError(f"numpy array of dtype {describe(dtype)}")
        if not isinstance(data, (bytes, bytearray)):
            raise UnsafePickleError(f"numpy array made of a {describe(data)} instead of bytes")
        found = dtype.numpy()
        if not _whole_numbers(shape) or math.prod(shape) * found.itemsize != len(data):
            raise UnsafePickleError(f"numpy array of shape {shape!r:.80} and {found} over {len(data)} bytes")
        self.array = numpy.frombuffer(data, found).reshape(shape, order=order)  # type: ignore[call-overload]


class TensorStub:
    """A finished tensor or storage, wrapped for the same reason."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def is_tensor(self) -> bool:
        import torch

        return isinstance(self.value, torch.Tensor)


def describe(value: Any) -> str:
    return f"'{value.name}'" if isinstance(value, Door) else type(value).__name__.strip("_")


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def _numpy_dtype(code: Any, *flags: Any) -> DTypeStub:
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise UnsafePickleError(f"numpy dtype {code if isinstance(code, str) else describe(code)!r:.80}")
    return DTypeStub(code)


def _numpy_reconstruct(kind: Any, *placeholder: Any) -> ArrayStub:
    if not isinstance(kind, Door) or kind.name != "numpy.ndarray":
        raise UnsafePickleError(f"numpy array of the class {describe(kind)}")
    return ArrayStub()


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> ArrayStub:
    if order not in ("C", "F"):
        raise UnsafePickleError(f"numpy array in the order {order!r:.20}")
    stub = ArrayStub()
    stub.fill(data, dtype, shape, order)
    return stub


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    stub = ArrayStub()
    stub.fill(data, dtype, (), "C")
    assert stub.array is not None
    return stub.array.item()


def _encode(text: Any, encoding: Any) -> bytes:
    # how protocol 2 writes bytes
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafePickleError("_codecs.encode other than text to latin1")
    return text.encode("latin1")


def _empty_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise UnsafePickleError("bytes(...) with arguments")
    return b""


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise UnsafePickleError("OrderedDict(...) with arguments")
    return {}


def _torch_storage(data: Any) -> TensorStub:
    import torch

    # The only thing pickle.dumps(tensor) puts here is torch's legacy format; its first bytes are fixed.
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    if not isinstance(data, (bytes, bytearray)) or not data.startswith(magic):
        raise UnsafePickleError("torch storage that is not in torch's own format")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch refuses is refused here, with its reason
        reason = next(iter(str(error).splitlines()), "")
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for '{forbidden[1]}'"
        raise UnsafePickleError(f"torch storage that torch.load(weights_only=True) refuses: {reason}") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnsafePickleError(f"torch storage that holds a {type(storage).__name__}")
    return TensorStub(storage)


def _torch_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorStub:
    import torch

    found = storage.value if isinstance(storage, TensorStub) else None
    if not isinstance(found, torch.storage.TypedStorage):
        raise UnsafePickleError(f"torch tensor over a {describe(storage)}")
    memory = found._untyped_storage  # its public name warns that the typed one will go
    count = memory.nbytes() // found.dtype.itemsize
    sound = _whole_numbers((offset,)) and _whole_numbers(size) and _whole_numbers(stride)
    if not sound or len(size) != len(stride) or math.prod(size) > count:
        raise UnsafePickleError(f"torch tensor of size {size!r:.80} over {count} elements")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > 0 and last >= count:
        raise UnsafePickleError(f"torch tensor that reaches element {last} of {count}")
    tensor = torch.empty(0, dtype=found.dtype)
    return TensorStub(tensor.set_(memory, offset, size, stride))


def _torch_parameter(tensor: Any, *rest: Any) -> TensorStub:
    if not isinstance(tensor, TensorStub):
        raise UnsafePickleError(f"torch parameter over a {describe(tensor)}")
    return tensor


DOORS: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty_bytes,
    ("__builtin__", "bytes"): _empty_bytes,
    ("collections", "OrderedDict"): _ordered_dict,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy", "ndarray"): None,  # only ever an argument
    ("torch.storage", "_load_from_bytes"): _torch_storage,
    ("torch._utils", "_rebuild_tensor"): _torch_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
    ("torch._utils", "_rebuild_parameter"): _torch_parameter,
}
for _package in ("numpy.core", "numpy._core"):  # before and since numpy 2
    DOORS[_package + ".multiarray", "_reconstruct"] = _numpy_reconstruct
    DOORS[_package + ".multiarray", "scalar"] = _numpy_scalar
    DOORS[_package + ".numeric", "_frombuffer"] = _numpy_frombuffer
