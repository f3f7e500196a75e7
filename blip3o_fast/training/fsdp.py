"""FSDP2: a network that is too large for one GPU, its parameters, gradients and optimizer state spread over the ranks.

`shard` cuts the network by `torch.distributed.fsdp.fully_shard`, block by block, and refuses a rule that matches no
block (the whole network would be one piece, gathered at once). `save` and `load` write and read a sharded checkpoint by
`torch.distributed.checkpoint`; it can be continued with another number of ranks. `consolidate` makes a model folder of
it, without any process group. The same code runs over gloo on CPUs and over NCCL on GPUs.

    checkpoint-N/    sharded/*.distcp, sharded/.metadata     weights, AdamW's moments, the average
                     training.json                           the step and what the caller adds
                     config.json, normalizer.safetensors     of the network
                     complete.json                           written last

Nothing here unpickles freely: shards hold tensors only (read with ``weights_only=True``), and the index, which
torch.distributed.checkpoint pickles, is read with a list of allowed names.
"""

from __future__ import annotations

import enum
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip3o_fast.training import checkpoints

BLOCK = "NextDiTBlock"
SHARDS = "sharded"
STATE_FILE = "training.json"


# ---- cutting ---------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module, block_classes: Iterable[str] = (BLOCK,)) -> list[nn.Module]:
    """The modules that become a piece each; ValueError for a class name that matches none."""
    wanted = list(block_classes)
    found = {name: [m for m in model.modules() if type(m).__name__ == name] for name in wanted}
    missing = [name for name in wanted if not found[name]]
    if missing or not wanted:
        classes = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.children())})
        raise ValueError(
            f"block_classes must name classes of modules in the network, got {missing or wanted!r}, which match "
            f"nothing; without a match the whole network would be gathered at once. It has {', '.join(classes)}"
        )
    return [module for modules in found.values() for module in modules]


def shard(
    model: nn.Module,
    mesh: Any = None,
    *,
    block_classes: Iterable[str] = (BLOCK,),
    reshard_after_forward: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Spread the parameters of ``model`` over the ranks, in place; they become DTensors. Make the optimizer after it.

    mesh: a DeviceMesh; None: all ranks. reshard_after_forward: free a block's gathered weights until the backward (less
    memory, one more gather). compute_dtype: of the gathered weights and activations (bf16, say); the parameters stay
    fp32 and gradients are summed in fp32. None: the parameters' own. Every rank must hold the same weights before.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    pieces = blocks_of(model, block_classes)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in (*pieces, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    return model


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into a sharded network; every rank gives all of them and keeps its part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, strict=True))


# ---- the HuggingFace Trainer -----------------------------------------------------------------------------------------


def trainer_arguments(model: nn.Module, block_classes: Iterable[str] = (BLOCK,)) -> dict[str, Any]:
    """``TrainingArguments(**these)`` shards by the same rule on GPUs; ValueError where nothing matches."""
    names = sorted({type(module).__name__ for module in blocks_of(model, block_classes)})
    config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": names}
    return {"fsdp": True, "fsdp_config": config | {"reshard_after_forward": True}}


def check_trainer(args: Any, ema_decay: float) -> None:
    """Refuse what the Trainer would do without a word: on a CPU its ``fsdp`` is plain DDP."""
    if not args.fsdp:
        return
    if args.device.type == "cpu":
        raise ValueError(
            "fsdp needs GPUs here: on a CPU the Trainer ignores it and runs DDP, every rank with the whole network; "
            "on CPUs use blip3o_fast.training.fsdp.shard in a loop of your own, or leave fsdp out"
        )
    if ema_decay:
        raise ValueError(
            f"ema_decay must be 0 with fsdp, got {ema_decay}: the average would be whole on each rank. With "
            "blip3o_fast.training.fsdp.shard and a loop of your own it can be sharded: make the EMA after `shard`"
        )


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module, optimizer: Any, average: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What a checkpoint holds, each a tensor or a DTensor under the name of its parameter."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        # Numbers of the groups (learning rate, betas) are settings, not state, and would be stored as pickles.
        state["optimizer"] = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    if average is not None:
        state["average"] = dict(average)
    return state


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    average: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a sharded checkpoint; all ranks call it. average: `EMA.average` of the sharded network, or None.

    extra: JSON values that `load` returns again (a scheduler's state, say).
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    folder, main = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.unmark(folder)
    writer, alone = FileSystemWriter(folder / SHARDS), not dist.is_initialized()
    write(_tensors(model, optimizer, average), storage_writer=writer, no_dist=alone)
    if main:
        checkpoints.write_json(folder / STATE_FILE, {"step": step, **(extra or {})})
        checkpoints.write_json(folder / "config.json", model.config.to_dict())  # type: ignore[union-attr, operator]
        if getattr(model, "normalizer", None) is not None:
            model.normalizer.save(folder)  # type: ignore[union-attr, operator]
        checkpoints.mark_complete(folder, step)
    if dist.is_initialized():
        dist.barrier()


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    average: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Read what `save` wrote into a network, an optimizer and an average that are sharded over any number of ranks.

    All ranks call it. Returns training.json: ``{"step": ..., **extra}``. ValueError for a checkpoint that is not whole.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    folder = _whole(folder)
    state = _tensors(model, optimizer, average)
    _read(state, folder)
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        settings = get_optimizer_state_dict(model, optimizer, options=options)
        set_optimizer_state_dict(model, optimizer, settings | state["optimizer"], options=options)
    return json.loads((folder / STATE_FILE).read_text())


def consolidate(folder: str | Path, output: str | Path, *, averaged: bool = False) -> None:
    """A model folder (`BLIP3oDiT.from_pretrained`) of a sharded checkpoint, in one process.

    averaged: of the average instead of the weights. Raises ValueError for a checkpoint that is not whole.
    """
    from blip3o_fast.models.nextdit import BLIP3oDiT
    from blip3o_fast.models.normalizer import FILE_NAME, FeatureNormalizers

    folder = _whole(folder)
    model = BLIP3oDiT(json.loads((folder / "config.json").read_text()))
    weights = dict(model.state_dict())
    _read({"average" if averaged else "model": weights}, folder)
    model.load_state_dict(weights)
    if (folder / FILE_NAME).is_file():
        model.normalizer = FeatureNormalizers.load(folder)
    model.save_pretrained(output)


def _whole(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / checkpoints.MARKER).is_file() or not (folder / SHARDS).is_dir():
        raise ValueError(
            f"{folder} is not a whole sharded checkpoint: it has no {checkpoints.MARKER} beside {SHARDS}/ (writing it "
            "was interrupted, or it is none of this program)"
        )
    return folder


def _read(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of ``state``, each rank its part."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import load as read

    with (folder / SHARDS / ".metadata").open("rb") as file:
        index = _Index(file).load()

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index.storage_meta = StorageMeta(load_id=self.load_id)
            return index

    read(state, storage_reader=Reader(folder / SHARDS), no_dist=not dist.is_initialized())


class _Index(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, and no other pickle."""

    _NAMES = {
        "pathlib": {"PosixPath", "WindowsPath"},
        "torch": {"Size", "device"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"{SHARDS}/.metadata refers to {module}.{name}, which no sharded checkpoint needs: not read")


def _member(owner: Any, name: str) -> enum.Enum:
    """A member of an enum: Python 3.11.2 pickles it as `getattr` of its class, and only this much of it is there."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise ValueError(
            f"{SHARDS}/.metadata asks for {name!r} of {owner!r}, which no sharded checkpoint needs: not read"
        )
    return owner.__members__[name]
