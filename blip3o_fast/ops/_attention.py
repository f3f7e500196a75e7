"""Which implementation attends: our own backends, or by name PyTorch's `scaled_dot_product_attention` and others'."""

import torch
from torch import Tensor

from blip3o_fast.ops import _attention_peers as peers
from blip3o_fast.ops import _cpu, _triton
from blip3o_fast.ops._backend import Backends, use_backend
from blip3o_fast.ops._softmax_blocks import seen
from blip3o_fast.ops._switch import State, Switch

# What is no backend of ours: `attend` calls it, and it differentiates itself.
IMPLEMENTATIONS = ("sdpa", *peers.NAMES)
NAMES = ("auto", *IMPLEMENTATIONS)


class use_attention(Switch):
    """Choose who computes attention: `use_attention("sdpa")` from here on, `with use_attention("sdpa"):` inside.

    name: "auto" (the default: what `use_backend` says, and by default the faster one as measured), "sdpa"
    (`torch.nn.functional.scaled_dot_product_attention`), "flash-attn" (version 3 on Hopper where it is installed, else
    2; fp16 and bf16) or "xformers" (`memory_efficient_attention`); all but "auto" are differentiated by their own
    code, with their own roundings. A name given here counts more than `use_backend` for the attention ops.
    Raises ValueError for another name, ImportError where the package cannot be imported, with how to install it and
    which names work here. What cannot run a call (its device, its dtype) raises RuntimeError when the op is called.
    """

    state = State("auto")

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"attention must be one of {', '.join(NAMES)}, got {name!r}")
        reason = peers.load(name) if name in peers.NAMES else None
        if reason is not None:
            works = [known for known, wrong in attention_implementations().items() if wrong is None]
            raise ImportError(f"attention {name!r} is {reason}; here work: {', '.join(('auto', *works))}")
        super().__init__(name)


def attention_implementations() -> dict[str, str | None]:
    """Each implementation that `use_attention` knows by name -> None where it works, else why it does not.

    Imports the packages, to see whether they can be.
    """
    return {"sdpa": None, **{name: peers.why_not(name) for name in peers.NAMES}}


def choose(
    backends: Backends,
    q: Tensor,
    k: Tensor,
    *others: Tensor | None,
    dtype: torch.dtype,
    differentiable: bool,
    computed: torch.dtype | None = None,
) -> str:
    """The backend of a call, or one of IMPLEMENTATIONS. RuntimeError where what is asked for by name cannot run it.

    q, k: [B, T, heads, d], those with the most pairs where there are several; dtype: the result's; computed: in which
    IMPLEMENTATIONS compute it (`computing_dtype`), if another.
    """
    name = use_attention.state.active
    if name == "auto":
        backend = backends.choose(q, k, *others)
        automatic = use_backend.state.active == "auto"
        return "sdpa" if automatic and _prefers_sdpa(backend, q, k, dtype, differentiable) else backend
    reason = peers.refusal(name, computed or dtype, q) if name in peers.NAMES else None
    if reason is not None:
        raise RuntimeError(f"attention implementation {name!r} cannot run {backends.op}: {reason}")
    return name


def computing_dtype(dtype: torch.dtype, q: Tensor, *others: Tensor) -> torch.dtype:
    """What IMPLEMENTATIONS compute in: `dtype` under autocast, else the widest of the tensors'."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return dtype
    widest = q.dtype
    for other in others:
        if other.dtype != widest:  # promote_types is an operation of its own to those who count them
            widest = torch.promote_types(widest, other.dtype)
    return widest


# What one program of the triton kernels holds of a head.
_TRITON_HEAD_DIM = 128


def triton_refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the triton attention kernels can run on these tensors, else the reason; x: [..., d]."""
    if x.shape[-1] > _TRITON_HEAD_DIM:
        return f"its triton kernel takes heads of up to {_TRITON_HEAD_DIM}, got {int(x.shape[-1])}"
    return _triton.refusal(x, *others)


# The rule of `auto`: stock calls PyTorch's SDPA with key heads repeated and a mask expanded, also where nothing is
# hidden; `sdpa` here is that call without them, so it is the choice wherever a kernel of ours would lose. How many
# times faster than stock dual_attention was, PyTorch 2.13, one core, processor time, in turns, forward / forward and
# backward, over 1 to 4 samples of 64 tokens with a context of 1 to 512 and 256 to 1024 tokens with 4 query heads of 72
# per key head (32 samples, and 4096 tokens, with avx512_bf16, on two cores by the clock: 2.5-3.9 / 1.9-5.9):
#
#   C++ kernels   avx512(_bf16) fp32 2.2-6.3 / 1.6-2.9   bf16 2.0-3.8 / 1.7-4.6
#                 avx2          fp32 1.3-3.6 / 0.95-2.1  bf16 1.6-2.7 / 2.5-9.0   (PyTorch with AVX2 too)
#                 generic       fp32 0.8-1.4 / 0.6-1.0   bf16 0.7-1.2 / 1.2-1.7 up to 2^15 pairs, 0.5-0.9 beyond
#                                                        fp16 1.0-1.7 / 1.9-4.8
#   sdpa                        fp32 1.1-1.4 / 1.0-1.2   bf16 1.0-1.2 / 1.0-1.1   fp16 1.0-1.1 / 1.0
#   reference                   fp32 0.8-1.0 / 0.7-0.9   bf16 0.6-0.9 / 1.0-1.4 up to 2^13 pairs, 0.6-0.9 beyond
#                                                        fp16 1.5-1.6 / 2.8-4.3
_HALF_PAIRS = {"cpu": 1 << 15, "reference": 1 << 13}


