"""Self-attention plus gated cross-attention of a Lumina NextDiT block, both from the packed queries and keys.

    P1  = softmax(q1 k1^T * scale)             P2 = softmax(q2 k2^T / sqrt(d))   over the context that the mask shows
    out = P1 v1 + tanh(gate) * P2 v2           gate: one number per query head

Query head j reads key head j // (H / K) in both. `scale` is the self-attention's alone. A sample whose mask shows no
context gets zero from P2 v2, with zero gradients (where PyTorch's formula is 0 / 0).

Source: `LuminaNextDiTBlock` and `LuminaAttnProcessor2_0` of diffusers. There each key head is repeated before the heads
are flattened, so its H / K query heads are consecutive; proportional attention (`base_sequence_length`) changes the
scale only where the keys are rotated, which is the self-attention, and the cross-attention keeps PyTorch's default.

Backward, with g = tanh(gate), dPi = dout vi^T, and each Pi made again:

    dv1 = P1^T dout                  dv2   = g * W    with W = P2^T dout
    dS1 = P1 * (dP1 - sum(P1 * dP1)) dS2   = g * P2 * (dP2 - sum(P2 * dP2))
    dq1 = dS1 k1 * scale             dq2   = dS2 k2 / sqrt(d)
    dk1 = dS1^T q1 * scale           dk2   = dS2^T q2 / sqrt(d)
    dgate = (1 - g^2) * sum(W * v2)  since sum(dout * P2 v2) = sum(W * v2): P2 v2 need not be kept or made again

Saved: the inputs alone; see `flash_attention` for why no row statistic.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _attention, _checks, _cpu, _triton
from blip3o_fast.ops import _dual_attention_cuda as cuda
from blip3o_fast.ops import _softmax_blocks as softmax_blocks
from blip3o_fast.ops._backend import Backends
from blip3o_fast.ops._library import (
    accumulation_dtype,
    define,
    needs_grad,
    output_dtype,
    recorded,
    refuse_second_derivative,
    refuse_transforms,
    run,
)
from blip3o_fast.ops.flash_attention import flash_attention_ref


def dual_attention_ref(
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The specification: plain PyTorch, fp32 arithmetic (fp64 for fp64 inputs), one rounding to qkq's dtype."""
    acc = accumulation_dtype(qkq, v1, k2, v2, gate)
    q1, k1, q2 = _split(qkq.to(acc), v1.shape[2])
    own = flash_attention_ref(q1, k1, v1.to(acc), scale=scale)
    cross = flash_attention_ref(q2, k2.to(acc), v2.to(acc), mask=mask)
    return (own + gate.to(acc).tanh()[:, None] * cross).flatten(2).to(qkq.dtype)


def _split(qkq: Tensor, key_heads: int) -> tuple[Tensor, ...]:
    """q1, k1 and q2 as views."""
    heads = (qkq.shape[2] - key_heads) // 2
    return qkq.split([heads, key_heads, heads], dim=2)


def _check(
    qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, scale: float | None, mask: Tensor | None
) -> None:
    _checks.check_rank("qkq", qkq, "B, T, H+K+H, d")
    _checks.check_rank("v1", v1, "B, T, K, d")
    _checks.check_rank("k2", k2, "B, L, K, d")
    batch, tokens, packed, head_dim = qkq.shape
    key_heads, context = v1.shape[2], k2.shape[1]
    if packed <= key_heads or (packed - key_heads) % 2 != 0:
        raise ValueError(f"qkq must hold H+K+H heads with K = {int(key_heads)} as in v1, got {int(packed)}")
    heads = (packed - key_heads) // 2
    _checks.check_shape("v1", v1, "B, T, K, d", (batch, tokens, key_heads, head_dim))
    _checks.check_shape("k2", k2, "B, L, K, d", (batch, context, key_heads, head_dim))
    _checks.check_shape("v2", v2, "B, L, K, d", (batch, context, key_heads, head_dim))
    _checks.check_shape("gate", gate, "H", (heads,))
    for name, size in (("qkq", tokens), ("k2", context)):
        if size < 1:
            raise ValueError(f"{name} must have at least 1 token, got {int(size)}")
    _attention.check_groups(heads, key_heads)
    _checks.check_floats(qkq=qkq, v1=v1, k2=k2, v2=v2, gate=gate)
    _attention.check_scale(scale)
    _attention.check_mask(mask, qkq, context, "L")


# ---- reference -----------------------------------------------------------------------------------------------------


