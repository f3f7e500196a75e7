"""Memory for fuzzing kernels: slots between pages that no one may touch, and a check of every byte around a tensor.

A kernel is told where a tensor lies, not how long its memory is, so that a wrong stride shows as an access past the
slot's end (the process dies) or as a changed byte that belongs to no tensor. Imports neither torch nor the package.
"""

import ctypes
import mmap
from dataclasses import dataclass, replace

import numpy as np

PAGE = mmap.PAGESIZE
SLOT = 32 * PAGE
SLOTS = 16
ITEM = {0: 4, 1: 2, 2: 2, 3: 8, 4: 1, 5: 1, 6: 4}  # bytes of each dtype code of csrc/view.h


@dataclass(frozen=True)
class Tensor:
    """What a kernel is told of a tensor, with the place in the arena instead of an address."""

    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slot: int
    at_end: bool = True  # against the forbidden page behind the slot, else against the one before it
    content: str = ""  # a name in Arena.contents: the first bytes; random ones where it is empty
    flipped: int = 0  # with content: the number of a bit that is wrong, from 1 on

    def __repr__(self) -> str:
        more = f", {self.content!r}, bit {self.flipped}" * bool(self.content)
        place = "end" if self.at_end else "start"
        return f"Tensor(dtype {self.dtype}, {self.shape}, strides {self.strides}, {place} of slot {self.slot}{more})"

    @property
    def bytes(self) -> int:
        if 0 in self.shape:
            return 0
        steps = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (steps + 1) * ITEM[self.dtype]


def contiguous(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return replace(tensor, shape=shape, strides=tuple(reversed(strides)))


class Arena:
    def __init__(self) -> None:
        length = SLOTS * (SLOT + PAGE) + PAGE
        self.memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.pristine = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8)
        # half of the numbers are of a size that arithmetic keeps finite, in fp32 and, by their high halves, in bf16
        floats = self.pristine.view(np.float32)
        floats[::2] = np.random.default_rng(1).standard_normal(floats[::2].size, dtype=np.float32)
        self.bytes[:] = self.pristine
        self.contents: dict[str, bytes] = {}
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for guard in range(SLOTS + 1):
            if protect(self.bytes.ctypes.data + guard * (SLOT + PAGE), PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def offset(self, tensor: Tensor) -> int:
        start = PAGE + tensor.slot * (SLOT + PAGE)
        item = ITEM[tensor.dtype]
        return start + SLOT - -(-tensor.bytes // item) * item if tensor.at_end else start

    def address(self, tensor: Tensor) -> int:
        return int(self.bytes.ctypes.data) + self.offset(tensor)

    def slot_bytes(self, slot: int) -> slice:
        start = PAGE + slot * (SLOT + PAGE)
        return slice(start, start + SLOT)

    def changed(self, slot: int) -> np.ndarray:
        where = self.slot_bytes(slot)
        return self.bytes[where] != self.pristine[where]

    def elements(self, tensor: Tensor) -> np.ndarray:
        """Which bytes of its slot belong to the tensor."""
        mask = np.zeros(SLOT, dtype=bool)
        if tensor.bytes:
            item = ITEM[tensor.dtype]
            first = self.offset(tensor) - self.slot_bytes(tensor.slot).start
            steps = tuple(stride * item for stride in tensor.strides)
            np.lib.stride_tricks.as_strided(mask[first:], (*tensor.shape, item), (*steps, 1))[...] = True
        return mask

    def restore(self, slot: int) -> None:
        self.bytes[self.slot_bytes(slot)] = self.pristine[self.slot_bytes(slot)]

    def write_content(self, tensor: Tensor) -> None:
        """Its bytes are as good as pristine from here on."""
        content = np.frombuffer(self.contents[tensor.content], dtype=np.uint8)[: tensor.bytes].copy()
        if tensor.flipped and tensor.flipped <= 8 * content.size:
            content[(tensor.flipped - 1) // 8] ^= 1 << (tensor.flipped - 1) % 8
        for memory in (self.bytes, self.pristine):
            memory[self.offset(tensor) : self.offset(tensor) + content.size] = content
