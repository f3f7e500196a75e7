"""Writing a checkpoint as another program reads it: a folder of diffusers, or a whole BLIP3-o checkpoint.

Everything is built in a folder beside the output and renamed when it is whole.
"""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.models.matching import BLIP3O_PREFIX, UNUSED, compare_names, report
from blip3o_fast.models.memory import parse_dtype
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.reading import AVERAGED_WEIGHTS, CONFIG, INDEX, OUR_WEIGHTS, read_file, read_json, shards

TARGETS = ("diffusers", "blip3o")
# What BLIP3-o's program fixes in its code: a network that was trained otherwise would be run wrongly.
_BLIP3O_FIXED = {
    "sample_size": 8,
    "patch_size": 1,
    "norm_eps": 1e-5,
    "time_convention": "blip3o",
    "prediction_type": "v_prediction",
    "schedule": "linear",
}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    output: the folder. tensors, bytes: of the network. dtype: its weights', all kinds joined where there are several.
    averaged: whether a training checkpoint's averaged weights were taken.
    """

    to: str
    output: Path
    tensors: int
    bytes: int
    dtype: str
    averaged: bool

    def __str__(self) -> str:
        weights = "averaged weights" if self.averaged else "weights"
        return f"{self.tensors} tensors, {self.bytes:,} bytes, {self.dtype}, {weights}, for {self.to}: {self.output}"


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    raw_weights: bool = False,
    hard_links: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the network of a checkpoint as another program reads it.

    checkpoint: whatever `BLIP3oDiT.from_pretrained` reads.
    output: the folder to write; one that exists is refused without overwrite, which replaces it as a whole.
    to: "diffusers": a folder for `LuminaNextDiT2DModel.from_pretrained` (context_projection=False only);
        "blip3o": a copy of `base`, a whole BLIP3-o checkpoint, with the network's tensors replaced.
    dtype: of the network's weights; None: as the checkpoint has them, or for "blip3o" as the base has them.
    raw_weights: of a training checkpoint the weights themselves, not their average.
    hard_links: for "blip3o": shards without a tensor of the network share the base's disk space. A program that later
        writes into one of the two files changes the other.

    Raises ValueError or FileNotFoundError saying what does not fit, all of it, before anything is written. The
    normalisation of the features has no place in either format: a warning says that normalizer.safetensors lies beside.
    """
    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    if (base is None) == (to == "blip3o"):
        wanted = "needs --base, the folder of a whole BLIP3-o checkpoint" if base is None else "takes no --base"
        raise ValueError(f"--to {to} {wanted}")
    if dtype is not None:
        dtype = _checked_dtype(dtype)
    output = Path(output)
    if base is not None:
        base = Path(base)
        if output.resolve() == base.resolve() or base.resolve() in output.resolve().parents:
            raise ValueError(f"--output {output} must lie outside --base {base}, which stays as it is")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; give another name, or --overwrite to replace it")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give the name of a folder")
    if output.exists():
        _refuse_to_lose(output, Path(checkpoint))

    average = Path(checkpoint) / AVERAGED_WEIGHTS
    averaged = average.is_file() and not raw_weights
    model = BLIP3oDiT.from_pretrained(average if averaged else checkpoint)
    _refuse_what_has_no_form(model, to)
    if base is not None:
        placed = _place(model, base)
    if model.normalizer is not None:
        warnings.warn(
            f"{to} has no place for the normalisation of the features: normalizer.safetensors lies beside, and whoever "
            "samples must apply it to the condition and undo it on the result",
            stacklevel=2,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if base is None:
            _write_diffusers(model, beside, dtype)
            written: dict[str, Tensor] = dict(model.state_dict())
        else:
            written = _write_blip3o(model, beside, base, placed, dtype, hard_links)
        _replace_folder(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in written.values()})
    size = sum(tensor.nbytes for tensor in written.values())
    return Exported(to, output, len(written), size, "+".join(kinds), averaged)


def _refuse_to_lose(output: Path, checkpoint: Path) -> None:
    """The output is replaced as a whole, so it may hold neither what is read nor what no export wrote."""
    source = checkpoint.resolve()
    if checkpoint.exists() and output.resolve() in (source, *source.parents):
        raise ValueError(f"--output {output} holds the checkpoint {checkpoint} itself; give another name")
    if any(output.iterdir()) and not (output / CONFIG).is_file():
        raise ValueError(
            f"--output {output} holds files, and no {CONFIG}: it is no exported folder, so --overwrite leaves it alone"
        )


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    try:
        return parse_dtype(dtype, torch.float32)
    except ValueError:
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}") from None


