"""Reading and writing checkpoints: ours, diffusers' and BLIP3-o's, strictly.

A folder has config.json, the weights as safetensors (one file or shards with an index) and, where the features were
normalised, normalizer.safetensors. A stock network (context_projection=False) is written under diffusers' names, so
diffusers' `from_pretrained` loads it. Files are written beside and renamed: a reader never sees half a file.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.layout import lay_out
from blip3o_fast.models.memory import parse_dtype

CONFIG = "config.json"
OUR_WEIGHTS = "model.safetensors"
STOCK_WEIGHTS = "diffusion_pytorch_model.safetensors"
NORMALIZER = "normalizer.safetensors"
_WEIGHTS = (OUR_WEIGHTS, STOCK_WEIGHTS)
_PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")

# Every network that can be loaded has this name; what stands before it is the checkpoint's prefix.
_ANCHOR = "patch_embedder.proj.weight"
PREFIXES = ("", "model.", "model.dit.model.", "dit_model.", "module.", "_orig_mod.")
# Names of a network that has been called BLIP3-o's DiT and is another one.
_OTHER_NETWORK = ("token_embedder.pos_embed", "eva_proj.weight", "eva_proj.bias")
# Never read by the network; stock's files have it, others may not.
_UNUSED = "pad_token"


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
    beside = folder / f".{name}.{os.getpid()}"
    try:
        save_file(state, str(beside), metadata={"format": "pt"})
        os.replace(beside, folder / name)
    finally:
        beside.unlink(missing_ok=True)
    # Any other weights in the folder are those of an earlier save; a reader could take them for these.
    for stale in (*_WEIGHTS, *(f"{n}.index.json" for n in _WEIGHTS), *_PICKLED):
        if stale != name:
            (folder / stale).unlink(missing_ok=True)
    if model.normalizer is None:
        (folder / NORMALIZER).unlink(missing_ok=True)
    else:
        model.normalizer.save(folder)
    values = model.config.to_stock_dict() if stock else model.config.to_dict()
    _write_text(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---- finding -------------------------------------------------------------------------------------------------------


def find_folder(name_or_path: str | Path, subfolder: str | None, **hub: Any) -> Path:
    """The local folder of a checkpoint: the path itself where it exists, else a hub repository's snapshot."""
    path = Path(name_or_path)
    if not path.is_dir():
        no_repository = str(name_or_path).startswith((".", "~", "/")) or str(name_or_path).count("/") != 1
        if path.exists() or no_repository:
            raise FileNotFoundError(f"{name_or_path} is not a folder with a checkpoint")
        path = _download(str(name_or_path), subfolder, **hub)
    return path / subfolder if subfolder else path


def _download(repo_id: str, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    at = f"{subfolder}/" if subfolder else ""
    folder = Path(snapshot_download(repo_id, allow_patterns=[f"{at}*.json", f"{at}*.safetensors"], **hub))
    if not any((folder / at).glob("*.safetensors")):
        folder = Path(snapshot_download(repo_id, allow_patterns=[f"{at}*.json", f"{at}*.bin"], **hub))
    return folder


def read_config(folder: Path) -> BLIP3oConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give config=, a BLIP3oConfig, a dict or a preset's name")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object with config fields, got {type(values).__name__}")
    try:
        return BLIP3oConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by name. Safetensors are mapped into memory, not read, until a tensor is used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files: list[Path] = []
    for name in _WEIGHTS:
        if (folder / name).is_file():
            files = [folder / name]
            break
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / shard for shard in _shards(index)]
            break
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(str(file)))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    if files:
        return tensors
    for name in _PICKLED:
        if (folder / name).is_file():
            loaded = torch.load(folder / name, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict):
                raise ValueError(f"{folder / name} must hold a dict of tensors, got {type(loaded).__name__}")
            return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    looked_for = ", ".join((*_WEIGHTS, *_PICKLED))
    raise FileNotFoundError(f"{folder} has no weights: looked for {looked_for}, or safetensors shards with an index")


def _shards(index: Path) -> list[str]:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        # An index is input like any other: it may not point out of its folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file of its folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name!r}, which is not in the folder")
    return names


