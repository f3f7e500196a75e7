"""The matrix products of a block with packed weights, on a CPU: `forward.Projections` over `ops.packed_linear`."""

from typing import Any

from torch import Tensor

from blip3o_fast.models import forward as fused
from blip3o_fast.models.layout import projection_groups
from blip3o_fast.ops import _cpu, packed_linear
from blip3o_fast.ops.packed_linear import PackedWeights


class Workspace:
    """Buffers for what the products return, by shape: the blocks run one after the other and share them."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def like(self, name: str, x: Tensor, columns: int) -> Tensor:
        """A buffer [..., columns] for what is made of x [..., K]; what it held before is gone."""
        key = (name, x.shape[:-1], columns, x.dtype)
        if key not in self.buffers:
            # one shape at a time: another batch size replaces what the last one left
            self.buffers = {k: v for k, v in self.buffers.items() if k[0] != name}
            self.buffers[key] = x.new_empty((*x.shape[:-1], columns))
        return self.buffers[key]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())


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
    """Whether a block's weights may be packed: on a CPU, no adapter, hook or replaced layer among them."""
    layers = _layers(block)
    return (
        all(_readable(layer) for group in layers.values() for layer in group)
        and fused.fusable(block)
        and all(layer.bias is None for name, group in layers.items() if name != "modulation" for layer in group)
    )


class PackedProjections:
    """`forward.Projections` of a block (see there) with its weights packed.

    storage: of `PackedWeights`, for the large products; the modulation keeps at least bfloat16.
    """

    def __init__(self, block: Any, storage: str, workspace: Workspace) -> None:
        self.block, self.storage, self.workspace = block, storage, workspace
        self._pack()

    def _pack(self) -> None:
        self.products = {
            name: PackedWeights(
                [layer.weight for layer in group],
                group[0].bias,
                storage="fp32" if (name, self.storage) == ("modulation", "int8") else self.storage,
                swiglu=name == "gate_up",
            )
            for name, group in _layers(self.block).items()
        }

    def renew(self) -> bool:
        """Pack again what has changed. False where the block can no longer be read: it then runs by itself."""
        if not packable(self.block):
            return False
        for name, group in _layers(self.block).items():
            product = self.products[name]
            weights = [layer.weight for layer in group]
            if (
                any(a is not b for a, b in zip(weights, product.weights, strict=True))
                or product.bias is not group[0].bias
            ):
                self._pack()
                return True
            if product.stale:
                product.pack()
        return True

    @property
    def nbytes(self) -> int:
        return sum(product.nbytes for product in self.products.values())

    def _run(self, name: str, x: Tensor) -> Tensor:
        product = self.products[name]
        return packed_linear(x, product, out=self.workspace.like(name, x, product.columns))

    def modulation(self, conditioning: Tensor) -> Tensor:
        # not into the workspace: a block's modulation is read while the next one's is made
        return packed_linear(conditioning, self.products["modulation"])

    def queries_keys_value(self, normed: Tensor) -> Tensor:
        return self._run("qkqv", normed)

    def context_key_value(self, normed: Tensor) -> Tensor:
        return packed_linear(normed, self.products["key_value"])  # v2 is a view of it, kept by a prepared condition

    def attention_output(self, attended: Tensor) -> Tensor:
        return self._run("out", attended)

    def feed_forward(self, u: Tensor) -> Tensor:
        return self._run("down", self._run("gate_up", u))
