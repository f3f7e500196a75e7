"""Attention by packages of others: flash-attn 3 and 2, and xformers. Imported where asked for by name, never before.

All three take [B, T, heads, d] as ours do and accept rows that lie apart, but ask for more:

    flash-attn 2   fp16, bf16; d <= 256; no mask of keys, so the visible keys are packed and its varlen function attends
    flash-attn 3   the same, on Hopper alone; its first betas returned (out, lse), later ones out alone
    xformers       fp32, fp16, bf16; as many key heads as query heads; a mask is a tensor to add, [B, H, Tq, Tk] in the
                   dtype of q, whose strides are multiples of 16 bytes

The signatures are those of flash_attn/flash_attn_interface.py (flash-attn 2.7 and 2.8), hopper/flash_attn_interface.py
(flash-attn 3) and `xformers.ops.memory_efficient_attention` (0.0.35). Each differentiates itself.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAMES = ("flash-attn", "xformers")

# What to import, the first that can be used first.
_MODULES = {"flash-attn": ("flash_attn_interface", "flash_attn"), "xformers": ("xformers.ops",)}
# flash-attn is no extra of ours: it compiles against the PyTorch that is installed, so pip must not isolate its build.
_INSTALL = {
    "flash-attn": "pip install flash-attn --no-build-isolation",
    "xformers": 'pip install "blip3o_fast[attention]"',
}
_DTYPES = {
    "flash-attn": (torch.float16, torch.bfloat16),
    "xformers": (torch.float32, torch.float16, torch.bfloat16),
}
_HOPPER, _MINIMUM_CAPABILITY = 9, (8, 0)
_MOST_HEAD_DIM = 256
# All three want rows of whole 16-byte words: 8 numbers of half precision.
_ALIGNED = 8
_DEVICES: tuple[str, ...] = ("cuda",)

# What was imported: filled by `load`, read where an op is called, since torch.compile traces no import.
_loaded: dict[str, list[ModuleType]] = {}


def load(name: str) -> str | None:
    """Import the package behind a name. None where that worked, else the reason with the command that installs it."""
    _loaded[name], errors = [], []
    for module in _MODULES[name]:
        try:
            _loaded[name].append(importlib.import_module(module))
        except Exception as error:  # a build for another PyTorch fails in its own ways; all mean the same
            errors.append(f"{type(error).__name__}: {error}")
    # the last is the one that most have; its error is the one to tell
    return None if _loaded[name] else f"not available: {errors[-1]} ({_INSTALL[name]})"


def why_not(name: str) -> str | None:
    """The reason why an implementation cannot run anywhere on this machine, or None."""
    reason = load(name)
    if reason is None and _DEVICES == ("cuda",) and not torch.cuda.is_available():
        return "it needs cuda tensors, and PyTorch sees no CUDA device"
    return reason


def refusal(name: str, dtype: torch.dtype, q: Tensor) -> str | None:
    """None where the implementation can attend to queries [..., d] in dtype, else the reason."""
    if not _loaded.get(name):
        return load(name)
    if q.device.type not in _DEVICES:
        return f"it needs cuda tensors, got {q.device.type}"
    if dtype not in _DTYPES[name]:
        known = " and ".join(str(known).removeprefix("torch.") for known in _DTYPES[name])
        return f"it takes {known}, got {str(dtype).removeprefix('torch.')}"
    if name == "xformers":
        return None
    if q.shape[-1] > _MOST_HEAD_DIM:
        return f"it takes heads of up to {_MOST_HEAD_DIM}, got {int(q.shape[-1])}"
    if _flash_module(q.device) is None:
        capability = ".".join(map(str, torch.cuda.get_device_capability(q.device)))
        return f"none of what is installed runs on compute capability {capability} (2 needs 8.0, 3 needs 9.0)"
    return None


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """q [B, Tq, H, d], k and v [B, Tk, K, d], all of one dtype that `refusal` accepts; mask bool [B, Tk], at least one
    visible key per sample. Returns [B, Tq, H, d] in that dtype."""
    head_dim = q.shape[-1]
    padding = -head_dim % _ALIGNED
    # zeros change no score, and the values' zeros are cut off again
    q, k, v = (_readable(torch.nn.functional.pad(t, (0, padding)) if padding else t) for t in (q, k, v))
    run = _flash_attn if name == "flash-attn" else _xformers
    return run(q, k, v, scale, mask)[..., :head_dim]


def _readable(t: Tensor) -> Tensor:
    """The tensor itself where its kernels can read it in place: rows without gaps inside, each on a 16-byte word."""
    *outer, inner = t.stride()
    return t if inner == 1 and not any(stride % _ALIGNED for stride in outer) else t.contiguous()


# ---- flash-attn ------------------------------------------------------------------------------------------------------


def _flash_module(device: torch.device) -> Any:
    """Version 3 on Hopper, else version 2; None where neither is installed for the device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (_HOPPER, 0)
    for module in _loaded["flash-attn"]:
        third = module.__name__ == "flash_attn_interface"
        if capability[0] == _HOPPER if third else capability >= _MINIMUM_CAPABILITY:
            return module
    return None


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    module = _flash_module(q.device)
    # Its backward adds up dq in the order in which blocks end, unless it is told not to.
    settings = {"softmax_scale": scale, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if mask is None:
        return _output(module.flash_attn_func(q, k, v, **settings))
    batch, tokens, heads, head_dim = q.shape
    visible = mask.flatten().nonzero().squeeze(1)  # waits for the device once: how many there are is a shape
    k, v = (t.flatten(0, 1).index_select(0, visible) for t in (k, v))
    starts_q = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    starts_k = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    out = module.flash_attn_varlen_func(
        q.reshape(batch * tokens, heads, head_dim), k, v, starts_q, starts_k, tokens, mask.shape[1], **settings
    )
    return _output(out).unflatten(0, (batch, tokens))


def _output(result: Any) -> Tensor:
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


# ---- xformers --------------------------------------------------------------------------------------------------------


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    [module] = _loaded["xformers"]
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    bias = None if mask is None else _bias(mask, q)
    out: Tensor = module.memory_efficient_attention(q, k, v, attn_bias=bias, p=0.0, scale=scale)
    return out


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """[B, H, Tq, Tk], 0 or -inf: a row per sample, cut from one of aligned length, for every head and query."""
    batch, context = mask.shape
    rows = q.new_zeros(batch, context + -context % _ALIGNED)
    rows[:, :context].masked_fill_(~mask, -torch.inf)
    return rows[:, None, None, :context].expand(batch, q.shape[2], q.shape[1], context)
