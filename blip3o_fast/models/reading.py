"""The files of a checkpoint: finding them, and reading them as tensors by name.

A checkpoint is a folder or one file. Weights are safetensors or `.bin`, whole or in shards with an index. No pickle is
executed: a `.bin` is read with `weights_only=True`.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = "config.json"
OUR_WEIGHTS = "model.safetensors"
STOCK_WEIGHTS = "diffusion_pytorch_model.safetensors"
NORMALIZER = "normalizer.safetensors"
# What training writes beside a checkpoint's weights: those that the finished run would have.
AVERAGED_WEIGHTS = "ema.safetensors"
WEIGHTS = (OUR_WEIGHTS, STOCK_WEIGHTS)
PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
INDEX = ".index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_SUFFIXES = (".safetensors", *_PICKLE_SUFFIXES)


def find(name_or_path: str | Path, subfolder: str | None, **hub: Any) -> Path:
    """The local folder or file of a checkpoint: the path itself where it exists, else a hub repository's snapshot."""
    path = Path(name_or_path)
    if path.is_file():
        if subfolder:
            raise ValueError(f"subfolder must be None for a file, got {subfolder!r} with {path}")
        if not path.name.endswith((*_SUFFIXES, INDEX)):
            raise ValueError(
                f"{path} is no checkpoint: a file of weights ends in {', '.join(_SUFFIXES)}, or in {INDEX} for shards"
            )
        return path
    if not path.is_dir():
        no_repository = str(name_or_path).startswith((".", "~", "/")) or str(name_or_path).count("/") != 1
        if no_repository or path.name.endswith(_SUFFIXES):
            raise FileNotFoundError(f"{name_or_path} is not a folder with a checkpoint, nor a file of weights")
        path = _download(str(name_or_path), subfolder, **hub)
    return path / subfolder if subfolder else path


def folder_of(path: Path) -> Path:
    """Where config.json and normalizer.safetensors are looked for."""
    return path.parent if path.is_file() else path


def _download(repo_id: str, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    at = f"{subfolder}/" if subfolder else ""
    folder = Path(snapshot_download(repo_id, allow_patterns=[f"{at}*.json", f"{at}*.safetensors"], **hub))
    if not any((folder / at).glob("*.safetensors")):
        folder = Path(snapshot_download(repo_id, allow_patterns=[f"{at}*.json", f"{at}*.bin"], **hub))
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file where it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of the folder or file by name; they are mapped into memory, not read, until they are used."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors.update(read_file(file))
    return tensors


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: the file itself, or the folder's by the names of the known programs.

    Raises FileNotFoundError where there are none, or where an index names a shard that is not there.
    """
    if path.is_file():
        return shards(path) if path.name.endswith(INDEX) else [path]
    for name in (*WEIGHTS, *PICKLED):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}{INDEX}").is_file():
            return shards(path / f"{name}{INDEX}")
    raise FileNotFoundError(f"{path} has no weights: {_what_is_there(path)}")


def _what_is_there(folder: Path) -> str:
    looked_for = f"looked for {', '.join((*WEIGHTS, *PICKLED))}, or shards of one with an index"
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / "model_index.json").is_file():
        return f"{looked_for}; it is a pipeline of diffusers, whose network is in subfolder='transformer'"
    whole = [step for step in folder.glob("checkpoint-*") if (step / CONFIG).is_file()]
    if whole:
        last = max(whole, key=lambda step: (len(step.name), step.name))
        return f"{looked_for}; the run is not finished, its last checkpoint is {last}"
    others = sorted(file.name for file in folder.iterdir() if file.name.endswith(_SUFFIXES))
    others = [name for name in others if name != NORMALIZER]
    return f"{looked_for}; if {others[0]} is meant, give the file itself" if others else looked_for


def shards(index: Path) -> list[Path]:
    """The files that an index names, each once; they must lie beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} must hold weight_map, an object from tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        # An index is input like any other: it may not point out of its folder.
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index} names {name!r}, which is no file of weights of its folder")
    gone = [name for name in names if not (index.parent / name).is_file()]
    if gone:
        raise FileNotFoundError(f"{index} names {', '.join(map(repr, gone))}, which is not in the folder")
    return [index.parent / name for name in names]


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; ValueError naming it where it is cut off, broken or more than weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.name.endswith(_PICKLE_SUFFIXES):
        return _read_pickle(file)
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # Only torch's own archives can be mapped; files of before torch 1.6 are read.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        code = _code_in(file)
        if code:
            raise ValueError(
                f"{file} is more than weights: reading it would run {', '.join(code)}\n"
                "hint: let the program that wrote it save its state_dict as safetensors"
            ) from error
        raise ValueError(f"{file} is not a complete file of torch.save ({type(error).__name__})") from error
    # A training program's file: the weights under one of the usual names, beside its optimizer.
    for name in ("state_dict", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} must hold a dict of tensors, got {type(loaded).__name__}")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def _code_in(file: Path) -> list[str]:
    """What a pickle would import beside tensors; found by looking at its operations, without running them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # a file that is broken in one of the many ways that a pickle can be
        return []