def _refuse_what_has_no_form(model: BLIP3oDiT, to: str) -> None:
    if to == "diffusers":
        if model.config.context_projection:
            raise ValueError(
                "this network has a context projection (two linear layers with a GELU between), which diffusers' "
                "LuminaNextDiT2DModel has not, and which its linear layers cannot take up because of the GELU\n"
                "hint: --to blip3o writes it whole; a network with context_projection=False can be exported to "
                "diffusers"
            )
        if model.config.time_convention != "lumina":
            warnings.warn(
                "the network was trained on 1000 * sigma and predicts noise - data; diffusers' Lumina pipelines feed "
                "1 - sigma and expect data - noise. LuminaNextDiT2DModel itself gives the same outputs",
                stacklevel=3,
            )
        return
    other = {name: getattr(model.config, name) for name in _BLIP3O_FIXED}
    wrong = [
        f"{name}={value!r} ({_BLIP3O_FIXED[name]!r})" for name, value in other.items() if value != _BLIP3O_FIXED[name]
    ]
    if wrong:
        raise ValueError(
            f"BLIP3-o's program would run this network wrongly: it was made with {', '.join(wrong)}; in brackets what "
            "that program has in its code"
        )


# ---- diffusers ------------------------------------------------------------------------------------------------------


def _write_diffusers(model: BLIP3oDiT, folder: Path, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(folder)


# ---- BLIP3-o --------------------------------------------------------------------------------------------------------


def _place(model: BLIP3oDiT, base: Path) -> dict[Path, list[str]]:
    """The base's files and the network's tensors in each, by their full names; ValueError where they do not fit."""
    from safetensors import SafetensorError, safe_open

    index = base / f"{OUR_WEIGHTS}{INDEX}"
    if index.is_file():
        files = shards(index)
    elif (base / OUR_WEIGHTS).is_file():
        files = [base / OUR_WEIGHTS]
    else:
        raise FileNotFoundError(f"--base {base} has neither {index.name} nor {OUR_WEIGHTS}: give a BLIP3-o checkpoint")
    placed: dict[Path, list[str]] = {}
    expected: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                placed[file] = [name for name in opened.keys() if name.startswith(BLIP3O_PREFIX)]
                for name in placed[file]:
                    shape = opened.get_slice(name).get_shape()
                    expected[name.removeprefix(BLIP3O_PREFIX)] = torch.empty(shape, device="meta")
        except SafetensorError as error:
            raise ValueError(f"--base: {file} is not a complete safetensors file: {error}") from error
    if not expected:
        raise ValueError(f"--base {base} has no tensors under {BLIP3O_PREFIX}: it is no BLIP3-o checkpoint")
    differences = compare_names(expected, dict(model.state_dict()), "the base")
    if any(differences):
        raise ValueError(f"the network does not fit --base {base}:\n{report(*differences)}")
    return placed


def _write_blip3o(
    model: BLIP3oDiT,
    folder: Path,
    base: Path,
    placed: dict[Path, list[str]],
    dtype: torch.dtype | None,
    hard_links: bool,
) -> dict[str, Tensor]:
    """The copy of the base; returns the network's tensors as they were written."""
    untouched = {file.name for file, names in placed.items() if not names}
    touched = {file.name for file, names in placed.items() if names}

    def copy(source: str, destination: str) -> None:
        if hard_links and Path(source).name in untouched:
            os.link(os.path.realpath(source), destination)
        else:
            shutil.copyfile(source, destination)

    def ignore(directory: str, names: list[str]) -> set[str]:
        return touched if Path(directory) == base else set()

    shutil.copytree(base, folder, ignore=ignore, copy_function=copy)
    state = model.state_dict()
    written: dict[str, Tensor] = {}
    for file, names in placed.items():
        if names:
            written |= _rewrite(file, folder / file.name, names, state, dtype)
    index = folder / f"{OUR_WEIGHTS}{INDEX}"
    if index.is_file():
        values = read_json(index)
        total = sum(_tensor_bytes(folder / file.name) for file in placed)
        values["metadata"] = (values.get("metadata") or {}) | {"total_size": total}
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if model.normalizer is not None:
        model.normalizer.save(folder)
    return written


def _rewrite(
    source: Path, destination: Path, names: list[str], state: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """One shard with its tensors of the network replaced, everything else in it as it was; returns the replaced."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = read_file(source)
    for name in names:
        ours = name.removeprefix(BLIP3O_PREFIX)
        if ours != UNUSED or UNUSED in state:
            tensors[name] = state[ours].detach().to(dtype or tensors[name].dtype).contiguous()
    save_file(tensors, str(destination), metadata=metadata)
    return {name: tensors[name] for name in names}


def _tensor_bytes(file: Path) -> int:
    """Of all tensors of a safetensors file: what follows its header, which begins with its own length."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _replace_folder(beside: Path, output: Path) -> None:
    """Rename, with an output that exists moved away first and back if that fails."""
    old = output.with_name(f".{output.name}.old.{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(beside, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