def _forward_reference(
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    acc, mask, cross_scale = accumulation_dtype(qkq), softmax_blocks.seen(mask), qkq.shape[-1] ** -0.5
    q1, k1, q2 = _split(qkq, v1.shape[2])
    out, g = torch.empty(q1.shape, dtype=dtype, device=qkq.device), gate.to(acc).tanh()
    by_heads, by_rows = softmax_blocks.partition(q1, v1.shape[2], max(k1.shape[1], k2.shape[1]))
    for heads in by_heads:
        visible = None if mask is None else heads.of_mask(mask)
        keys1, values1, keys2 = (heads.of_keys(t, acc) for t in (k1, v1, k2))
        # the gate goes into the few values instead of the many outputs
        values2 = softmax_blocks.values(heads.of_keys(v2, acc), visible) * heads.of_gate(g, len(qkq))
        for rows in by_rows:
            own = softmax_blocks.probabilities(heads.of_queries(q1, rows, acc), keys1, None, scale)
            cross = softmax_blocks.probabilities(heads.of_queries(q2, rows, acc), keys2, visible, cross_scale)
            heads.store_queries(out, rows, torch.bmm(own, values1).add_(torch.bmm(cross, values2)))
    return out.flatten(2)


def _backward_reference(
    dout: Tensor,
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc, mask, cross_scale = accumulation_dtype(qkq), softmax_blocks.seen(mask), qkq.shape[-1] ** -0.5
    dqkq, dv1, dk2, dv2 = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkq, v1, k2, v2))
    q1, k1, q2 = _split(qkq, v1.shape[2])
    dq1, dk1, dq2 = _split(dqkq, v1.shape[2])
    upstream, g = dout.unflatten(-1, q1.shape[2:]), gate.to(acc).tanh()
    dgate = torch.zeros_like(g)
    by_heads, by_rows = softmax_blocks.partition(q1, v1.shape[2], max(k1.shape[1], k2.shape[1]))
    for heads in by_heads:
        visible = None if mask is None else heads.of_mask(mask)
        block_gate = heads.of_gate(g, len(qkq))
        own = softmax_blocks.Gradient(heads.of_keys(k1, acc), heads.of_keys(v1, acc), None, scale)
        cross = softmax_blocks.Gradient(heads.of_keys(k2, acc), heads.of_keys(v2, acc), visible, cross_scale)
        for rows in by_rows:
            du = heads.of_queries(upstream, rows, acc)
            heads.store_queries(dq1, rows, own.add(heads.of_queries(q1, rows, acc), du))
            heads.store_queries(dq2, rows, cross.add(heads.of_queries(q2, rows, acc), du).mul_(block_gate))
        dkeys, dvalues = own.of_keys_and_values()
        heads.store_keys(dk1, dkeys)
        heads.store_keys(dv1, dvalues)
        dkeys, dvalues = cross.of_keys_and_values()
        product = (dvalues * cross.values).sum((1, 2))
        dgate[heads.queries] += product.unflatten(0, (-1, dgate[heads.queries].shape[0])).sum(0)
        heads.store_keys(dk2, dkeys.mul_(block_gate))
        heads.store_keys(dv2, dvalues.mul_(block_gate))
    return dqkq, dv1, dk2, dv2, dgate.mul_(1 - g.square()).to(gate.dtype)


# ---- cpu (csrc) ----------------------------------------------------------------------------------------------------


