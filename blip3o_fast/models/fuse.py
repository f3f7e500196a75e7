"""The drop-in: a model of diffusers or BLIP3-o made fast in place, and set back.

`fuse` changes the class of each network it finds to a subclass with the same `__name__` and `__module__`, so a
pipeline still saves a folder that loads where this package is not installed. Parameters stay the same objects; those
that one GEMM reads are laid side by side (`layout.py`), so nothing is held twice and an optimizer made before goes on.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from blip3o_fast.models import stock
from blip3o_fast.models.layout import lay_out, tied

SUPPORTED = (
    "diffusers' LuminaNextDiT2DModel, a pipeline that has one as its transformer, BLIP3-o's NextDiTCrossAttn, or a "
    "module that holds any of them"
)
_PARTS = ("patch_embedder", "time_caption_embed", "layers", "norm_out")
_RELATIVES = ("Lumina2Transformer2DModel", "SanaTransformer2DModel")
_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_mask", "image_rotary_emb")
_CLASSES: dict[type, type] = {}

T = TypeVar("T")
log = logging.getLogger(__name__)


class FusedNetwork(nn.Module):
    """What the subclass of a stock network has of its own; stock's class stands behind it in the order of methods."""

    _stock_class: type
    _output_class: Any
    # diffusers' protocol, which its own class refuses: every block's input is kept and the block runs again.
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor | None,
        image_rotary_emb: Tensor,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own: [B, C, H, W] -> `Transformer2DModelOutput` or a tuple of its one tensor."""
        sample = stock.predict(
            self,
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_mask,
            image_rotary_emb,
            cross_attention_kwargs,
        )
        return self._output_class(sample=sample) if return_dict else (sample,)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As stock's where its class names the repeated blocks. A block that is compiled runs its own forward."""
        if not getattr(self, "_repeated_blocks", None):
            raise ValueError(
                f"compile_repeated_blocks: {type(self).__name__} names no repeated blocks, and fused they are read, "
                "not called; compile the whole network instead (model.compile() or torch.compile(model))"
            )
        super().compile_repeated_blocks(*args, **kwargs)  # type: ignore[misc]

    # What makes a network or replaces the storage of parameters ends with the weights side by side.

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return _laid_out(super().from_pretrained(*args, **kwargs))  # type: ignore[misc]

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return _laid_out(super().from_config(*args, **kwargs))  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        _lay_out(self)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        _lay_out(self)
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # deepcopy and pickle come through here
        _lay_out(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name the class would be found to be stock's.
        return _rebuild, (self._stock_class,), self.__getstate__()


def _lay_out(network: Any) -> None:
    keep = tied(network)
    for layer in network.layers:
        lay_out(layer, keep)


def _laid_out(made: Any) -> Any:
    """made: a network, or a tuple that begins with one (output_loading_info, return_unused_kwargs)."""
    _lay_out(made[0] if isinstance(made, tuple) else made)
    return made


def _rebuild(stock_class: type) -> Any:
    cls: Any = fused_class(stock_class)
    return cls.__new__(cls)


def named_base(cls: type) -> type | None:
    """The class of stock's name that this class is or comes from."""
    return next((c for c in cls.__mro__ if c.__name__ == stock.NETWORK and not issubclass(c, FusedNetwork)), None)


def fused_class(stock_class: type) -> type:
    """The fused subclass of a stock network's class, always the same one."""
    if stock_class not in _CLASSES:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        namespace = {
            "__module__": stock_class.__module__,
            "__qualname__": stock_class.__qualname__,
            "__doc__": stock_class.__doc__,
            "_stock_class": stock_class,
            "_output_class": Transformer2DModelOutput,
        }
        _CLASSES[stock_class] = type(stock_class.__name__, (FusedNetwork, stock_class), namespace)
    return _CLASSES[stock_class]


# ---- finding ---------------------------------------------------------------------------------------------------------


def is_network(module: Any) -> bool:
    return named_base(type(module)) is not None and all(part in module._modules for part in _PARTS)


def networks(x: Any) -> dict[str, Any]:
    """The networks in x by their names, fused ones too. ValueError where there is none, with what was looked for."""
    root = x if isinstance(x, nn.Module) else getattr(x, "transformer", None)
    if not isinstance(root, nn.Module):
        raise ValueError(f"x must be {SUPPORTED}; got {type(x).__name__}, which is no module and has no transformer")
    found = {name: module for name, module in root.named_modules() if is_network(module)}
    if found:
        return found
    kinds = {type(module).__name__ for module in root.modules()}
    here = type(root).__name__
    for relative in _RELATIVES:
        if relative in kinds:
            raise ValueError(f"{relative} is another network and is not supported; supported are {SUPPORTED}")
    if "BLIP3oDiT" in kinds:
        raise ValueError(f"a BLIP3oDiT runs on the fused ops already; fuse is for {SUPPORTED}")
    raise ValueError(
        f"nothing to fuse in {here}: looked in all its modules for a {stock.NETWORK} (with {', '.join(_PARTS)}); "
        f"supported are {SUPPORTED}"
    )


def refusal(network: Any) -> str | None:
    """Why a network's forward must not be replaced now, and what to do about it."""
    cls: Any = type(network)
    base: Any = named_base(cls)
    if any(c.__name__ == "FSDPModule" for c in cls.__mro__):
        return "is sharded (fully_shard): fuse it first, then shard it"
    if hasattr(network, "parametrizations"):
        return "is parametrized (torch.nn.utils.parametrize): fuse it first"
    if _own_forward(network):
        return f"has a forward of its own ({_hooks(network)}): remove it, fuse, and add it again"
    if cls.forward is not base.forward and cls.forward is not FusedNetwork.forward:
        return f"is a {cls.__name__} whose forward is not that of {stock.NETWORK}"
    if not stock.written_with(base, base.forward):
        return f"has a forward that was put into the class {base.__name__} from outside: undo that first"
    if not set(_ARGUMENTS) <= set(inspect.signature(cls.forward).parameters):
        return f"has a forward that does not take {', '.join(_ARGUMENTS)}"
    return None


def _own_forward(network: Any) -> bool:
    """Whether the network itself, not its class, has a forward. The class's own, bound, is what removed hooks leave."""
    forward = network.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(network).forward


def _hooks(network: Any) -> str:
    """Who replaced a network's forward, and how it is undone."""
    if hasattr(network, "_hf_hook"):
        how = "pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_submodules"
        return f"accelerate's {type(network._hf_hook).__name__}: offloading or a device map, undone by {how}"
    if getattr(network, "_diffusers_hook", None) is not None and network._diffusers_hook.hooks:
        names = ", ".join(network._diffusers_hook.hooks)
        return f"diffusers' {names}: undone by network._diffusers_hook.remove_hook where it can be"
    return "a replaced method"


def _refuse(name: str, network: Any) -> None:
    reason = refusal(network)
    if reason is not None:
        raise ValueError(f"{name or type(network).__name__} {reason}")


def obstacles(x: Any) -> dict[str, str]:
    """The blocks of the fused networks in x that run their own stock forward, by name, each with the reason."""
    return {
        f"{name}.layers.{i}".lstrip("."): reason
        for name, network in networks(x).items()
        if isinstance(network, FusedNetwork)
        for i, layer in enumerate(network.layers)  # type: ignore[arg-type]
        if (reason := stock.obstacle(layer)) is not None
    }


# ---- in place --------------------------------------------------------------------------------------------------------


def fuse(x: T) -> T:
    """Make every network in x run on the fused ops, in place, and return x.

    x: diffusers' `LuminaNextDiT2DModel`, a pipeline with one as its transformer, BLIP3-o's `NextDiTCrossAttn`, or any
        module that holds some. What is fused already stays so.

    Signature, outputs, config, state dict, parameters (the very objects) and saved folders are stock's. A block that
    cannot be read (another attention processor, a hook on its norms, sharded) runs its own forward: see
    `models.fuse.obstacles`; how many networks and blocks were fused is logged (INFO, logger "blip3o_fast.models.fuse").
    A model that was compiled stays so: its next call compiles the fused forward. Tied weights stay tied.
    Beyond stock: cross_attention_kwargs=None, `enable_gradient_checkpointing()`, and a context mask that is all false.
    Raises ValueError where x holds no such network, with what was looked for, and where a network cannot be fused as it
    is (sharded, parametrized, offloaded or hooked as a whole, a changed forward), before anything is changed.
    """
    here = networks(x)
    found = {name: module for name, module in here.items() if not isinstance(module, FusedNetwork)}
    for name, network in found.items():
        _refuse(name, network)
    for network in here.values():
        stock.learn(named_base(type(network)))  # again each time, since classes may have been patched or mended
    for network in found.values():
        network.__dict__.pop("forward", None)
        network.__class__ = fused_class(type(network))
        _lay_out(network)
    blocks = sum(len(network.layers) for network in found.values())
    log.info("fused %d networks of %d blocks in %s", len(found), blocks, type(x).__name__)
    for name, reason in obstacles(x).items():
        log.info("%s runs its own forward: %s", name, reason)
    return x


def unfuse(x: T) -> T:
    """Give every fused network in x its own class back, in place, and return x.

    Raises ValueError where x holds no network, and where hooks or sharding were put around the fused forward since.
    """
    found = {name: module for name, module in networks(x).items() if isinstance(module, FusedNetwork)}
    for name, network in found.items():
        shown = name or type(network).__name__
        if type(network) is not fused_class(network._stock_class) or _own_forward(network):
            raise ValueError(f"{shown} was sharded, parametrized or hooked after it was fused: undo that first")
        supported = getattr(network._stock_class, "_supports_gradient_checkpointing", False)
        if network.gradient_checkpointing and not supported:
            raise ValueError(
                f"{shown} checkpoints its blocks, which stock cannot: disable_gradient_checkpointing() first"
            )
    for network in found.values():
        if not getattr(network._stock_class, "_supports_gradient_checkpointing", False):
            network.__dict__.pop("gradient_checkpointing", None)  # diffusers' switch left it
        network.__dict__.pop("forward", None)
        network.__class__ = network._stock_class
    return x