def _prefers_sdpa(backend: str, q: Tensor, k: Tensor, dtype: torch.dtype, differentiable: bool) -> bool:
    """Whether sdpa is the faster of the two; off the CPU also only where it is sure to be repeatable bit by bit."""
    if q.device.type != "cpu":
        # not measured; PyTorch's backward kernels add up dq in the order in which they come
        return backend == "reference" and not differentiable
    if backend not in _HALF_PAIRS or (backend == "cpu" and _cpu.active_isa() != _PORTABLE) or dtype == torch.float16:
        return False
    if dtype == torch.bfloat16 and differentiable:
        return q.shape[1] * k.shape[1] > _HALF_PAIRS[backend]
    return True


_PORTABLE = "generic"  # the instruction set of vectors that every processor has


def attention_rule() -> dict[str, str]:
    """What `use_attention("auto")` takes on this machine, by device: the rule that was measured."""
    if not _cpu.ISAS:
        kept, pairs = "the reference", _HALF_PAIRS["reference"]
    elif _cpu.active_isa() == _PORTABLE:
        kept, pairs = "the C++ kernels", _HALF_PAIRS["cpu"]
    else:
        kept, pairs = "", 0
    cpu = f"sdpa; {kept} in fp16, and to train in bf16 up to {pairs} pairs of query and key per head"
    return {
        "cpu": cpu
        if kept
        else f"the C++ kernels ({_cpu.active_isa()}): as fast as stock or faster, within 5 %, at every size measured",
        "cuda": "the triton, else the cuda kernels; where neither runs sdpa, and the reference for gradients",
    }


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One of IMPLEMENTATIONS on q [B, Tq, H, d], k and v [B, Tk, K, d], mask bool [B, Tk].

    Returns [B, Tq, H, d] as they left it: in `dtype` under autocast, else in the widest dtype of q, k and v.
    """
    dtype = computing_dtype(dtype, q, k, v)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if type(mask) is Tensor and not torch.compiler.is_compiling():  # what it holds decides, which no trace can know
        mask = seen(mask)
    # A sample that sees nothing is given everything, so that no kernel meets an empty softmax, and set to zero after.
    empty = None if mask is None else ~mask.any(-1)
    visible = mask if mask is None or empty is None else mask | empty[:, None]
    if k.shape[1] == 1:
        out = _over_one_key(q, k, v, scale)
    elif name in peers.NAMES and q.shape[0] > 0:
        out = peers.attend(name, q, k, v, scale, visible)
    else:
        out = sdpa(q, k, v, scale, visible)
    return out if empty is None else out.masked_fill(empty[:, None, None, None], 0)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`scaled_dot_product_attention` on tensors of one dtype, each sample with a visible key; as `attend`."""
    q, k, v = _heads_first(q, k, v)
    visible = None if mask is None else mask[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return out.transpose(1, 2)


def _over_one_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The softmax of one score is 1 whatever q and k are. The backward of PyTorch's softmax gives them zero gradients,
    where fused ones leave rounding."""
    q, k, v = _heads_first(q, k, v)
    return (torch.softmax(q @ k.transpose(-1, -2) * scale, -1).to(v.dtype) @ v).transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, heads, d] to [B, H, T, d], each key head repeated for its group of query heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return q, k, v


def check_mask(mask: Tensor | None, x: Tensor, context: int, name: str) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a bool tensor (True = attend), got {given}")
    if tuple(mask.shape) != (x.shape[0], context):
        expected = f"({int(x.shape[0])}, {int(context)})"
        raise ValueError(f"mask must have shape (B, {name}) = {expected}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on {x.device} like the queries, got {mask.device}")


def check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, (int, float)) and abs(scale) < float("inf")):
        raise ValueError(f"scale must be a finite number or None for head_dim^-0.5, got {scale}")


def check_groups(heads: int, key_heads: int) -> None:
    if key_heads < 1 or heads < 1 or heads % key_heads != 0:
        raise ValueError(f"the number of query heads must be a multiple of the key heads, got {heads} and {key_heads}")
