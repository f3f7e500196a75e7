"""The blocks' inference on a CPU with packed weights: the C++ kernels called one after the other.

Block by block the same as `forward.block_forward`, without what the public ops do around a kernel (checks, dispatch,
allocations). Those take 70 us of Python a call where a product's weights have just passed through the caches, and a
block of one sample in bfloat16 has 7 ms.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip3o_fast.models import forward as fused
from blip3o_fast.models.layout import projection_groups
from blip3o_fast.models.workspace import Widths, Workspace
from blip3o_fast.ops import _cpu
from blip3o_fast.ops._library import recorded
from blip3o_fast.ops.packed_linear import PackedWeights


def _layers(block: Any) -> dict[str, tuple[Any, ...]]:
    """The layers behind each product."""
    qkqv, key_value, gate_up = projection_groups(block)
    return {
        "qkqv": qkqv,
        "key_value": key_value,
        "out": (block.attn2.to_out[0],),
        "gate_up": gate_up,
        "down": (block.feed_forward.linear_2,),
        "modulation": (block.norm1.linear,),
    }


def _readable(layer: Any) -> bool:
    return fused.plain_linear(layer) and layer.weight.device.type == "cpu" and _cpu.refusal(layer.weight) is None


def packable(block: Any) -> bool:
    """Whether a block can run from packed weights: on a CPU, no adapter, hook or replaced layer in it."""
    layers = _layers(block)
    return (
        not any(_hooked(module) for module in block.modules())
        and all(_readable(layer) for group in layers.values() for layer in group)
        and fused.fusable(block)
        and all(layer.bias is None for name, group in layers.items() if name != "modulation" for layer in group)
    )


# ---- has anything changed? -----------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class Snapshot:
    """The modules and parameters of a block as they are, to find out in some 10 us whether they still are.

    Noticed: another module, parameter, dtype, address or eps, a hook, and whatever counts up a parameter's version.
    """

    def __init__(self, block: nn.Module) -> None:
        self.isa = _cpu.active_isa()
        self.modules = [(m, type(m), dict(m._modules), m.__dict__.get("eps")) for m in block.modules()]
        self.parameters = [
            (m._parameters, name, p, p.data_ptr(), p._version, p.dtype)
            for m in block.modules()
            for name, p in m._parameters.items()
            if p is not None
        ]

    def holds(self) -> bool:
        for module, kind, children, eps in self.modules:
            if type(module) is not kind or module._modules != children or _hooked(module):
                return False
            if module.__dict__.get("eps") != eps:
                return False
        for parameters, name, parameter, address, version, dtype in self.parameters:
            found = parameters.get(name)
            if found is not parameter or found.data_ptr() != address or found._version != version:
                return False
            if found.dtype != dtype:
                return False
        return self.isa == _cpu.active_isa()


# ---- one block -----------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """What all blocks of a call read, described for the kernels. scale: of the self-attention, None the usual one."""

    rope: _cpu.Described
    mask: _cpu.Described | None
    scale: float | None


class Modulation(NamedTuple):
    """made: [B, 4 D]. chunks: scale_msa, gate_msa, scale_mlp, gate_mlp, each [B, D] of it."""

    made: Tensor
    chunks: tuple[_cpu.Described, ...]

    @classmethod
    def of(cls, made: Tensor) -> "Modulation":
        address, dtype, (batch, columns), strides = _cpu.describe(made)
        shape, step = (batch, columns // 4), columns // 4 * made.element_size()
        return cls(made, tuple((address + i * step, dtype, shape, strides) for i in range(4)))


def _affine(*norms: Any) -> list[_cpu.Described | None]:
    """Weight and bias of each, as qk_norm_rope's kernel takes them."""
    tensors = [tensor for norm in norms for tensor in ((None, None) if norm is None else (norm.weight, norm.bias))]
    return [None if tensor is None else _cpu.describe(tensor) for tensor in tensors]


