"""What others have made of our ops, as providers: imported when a case is made, absent with the reason otherwise.

Each function takes what decides whether a peer can do a case, and gives a function of the op's tensors, or `Absent`.
diffusers' run in the tests; the signatures of the others are those of liger_kernel 0.6, quack-kernels 0.2, flash-attn
2.7 and xformers 0.0.30, tested with stand-ins and not yet run.

Left out, since they compute something else than the op: Liger's rotary embedding turns the two halves of a head, where
Lumina turns neighbours; xformers' SwiGLU, diffusers' `LuminaFeedForward` and its attention processor contain the
products around our ops. The last two run whole in `model_forward`, whose baseline is diffusers' network itself.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.work import Absent

Peer = Callable[..., Any] | Absent


def find(package: str, module: str, name: str) -> Any:
    """An attribute of a module, or `Absent` with the name of the package and what importing it said."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a build for another PyTorch or GPU fails in its own ways; all mean the same
        return Absent(f"{package}: {(str(error) or type(error).__name__).splitlines()[0]}")


def _modulated(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A norm of (x, weight) followed by stock's product with 1 + scale, where there is a scale."""

    def run(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        y = norm(x, weight)
        return y if scale is None else y * (1 + scale[:, None])

    return run


def rms_norms(eps: float = 1e-5) -> dict[str, Peer]:
    """Of `rms_norm_modulate`: (x [B, T, D], weight [D], scale [B, D] or None)."""
    liger = find("Liger-Kernel", "liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    quack = find("quack", "quack", "rmsnorm")
    module = find("diffusers", "diffusers.models.normalization", "RMSNorm")

    def by_liger(x: Tensor, weight: Tensor) -> Tensor:
        # offset 0, the roundings of Llama, and dy not overwritten: others may read it
        return liger.apply(x, weight, eps, 0.0, "llama", False)

    def by_quack(x: Tensor, weight: Tensor) -> Tensor:
        return quack(x.flatten(0, -2), weight, eps=eps).view_as(x)

    def by_diffusers(x: Tensor, weight: Tensor) -> Tensor:
        with torch.device("meta"):
            norm = module(weight.shape[0], eps=eps)
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    found = {"liger": (liger, by_liger), "quack": (quack, by_quack), "diffusers": (module, by_diffusers)}
    return {name: has if isinstance(has, Absent) else _modulated(norm) for name, (has, norm) in found.items()}


def swiglus() -> dict[str, Peer]:
    """Of `swiglu`: gate_up [B, T, 2 F]."""
    liger = find("Liger-Kernel", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    silu = find("diffusers", "diffusers.models.activations", "FP32SiLU")

    def by_liger(gate_up: Tensor) -> Tensor:
        # Its backward writes over what its forward was given, so it is given copies, which cost it time.
        return liger.apply(*(half.contiguous() for half in gate_up.chunk(2, dim=-1)))

    def by_diffusers(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu()(gate) * up

    found: dict[str, Any] = {"liger": (liger, by_liger), "diffusers": (silu, by_diffusers)}
    return {name: has if isinstance(has, Absent) else run for name, (has, run) in found.items()}


def layer_norms(eps: float = 1e-6) -> dict[str, Peer]:
    """Of `layer_norm_modulate`: (x [B, T, D], scale [B, D]). Liger's has a weight and a bias: ones and zeros."""
    liger = find("Liger-Kernel", "liger_kernel.ops.layer_norm", "LigerLayerNormFunction")

    @functools.cache
    def parameters(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)

    def by_liger(x: Tensor, scale: Tensor) -> Tensor:
        return liger.apply(x, *parameters(x.shape[-1], x.dtype, x.device), eps) * (1 + scale)[:, None, :]

    return {"liger": liger if isinstance(liger, Absent) else by_liger}


def attentions(dtype: torch.dtype, *, grouped: bool, masked: bool) -> dict[str, Peer]:
    """Of `flash_attention`: (q [B, T, H, d], k and v [B, L, K, d], seen, mask); grouped: fewer key heads than heads."""
    flash = find("flash-attn", "flash_attn", "flash_attn_func")
    if not isinstance(flash, Absent) and (masked or dtype == torch.float32):
        flash = Absent("flash-attn takes fp16 and bf16 without a key mask")
    memory = find("xformers", "xformers.ops", "memory_efficient_attention")
    if not isinstance(memory, Absent) and (masked or grouped):
        memory = Absent("compared without mask and with as many key heads as query heads")

    def of(function: Any) -> Peer:
        return function if isinstance(function, Absent) else lambda q, k, v, seen, mask: function(q, k, v)

    return {"flash-attn": of(flash), "xformers": of(memory)}