def _forward_cpu(
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    out = _forward_fake(qkq, v1, k2, v2, gate, mask, scale, dtype, "cpu")
    _cpu.call("dual_attention_fwd", qkq, v1, k2, v2, gate, mask, scale, out)
    return out


def _backward_cpu(
    dout: Tensor,
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dout, qkq, v1, k2, v2, gate)
    _cpu.call("dual_attention_bwd", dout, qkq, v1, k2, v2, gate, mask, scale, *gradients)
    return gradients


# ---- triton --------------------------------------------------------------------------------------------------------


def _forward_triton(qkq: Tensor, *args: Any) -> Tensor:
    out = _forward_fake(*[qkq, *args, "triton"])
    _triton.kernels("dual_attention").forward(*[qkq, *args[:-1], out])
    return out


def _backward_triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(*inputs)
    _triton.kernels("dual_attention").backward(*inputs, *gradients)
    return gradients


# ---- cuda ----------------------------------------------------------------------------------------------------------


def _forward_cuda(qkq: Tensor, *args: Any) -> Tensor:
    out = _forward_fake(*[qkq, *args, "cuda"])
    cuda.forward(*[qkq, *args[:-1], out])
    return out


def _backward_cuda(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(*inputs)
    cuda.backward(*inputs, *gradients)
    return gradients


# ---- raw ops -------------------------------------------------------------------------------------------------------

_FORWARD = {"reference": _forward_reference, "triton": _forward_triton, "cpu": _forward_cpu, "cuda": _forward_cuda}
_BACKWARD = {"reference": _backward_reference, "triton": _backward_triton, "cpu": _backward_cpu, "cuda": _backward_cuda}
BACKENDS = Backends("dual_attention", triton=_attention.triton_refusal, cpu=_cpu.refusal, cuda=cuda.refusal)


def _forward(qkq: Tensor, *args: Any) -> Tensor:
    return _FORWARD[args[-1]](qkq, *args[:-1])


def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _BACKWARD[args[-1]](dout, *args[:-1])


def _forward_fake(
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return qkq.new_empty((*qkq.shape[:2], gate.shape[0] * qkq.shape[-1]), dtype=dtype)


def _backward_fake(
    dout: Tensor, qkq: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dqkq, dv1, dk2, dv2, dgate = (t.new_empty(t.shape) for t in (qkq, v1, k2, v2, gate))
    return dqkq, dv1, dk2, dv2, dgate


_dual_attention_fwd = define(
    "dual_attention_fwd(Tensor qkq, Tensor v1, Tensor k2, Tensor v2, Tensor gate, Tensor? mask, float scale,"
    " ScalarType dtype, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_dual_attention_bwd = define(
    "dual_attention_bwd(Tensor dout, Tensor qkq, Tensor v1, Tensor k2, Tensor v2, Tensor gate, Tensor? mask,"
    " float scale, str backend) -> (Tensor dqkq, Tensor dv1, Tensor dk2, Tensor dv2, Tensor dgate)",
    _backward,
    _backward_fake,
)


# ---- autograd and the public door ----------------------------------------------------------------------------------


class _DualAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkq: Tensor,
        v1: Tensor,
        k2: Tensor,
        v2: Tensor,
        gate: Tensor,
        mask: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(qkq, v1, k2, v2, gate, mask)
        ctx.scale, ctx.backend = scale, backend
        return run(_dual_attention_fwd, qkq, v1, k2, v2, gate, mask, scale, dtype, backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("dual_attention")
        grads = run(_dual_attention_bwd, dout, *ctx.saved_tensors, ctx.scale, ctx.backend)
        return *grads, None, None, None, None


def dual_attention(
    qkq: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    gate: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention plus tanh-gated cross-attention.

    Equivalent to `dual_attention_ref`, without ever holding all probabilities.

    qkq: [B, T, H+K+H, d], the heads of q1, k1 and q2 as `qk_norm_rope` packs them; v1: [B, T, K, d];
    k2, v2: [B, L, K, d], L >= 1; gate: [H], before the tanh. H is a multiple of K; query head j reads key head
    j // (H / K). Slices of packed tensors are read where they lie. scale: of the self-attention's scores, None =
    d^-0.5; the cross-attention's is always d^-0.5. mask: bool [B, L], True = attend; a sample with none gets no
    context. fp32, bf16, fp16, mixed freely; fp64 only alone. B may be 0.
    Returns [B, T, H*d] in autocast's dtype where autocast is on, else in qkq's dtype.
    Numerics: fp32 softmax, products, tanh and sum, one rounding at the store, bitwise repeatable. Under
    `use_attention("sdpa")`, and by default where it is faster, PyTorch's `scaled_dot_product_attention` computes the
    two attentions with PyTorch's roundings; other names of `use_attention` with theirs.
    Raises ValueError for a wrong shape, dtype or device, RuntimeError where what was asked for by name cannot run it.
    """
    _check(qkq, v1, k2, v2, gate, scale, mask)
    refuse_transforms("dual_attention")
    dtype, differentiable = output_dtype(qkq), needs_grad(qkq, v1, k2, v2, gate)
    longer = k2 if k2.shape[1] > qkq.shape[1] else v1
    backend = _attention.choose(
        BACKENDS, qkq, longer, v1, k2, v2, gate, mask,
        dtype=dtype, differentiable=differentiable, computed=_attention.computing_dtype(dtype, qkq, v1, k2, v2),
    )  # fmt: skip
    cross_scale = qkq.shape[-1] ** -0.5
    scale = cross_scale if scale is None else float(scale)
    with recorded("dual_attention"):
        if backend in _attention.IMPLEMENTATIONS:
            q1, k1, q2 = _split(qkq, v1.shape[2])
            own = _attention.attend(backend, q1, k1, v1, scale, None, dtype)
            cross = _attention.attend(backend, q2, k2, v2, cross_scale, mask, dtype)
            g = gate.to(accumulation_dtype(gate)).tanh()[:, None]
            return (own + g * cross).flatten(2).to(dtype)
        if differentiable:
            return _DualAttention.apply(qkq, v1, k2, v2, gate, mask, scale, dtype, backend)
        return run(_dual_attention_fwd, qkq, v1, k2, v2, gate, mask, scale, dtype, backend)