# ---- matching ------------------------------------------------------------------------------------------------------


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors by our names. Where the checkpoint holds more than the network, only the network's.

    Raises ValueError for a checkpoint of another network, and where there is no telling which tensors are meant.
    """
    other = sorted(name for name in tensors if name.endswith(_OTHER_NETWORK))
    if other:
        raise ValueError(
            f"this checkpoint is of another network (it has {', '.join(other[:3])}): a DiT whose self-attention mixes "
            "channels instead of tokens because of a wrong view of its tensors. Its weights have no meaning in a "
            "BLIP3-o or Lumina network and cannot be converted; train anew."
        )
    found = {name[: -len(_ANCHOR)] for name in tensors if name.endswith(_ANCHOR)}
    if len(found) > 1:
        raise ValueError(f"the checkpoint holds more than one network, under the prefixes {sorted(found)}")
    prefix = found.pop() if found else ""
    if prefix not in PREFIXES and not any(prefix == a + b for a in PREFIXES for b in PREFIXES):
        raise ValueError(f"unknown prefix {prefix!r} before {_ANCHOR}; known are {', '.join(map(repr, PREFIXES))}")
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def compare_names(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, mis-shaped), the last with both shapes."""
    missing = [name for name in expected if name not in given and name != _UNUSED]
    unexpected = [name for name in given if name not in expected and name != _UNUSED]
    misshaped = [
        f"{name}: {tuple(given[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return missing, unexpected, misshaped


def report(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    """All names, grouped, with what the usual causes look like."""
    lines = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
        if names:
            lines += [f"{title} ({len(names)}):", *(f"  {name}" for name in names)]
    if any(name.startswith("caption_projection") for name in missing):
        lines.append("The checkpoint has no context projection: a stock network has context_projection=False.")
    if any(name.startswith("caption_projection") for name in unexpected):
        lines.append("The checkpoint has a context projection: BLIP3-o's network has context_projection=True.")
    if any("feed_forward" in name for name in misshaped):
        lines.append(
            "If only the feed-forward width differs: ffn_dim_multiplier (1.5 gives 7168 at width 1792, which some "
            "BLIP3-o builds have) or multiple_of."
        )
    return "\n".join(lines)


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
    folder = find_folder(name_or_path, subfolder, **hub)
    given = strip_prefix(read_weights(folder))
    settings = read_config(folder) if config is None else as_config(config)
    with torch.device("meta"):
        model = cls(settings)
    differences = compare_names(model.state_dict(), given)
    missing, unexpected, misshaped = differences
    if misshaped or (strict and (missing or unexpected)):
        raise ValueError(f"the checkpoint in {folder} does not fit the model:\n{report(*differences)}")
    if missing or unexpected:
        warnings.warn(f"the checkpoint in {folder} does not fit the model:\n{report(*differences)}", stacklevel=3)
        if missing:
            with torch.device(device):
                model = cls(settings)
    with torch.no_grad():
        fill(model, given, torch_dtype, torch.device(device))
    if (folder / NORMALIZER).is_file():
        from blip3o_fast.models.normalizer import FeatureNormalizers

        model.normalizer = FeatureNormalizers.load(folder)
    return model.eval()


def fill(model: Any, given: Mapping[str, Tensor], torch_dtype: torch.dtype | str | None, device: torch.device) -> None:
    """Give each parameter its value from the file, on the device, in torch_dtype or else in the file's dtype."""
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        module: nn.Module = model.get_submodule(owner)
        if name in given:
            tensor = given[name]
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must be floating point, the checkpoint has {tensor.dtype}")
            dtype = parse_dtype(torch_dtype, tensor.dtype)
            # A copy always: the file's tensors are a window on the file, which may be overwritten.
            value = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        elif parameter.is_meta:  # only pad_token may be absent
            value = torch.zeros(parameter.shape, dtype=parse_dtype(torch_dtype, model.dtype), device=device)
        else:
            value = parameter.to(device, parse_dtype(torch_dtype, parameter.dtype))
        module.register_parameter(attribute, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for block in model.layers:
        lay_out(block)
