"""The torch.library handle that every op registers on, and the rules that all ops share.

An op is a pair of raw, functional torch ops (`<op>_fwd`, `<op>_bwd`) that know nothing of autograd, an
`autograd.Function` over them, and a public function. This order was chosen by measurement: a Function over
`Library.define`/`impl` costs about a third of `register_autograd` per differentiable call.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.kernels import _launch
from blip3o_fast.ops import _debug

LIBRARY = torch.library.Library("blip3o_fast", "DEF")

# Raw ops arrive with their dtypes decided; autocast must not change them again inside.
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_DEVICE_KEYS = ("CPU", "CUDA", "MPS")

_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)
_NOT_RECORDED = contextlib.nullcontext()


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register one raw op and return it.

    schema: `name(Tensor x, ...) -> ...` with a last argument `str backend`, already chosen, where there is a choice.
    implementation: runs on real tensors of any device; fake: allocates outputs of the right shape and dtype.
    While launches are recorded, meta tensors go through the implementation too: it allocates and records its launches.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)

    def kernel(*args: Any) -> Any:
        # no_grad: an exported program calls the raw op itself, with parameters that require grad.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS), torch.no_grad():
            result = implementation(*args)
            _debug.checked(name, implementation, args, result)
            return result

    def shapes(*args: Any) -> Any:
        if _launch.is_recording() and args[-1] == "triton":
            return _launch.recorded_call(name, implementation, args)
        return fake(*args)

    for key in _DEVICE_KEYS:
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"blip3o_fast::{name}", shapes, lib=LIBRARY)
    op = getattr(torch.ops.blip3o_fast, name).default
    _IMPLEMENTATIONS[op] = implementation
    return op


def run(op: Callable[..., Any], *args: Any) -> Any:
    """Call a raw op whose first argument is a tensor and whose last is the backend.

    The dispatcher takes as long as a small kernel of the cpu backend; where nobody looks on (no tracing, no dispatch
    mode, no autocast, no profiler, no tensor subclass) that backend's implementation is called without it. No gradient
    may be wanted of the arguments, which holds wherever raw ops are called from.
    """
    if (
        args[-1] == "cpu"
        and not torch.compiler.is_compiling()
        and type(args[0]) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._autograd._profiler_enabled()
        and not _debug.debug_ops.state.active
    ):
        return _IMPLEMENTATIONS[op](*args)
    return op(*args)


def recorded(op: str) -> contextlib.AbstractContextManager[Any]:
    """A range of the profiler that carries the op's name; nothing, and at no cost, where no profiler runs."""
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return _NOT_RECORDED
    return torch.profiler.record_function(f"blip3o_fast.{op}")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 when the tensors are fp64: what arithmetic and reductions run in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def output_dtype(x: Tensor) -> torch.dtype:
    """dtype of an activation that an op returns: autocast's when it is on for x's device, else x's own."""
    device = x.device.type  # meta tensors (shape and memory studies) know no autocast and raise when asked
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def refuse_second_derivative(op: str) -> None:
    """Called first in every backward: grad mode is on there only under `create_graph=True`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(_no_transforms(op, "second derivatives (create_graph=True)"))


def refuse_transforms(op: str) -> None:
    """Called by every public function: torch.func transforms would bypass the hand-written backward."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(_no_transforms(op, "torch.func transforms (vmap, grad, jvp)"))
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(_no_transforms(op, "forward-mode differentiation (jvp)"))


def _no_transforms(op: str, what: str) -> str:
    return (
        f"blip3o_fast.ops.{op} does not support {what}: its backward is a fused first derivative. "
        f"Use blip3o_fast.ops.{op}_ref, the same formula in plain PyTorch."
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether an op must go through its autograd.Function."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
