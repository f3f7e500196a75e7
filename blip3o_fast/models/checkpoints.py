"""Reading and writing checkpoints: ours, diffusers' and BLIP3-o's, strictly.

A folder has config.json, the weights as safetensors (one file or shards with an index) and, where the features were
normalised, normalizer.safetensors. A stock network (context_projection=False) is written under diffusers' names, so
diffusers' `from_pretrained` loads it. Files are written beside and renamed: a reader never sees half a file.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_fast.files import replacing
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import lay_out
from blip3o_fast.models.matching import compare_names, report, strip_prefix
from blip3o_fast.models.memory import parse_dtype
from blip3o_fast.models.reading import (
    CONFIG,
    INDEX,
    NORMALIZER,
    OUR_WEIGHTS,
    PICKLED,
    STOCK_WEIGHTS,
    WEIGHTS,
    find,
    folder_of,
    read_json,
    read_weights,
)
from blip3o_fast.models.recognise import named_by, recognise, refuse_other_class

# ---- writing -------------------------------------------------------------------------------------------------------


def save(model: Any, folder: Path) -> None:
    """Write config.json, the weights and, if the model has one, the normalizer into the folder."""
    from safetensors.torch import save_file

    stock = not model.config.context_projection
    name = STOCK_WEIGHTS if stock else OUR_WEIGHTS
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    elsewhere = [key for key, value in state.items() if type(value) is not Tensor or value.is_meta]
    if elsewhere:
        raise ValueError(
            f"{len(elsewhere)} weights are sharded, offloaded or never filled (the first is {elsewhere[0]}): gather "
            "them before saving, for example with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) and load_state_dict into a model of the same config"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as beside:
        save_file(state, str(beside), metadata={"format": "pt"})
    # Any other weights in the folder are those of an earlier save; a reader could take them for these.
    for stale in (*WEIGHTS, *(f"{n}{INDEX}" for n in (*WEIGHTS, *PICKLED)), *PICKLED):
        if stale != name:
            (folder / stale).unlink(missing_ok=True)
    if model.normalizer is None:
        (folder / NORMALIZER).unlink(missing_ok=True)
    else:
        model.normalizer.save(folder)
    values = model.config.to_stock_dict() if stock else model.config.to_dict()
    with replacing(folder / CONFIG) as beside:
        beside.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- loading -------------------------------------------------------------------------------------------------------


def as_config(config: Any) -> BLIP3oConfig:
    if isinstance(config, str):
        return BLIP3oConfig.preset(config)
    if isinstance(config, Mapping):
        return BLIP3oConfig.from_dict(config)
    if not isinstance(config, BLIP3oConfig):
        raise ValueError(f"config must be a BLIP3oConfig, a dict or a preset's name, got {type(config).__name__}")
    return config


def load(
    cls: Any,
    name_or_path: str | Path,
    *,
    config: Any,
    torch_dtype: torch.dtype | str | None,
    device: torch.device | str,
    strict: bool,
    subfolder: str | None,
    **hub: Any,
) -> Any:
    """See `BLIP3oDiT.from_pretrained`."""
    parse_dtype(torch_dtype, torch.float32)
    path = find(name_or_path, subfolder, **hub)
    where = f"the checkpoint in {path}"
    file = folder_of(path) / CONFIG
    if config is None and file.is_file():
        values = read_json(file)
        refuse_other_class(values, file)
        where += named_by(values)
    given = strip_prefix(read_weights(path), where)
    settings = recognise(path, given) if config is None else as_config(config)
    with torch.device("meta"):
        model = cls(settings)
    differences = compare_names(model.state_dict(), given)
    missing, unexpected, misshaped = differences
    if misshaped or (strict and (missing or unexpected)):
        raise ValueError(f"{where} does not fit the model:\n{report(*differences)}")
    found = common_dtype({name: tensor for name, tensor in given.items() if name not in unexpected}, where, torch_dtype)
    dtype = parse_dtype(torch_dtype, found)
    if missing or unexpected:
        warnings.warn(f"{where} does not fit the model:\n{report(*differences)}", stacklevel=3)
        if missing:
            with torch.device(device):
                model = cls(settings)
    with torch.no_grad():
        fill(model, given, dtype, torch.device(device))
    if (folder_of(path) / NORMALIZER).is_file():
        from blip3o_fast.models.normalizer import FeatureNormalizers

        model.normalizer = FeatureNormalizers.load(folder_of(path))
    model.loaded_from = folder_of(path)
    return model.eval()


def common_dtype(given: Mapping[str, Tensor], where: str, wanted: torch.dtype | str | None) -> torch.dtype:
    """The dtype of the weights; of several the one that holds them all exactly, with a warning where none is wanted.

    ValueError for a tensor that is no floating point number of 16 bits or more.
    """
    counts: dict[torch.dtype, int] = {}
    for name, tensor in given.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{where}: {name} must be floating point of 16 bits or more, it has {tensor.dtype}")
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    common = torch.float32 if not counts else next(iter(counts))
    for dtype in counts:
        common = torch.promote_types(common, dtype)
    if len(counts) > 1 and wanted in (None, "auto"):
        found = ", ".join(f"{count} tensors in {str(dtype)[6:]}" for dtype, count in counts.items())
        warnings.warn(f"{where} has {found}: without torch_dtype all become {str(common)[6:]}", stacklevel=4)
    return common


def fill(model: Any, given: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Give each parameter its value from the file, on the device, in dtype."""
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        module: nn.Module = model.get_submodule(owner)
        if name in given:
            # A copy always: the file's tensors are a window on the file, which may be overwritten.
            value = torch.empty(given[name].shape, dtype=dtype, device=device).copy_(given[name])
        elif parameter.is_meta:  # only pad_token may be absent
            value = torch.zeros(parameter.shape, dtype=dtype, device=device)
        else:
            value = parameter.to(device, dtype)
        module.register_parameter(attribute, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for block in model.layers:
        lay_out(block)
