"""Wrong arguments for kernels: every strategy takes arguments that are right and draws something beside them."""

from dataclasses import replace
from typing import Any

from arena import ITEM, SLOT, Tensor, contiguous
from hypothesis import strategies as st


class Raw:
    """An argument that goes to the kernel as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


NEVER = (2**47, 2**62, 2**63 - 1, 2**63, 2**64, -1, -(2**63), -(2**70))  # no size, no stride
HUGE = (2**31, 2**46, *NEVER)
JUNK = (
    3,
    1.5,
    "x",
    b"",
    None,
    True,
    [],
    (),
    {},
    object,
    (1, 2, 3),
    (0, 0, (), ()),
    (4096, 0, [2], [1]),
    (4096, "0", (2,), (1,)),
    ("4096", 0, (2,), (1,)),
    (4096.0, 0, (2,), (1,)),
    (None, None, None, None),
    (-8, 0, (2,), (1,)),
    (2**64, 0, (2,), (1,)),
    (True, 0, (2,), (1,)),
    (4096, 0, (2,), ()),
    (4096, 0, (2, "x"), (1, 1)),
    (4096, 0, (2, 1.5), (1, 1)),
    (4096, 0, (1,) * 7, (1,) * 7),
    (4096, 7, (2,), (1,)),
    (4096, -1, (2,), (1,)),
    (4096, 2**40, (2,), (1,)),
)


def other_shape(tensor: Tensor, draw: Any) -> Tensor:
    sizes = list(tensor.shape)
    how = draw(st.sampled_from(("size", "drop", "add", "swap")))
    if how == "add" or not sizes:
        sizes.insert(draw(st.integers(0, len(sizes))), draw(st.sampled_from((0, 1, 2, 3))))
        return contiguous(tensor, tuple(sizes[:6]))
    index = draw(st.integers(0, len(sizes) - 1))
    if how == "drop":
        del sizes[index]
    elif how == "swap":
        sizes[index], sizes[0] = sizes[0], sizes[index]
    else:
        sizes[index] = max(
            0, draw(st.sampled_from((0, 1, 2, sizes[index] - 1, sizes[index] + 1, 2 * sizes[index], 64)))
        )
    return contiguous(tensor, tuple(sizes))


def other_strides(tensor: Tensor, draw: Any) -> Tensor:
    if not tensor.shape:
        return tensor
    strides = list(tensor.strides)
    index = draw(st.integers(0, len(strides) - 1))
    how = draw(st.sampled_from(("broadcast", "every second", "swap", "padded", "huge")))
    if how == "broadcast":
        strides[index] = 0
    elif how == "every second":
        strides = [2 * stride for stride in strides]
    elif how == "swap":
        strides[index], strides[-1] = strides[-1], strides[index]
    elif how == "padded":
        strides[: index + 1] = [stride + 3 for stride in strides[: index + 1]]
    elif tensor.shape[index] <= 1:  # a step that is never taken
        strides[index] = draw(st.sampled_from((2**31, 2**45, 2**46)))
    return replace(tensor, strides=tuple(strides))


def huge(kernel: Any, tensor: Tensor, draw: Any) -> Raw:
    """One size or stride that no memory can have."""
    address, dtype, shape, strides = kernel.given(tensor)
    number = draw(st.sampled_from(NEVER))
    index = draw(st.integers(0, max(len(shape) - 1, 0)))
    if draw(st.booleans()):
        if draw(st.booleans()):  # nothing in it, and a number of rows that overflows
            return Raw((address, dtype, (0, 2**40, 2**40), (1, 1, 1)))
        return Raw((address, dtype, (*shape[:index], number, *shape[index + 1 :]), strides))
    return Raw((address, dtype, shape, (*strides[:index], number, *strides[index + 1 :])))


# What a kernel has to look at itself comes more often than what view_caster.h refuses for all.
HOW = (*("shape", "strides", "float") * 3, "dtype", "place", "absent", "flip", "null", "odd", "huge", "junk")


def changed(kernel: Any, index: int, argument: Any, draw: Any) -> Any:
    kind = kernel.arguments[index][1]
    if kind != "tensor":
        numbers = {
            "int": (-1, 0, 1, 2, 3, 7, 63, 64, 65, 1000, *HUGE),
            "float": (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0.5, 2.0, 1e308, 1e-320, 3, 10**400),
            "bool": (0, 1, True, False),
        }[kind]
        return Raw(draw(st.sampled_from((*numbers, *JUNK[:10]))))
    if not isinstance(argument, Tensor):
        return Raw(draw(st.sampled_from(JUNK)))
    how = draw(st.sampled_from(HOW))
    address, *rest = kernel.given(argument)
    if how in ("dtype", "float"):
        return replace(argument, dtype=draw(st.sampled_from(tuple(ITEM) if how == "dtype" else (0, 1, 2))))
    if how == "shape":
        return other_shape(argument, draw)
    if how == "strides":
        return other_strides(argument, draw)
    if how == "place":
        return replace(argument, at_end=not argument.at_end)
    if how == "flip" and argument.content:
        return replace(argument, flipped=draw(st.integers(1, 512)))
    if how == "huge":
        return huge(kernel, argument, draw)
    if how == "null":
        return Raw((0, *rest))
    if how == "odd" and argument.bytes and ITEM[argument.dtype] > 1:
        return Raw((address + 1, *rest))
    return None if how == "absent" else Raw(draw(st.sampled_from(JUNK)))


@st.composite
def calls(draw: Any, kernel: Any, good: list[tuple[int, list[Any]]]) -> tuple[list[Any], Any, Any]:
    """(arguments, isa, threads), of which most are right."""
    isa, right = draw(st.sampled_from(good))
    arguments = list(right)
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, len(arguments) - 1))
        arguments[index] = changed(kernel, index, arguments[index], draw)
    if draw(st.integers(0, 9)) == 0:
        arguments = draw(st.sampled_from((arguments[:-1], [*arguments, 1], [*arguments, None], [])))
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    if tensors and draw(st.integers(0, 9)) == 0:  # two in one place
        first, second = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        arguments[first] = replace(arguments[first], slot=arguments[second].slot)
    fit = [None if isinstance(a, Tensor) and a.bytes > SLOT else a for a in arguments]
    threads = draw(st.sampled_from((1, 1, 2, 3, 5, 33)))
    if draw(st.integers(0, 3)) == 0:
        isa = draw(st.sampled_from(kernel.isas))
    if draw(st.integers(0, 15)) == 0:
        isa = draw(st.sampled_from((-1, 99, 2**31, 2**70, "2", None, 1.5)))
    if draw(st.integers(0, 15)) == 0:
        threads = draw(st.sampled_from((-1, 0, 4097, 2**31, 2**70, "2", None, 1.5)))
    return fit, isa, threads