class PackedBlock:
    """A block's packed weights, and its forward from them.

    storage: of `PackedWeights`, for the large products; the modulation keeps at least bfloat16.
    """

    def __init__(self, block: Any, storage: str, workspace: Workspace) -> None:
        self.block, self.storage, self.workspace = block, storage, workspace
        self.products: dict[str, PackedWeights] = {}
        self._read()

    def _read(self) -> None:
        """Pack what is not packed as it is now, and describe everything else for the kernels."""
        block = self.block
        for name, group in _layers(block).items():
            weights, bias, made = [layer.weight for layer in group], group[0].bias, self.products.get(name)
            same = made is not None and made.bias is bias and all(map(lambda a, b: a is b, weights, made.weights))
            if made is None or not same:
                storage = "fp32" if (name, self.storage) == ("modulation", "int8") else self.storage
                self.products[name] = PackedWeights(weights, bias, storage=storage, swiglu=name == "gate_up")
            elif made.stale:
                made.pack()
        self.packed = {name: _cpu.describe(product.packed) for name, product in self.products.items()}
        bias = block.norm1.linear.bias
        self.modulation_bias = None if bias is None else _cpu.describe(bias)

        norms = (block.norm1.norm, block.norm2, block.ffn_norm1, block.ffn_norm2, block.norm1_context)
        self.norm1, self.norm2, self.ffn_norm1, self.ffn_norm2, self.context_norm = (
            _cpu.describe(norm.weight) for norm in norms
        )
        attn1, attn2 = block.attn1, block.attn2
        self.qkq_norms = _affine(attn1.norm_q, attn1.norm_k, attn2.norm_q)
        self.k2_norm = _affine(attn2.norm_k, None, None)
        self.qk_eps, self.k2_eps = fused.qk_eps(attn1), fused.qk_eps(attn2)
        self.eps, self.norm2_eps, self.ffn_eps = block.norm1.norm.eps, block.norm2.eps, block.ffn_norm2.eps
        self.context_eps = block.norm1_context.eps
        self.gate = _cpu.describe(block.gate)
        heads, head_dim = block.gate.shape[0], block.head_dim
        kv_heads = self.products["key_value"].out_features // (2 * head_dim)
        hidden, ffn = self.products["down"].out_features, self.products["down"].in_features
        self.widths = Widths(hidden, heads, kv_heads, head_dim, ffn)
        self.snapshot = Snapshot(block)

    def renew(self) -> bool:
        """Pack again what has changed. False where the block can no longer be read: it then runs by itself."""
        if not self.snapshot.holds():
            if not packable(self.block):
                return False
            self._read()
        return True

    @property
    def nbytes(self) -> int:
        return sum(product.nbytes for product in self.products.values())

    def modulation(self, conditioning: Tensor) -> Modulation:
        """Of silu(y) [B, A]."""
        made = conditioning.new_empty(conditioning.shape[0], 4 * self.widths.hidden)
        _cpu.call("packed_linear", conditioning, self.packed["modulation"], self.modulation_bias, made)
        return Modulation.of(made)

    def context_key_value(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """k2 (normed, never rotated) and v2, [B, L, K, d] each, of context [B, L, E']; new tensors."""
        _, _, kv_heads, head_dim, _ = self.widths
        batch, tokens, width = context.shape
        normed, rstd = context.new_empty(context.shape), context.new_empty((batch, tokens, 1), dtype=torch.float32)
        _cpu.call("rms_norm_modulate_fwd", context, self.context_norm, None, normed, rstd[..., 0], self.context_eps)
        key_value = context.new_empty(batch * tokens, 2 * kv_heads * head_dim)
        _cpu.call("packed_linear", normed.flatten(0, 1), self.packed["key_value"], None, key_value)
        key, value = key_value.view(batch, tokens, 2, kv_heads, head_dim).unbind(2)
        k2, mean, groups = torch.empty_like(key), torch.empty_like(rstd), (kv_heads, 0, 0, 0, 0)
        _cpu.call(
            "qk_norm_rope_fwd", key.flatten(2), *self.k2_norm, None, k2, mean, rstd, *groups, head_dim, self.k2_eps
        )
        return k2, value

    def __call__(
        self,
        h: _cpu.Described,
        modulation: Modulation,
        key_value: tuple[Tensor, Tensor],
        shared: Shared,
        *,
        normed: bool = False,
        following: "PackedBlock | None" = None,
        following_modulation: Modulation | None = None,
    ) -> None:
        """h [B, T, D] through the block, into the workspace's `h`; the workspace fits h's shape.

        normed: whether the workspace's `normed` already holds this block's first norm. following: the block whose
        first norm is to be left there.
        """
        w, packed, call = self.workspace, self.packed, _cpu.call
        _, heads, kv_heads, head_dim, _ = self.widths
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunks
        if not normed:
            call("rms_norm_modulate_fwd", h, self.norm1, scale_msa, w.normed.view, w.rstd.view, self.eps)
        call("packed_linear", w.normed.rows, packed["qkqv"], None, w.projected.rows)
        made = (w.qkq.view, w.means.view, w.rstds.view)
        groups = (heads, kv_heads, heads, 0, 0)
        call("qk_norm_rope_fwd", w.queries_keys, *self.qkq_norms, shared.rope, *made, *groups, head_dim, self.qk_eps)
        scale = head_dim**-0.5 if shared.scale is None else shared.scale
        call("dual_attention_fwd", w.qkq.view, w.v1, *key_value, self.gate, shared.mask, scale, w.attended.view)
        call("packed_linear", w.attended.rows, packed["out"], None, w.out.rows)
        results = (w.middle.view, w.normed.view, w.rstd.view, w.rstd_too.view)
        branch = (h, w.out.view, gate_msa, self.norm2)
        call("gated_residual_modulate_fwd", *branch, self.ffn_norm1, scale_mlp, *results, self.norm2_eps)
        call("packed_linear", w.normed.rows, packed["gate_up"], None, w.activated.rows)
        call("packed_linear", w.activated.rows, packed["down"], None, w.out.rows)
        branch = (w.middle.view, w.out.view, gate_mlp, self.ffn_norm2)
        if following is None or following_modulation is None:
            call("gated_residual_fwd", *branch, w.h.view, w.rstd.view, self.ffn_eps)
        else:
            results = (w.h.view, w.normed.view, w.rstd.view, w.rstd_too.view)
            next_scale = following_modulation.chunks[0]
            call("gated_residual_modulate_fwd", *branch, following.norm1, next_scale, *results, self.ffn_eps)


# ---- all of them -----------------------------------------------------------------------------------------------------


def run_blocks(
    layers: Iterable[Any],
    packed: Sequence[PackedBlock | None],
    h: Tensor,
    y: Tensor,
    context: Tensor,
    grid: fused.Grid,
    conditioning: Tensor,
    keys_values: Sequence[tuple[Tensor, Tensor] | None] | None,
    modulations: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """h [B, T, D] through all blocks, those without packed weights by themselves.

    At least one is packed. modulations: per block [B, 4 D], where it was made before. The result may lie in the
    workspace, which the next call overwrites.
    """
    first = next(block for block in packed if block is not None)
    workspace, made_here = first.workspace, False
    workspace.fit(first.widths, h.shape[0], h.shape[1], h.dtype)
    shared = Shared(
        _cpu.describe(grid.rope),
        None if grid.mask is None else _cpu.describe(grid.mask),
        grid.self_scale(first.widths.head_dim),
    )

    def made_before(i: int) -> Tensor | None:
        return None if modulations is None else modulations[i]

    def modulate(i: int, block: PackedBlock) -> Modulation:
        made = made_before(i)
        return block.modulation(conditioning) if made is None else Modulation.of(made)

    modulation = None
    with recorded("packed_blocks"):
        for i, (layer, block) in enumerate(zip(layers, packed, strict=True)):
            key_value = None if keys_values is None else keys_values[i]
            if block is None:
                own = made_before(i)
                chunks = None if own is None else own.chunk(4, dim=1)
                # a copy: a hook may keep what the layer is given
                h = h.clone() if made_here else h
                h = layer(h, y, context, grid, conditioning, modulation=chunks, key_value=key_value)
                modulation, made_here = None, False
                continue
            following = packed[i + 1] if i + 1 < len(packed) else None
            following_modulation = None if following is None else modulate(i + 1, following)
            block(
                _cpu.describe(h),
                modulate(i, block) if modulation is None else modulation,
                block.context_key_value(context) if key_value is None else key_value,
                shared,
                normed=modulation is not None,
                following=following,
                following_modulation=following_modulation,
            )
            h, modulation, made_here = workspace.h.tensor, following_modulation, True
    return h
