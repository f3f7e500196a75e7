"""Which implementation attends: our own backends, or by name PyTorch's `scaled_dot_product_attention` and others'."""

import torch
from torch import Tensor

from blip3o_fast.ops import _attention_peers as peers
from blip3o_fast.ops import _triton
from blip3o_fast.ops._backend import Backends, use_backend
from blip3o_fast.ops._softmax_blocks import seen
from blip3o_fast.ops._switch import Switch

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

    active = "auto"

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
    name = use_attention.active
    if name == "auto":
        backend = backends.choose(q, k, *others)
        if backend == "reference" and use_backend.active == "auto" and _prefers_sdpa(q, k, dtype, differentiable):
            return "sdpa"
        return backend
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
        widest = torch.promote_types(widest, other.dtype)
    return widest


# What one program of the triton kernels holds of a head.
_TRITON_HEAD_DIM = 128


def triton_refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the triton attention kernels can run on these tensors, else the reason; x: [..., d]."""
    if x.shape[-1] > _TRITON_HEAD_DIM:
        return f"its triton kernel takes heads of up to {_TRITON_HEAD_DIM}, got {int(x.shape[-1])}"
    return _triton.refusal(x, *others)


# CPU milliseconds of dual_attention, forward / forward and backward, [16, 64, 28, 64] on one core with AVX-512, PyTorch
# 2.13, interleaved:                 sdpa        reference    stock's sequence
#                       fp32        24 /  76     26 /  86     31 /  95
#                       bf16        29 / 164     24 /  76     31 / 164
#                       fp16        66 / 426     22 /  70     71 / 426
# Both are for where there is no extension. The cpu backend, from 64 tokens to 4096, took 0.2 to 0.7 of sdpa's time with
# AVX-512 (1024 tokens, 4 heads, fp32: 10 / 33 against 22 / 76) and, at 64 tokens, up to all of it with AVX2: where it
# can run, it is the choice.
# PyTorch's half-precision kernels convert more than they compute. In fp16 that holds at every length (1024 tokens,
# 4 heads: 27 / 411 against 18 / 67); in bf16 up to about 200 tokens (256 tokens, 2 samples, 28 heads: 23 / 85 against
# 26 / 88; 1024 tokens, 4 heads: 16 / 46 against 19 / 67).
_BF16_REFERENCE_PAIRS = 1 << 15


def _prefers_sdpa(q: Tensor, k: Tensor, dtype: torch.dtype, differentiable: bool) -> bool:
    """Whether sdpa is the faster of the two; off the CPU also only where it is sure to be repeatable bit by bit."""
    if q.device.type != "cpu":
        # not measured; PyTorch's backward kernels add up dq in the order in which they come
        return not differentiable
    if dtype == torch.float16:
        return False
    return dtype != torch.bfloat16 or q.shape[1] * k.shape[1] > _BF16_REFERENCE_PAIRS


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
