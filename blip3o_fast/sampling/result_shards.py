"""Generated features on disk: a folder that grows shard by shard and says how it was made.

::

    samples.json                  how they were made
    samples_00000.safetensors     generated float32 [rows, T, C] (raw feature space), index int64 [rows]
    samples_00001.safetensors     ...

Row r of a shard belongs to the picture in row ``index[r]`` of the embeddings; a picture with n samples has n rows, one
after the other. A shard's metadata has one entry, ``samples``: JSON with the names of its pictures (``keys``), how they
were made (``made``, as in samples.json) and the digest of that. One entry, for safetensors writes several in a random
order, and the same samples are to be the same bytes.

A shard is written beside its place and renamed, so one that exists is whole. A run that was killed leaves whole shards
and at most one unfinished file per process, which the next run overwrites. No process waits for another: which shard is
whose follows from its number. One run at a time may use a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.data.shards import write_text

FORMAT_VERSION = 1
DESCRIPTION = "samples.json"
ENTRY = "samples"
_SHARD = re.compile(r"samples_[0-9]{5,9}\.safetensors")


def shard_name(number: int) -> str:
    return f"samples_{number:05d}.safetensors"


class ResultFolder:
    """A folder of results, made or continued.

    made: everything on which the samples depend, JSON values. A folder of others is refused by the names of what
        differs, or taken over where `overwrite`, which replaces its shards one by one.
    told: what a reader may want to know beside it (paths).
    """

    def __init__(self, folder: str | os.PathLike[str], made: dict[str, Any], told: dict[str, Any], overwrite: bool):
        self.folder, self.made = Path(folder), made
        self.digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: is a file; a folder of results is needed")
        found = read_description(self.folder)["made"] if (self.folder / DESCRIPTION).exists() else None
        if found == made:
            return
        if found is not None and not overwrite:
            raise ValueError(f"{self.folder}: holds samples of other settings: {_difference(found, made)}{_HINT}")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Every process may come here, some when others already write. So what will be written anyway is left to be
        # replaced, and only the shards go that were more than there will be; the description comes last.
        wanted = {shard_name(number) for number in range(len(shard_rows(made)))}
        for path in self.folder.iterdir():
            if _SHARD.fullmatch(path.name) and path.name not in wanted:
                path.unlink(missing_ok=True)
        content = {"format_version": FORMAT_VERSION, "made": made, "told": told}
        write_text(self.folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")

    def holds(self, number: int, rows: int) -> bool:
        """Whether this shard is there, whole, of these settings and of so many rows."""
        return self._rows(self.folder / shard_name(number)) == rows

    def write(self, number: int, generated: Tensor, index: Tensor, keys: list[str]) -> Path:
        """generated: [rows, T, C]. index: int64 [rows]. keys: of the pictures, one for each of their runs of rows."""
        from safetensors.torch import save_file

        path = self.folder / shard_name(number)
        beside = path.with_name(f".{path.name}.part")  # one name, so that killed runs do not pile up
        tensors = {"generated": generated.float().contiguous(), "index": index.contiguous()}
        said = {"digest": self.digest, "made": self.made, "keys": keys}
        save_file(tensors, beside, metadata={ENTRY: json.dumps(said, ensure_ascii=False)})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        return path

    def _rows(self, path: Path) -> int | None:
        """Rows of a whole shard of these settings, else None."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
                return int(file.get_slice("index").get_shape()[0]) if said.get("digest") == self.digest else None
        except (SafetensorError, OSError, ValueError):
            return None


@dataclass
class Results:
    """All of a finished folder, in the order of the embeddings' file.

    generated: float32 [rows, T, C]. index: int64 [rows]. made, told: how. keys: of the pictures.
    """

    generated: Tensor
    index: Tensor
    keys: list[str]
    made: dict[str, Any]
    told: dict[str, Any]


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read a finished folder; FileNotFoundError or ValueError naming it and what is missing."""
    from safetensors import safe_open

    path, description = Path(folder), read_description(folder)
    made = description["made"]
    results = ResultFolder(path, made, {}, overwrite=False)
    counts = shard_rows(made)
    whole = [results.holds(number, rows) for number, rows in enumerate(counts)]
    if not all(whole):
        raise ValueError(
            f"{path}: {sum(whole)} of {len(whole)} result shards are there, {shard_name(whole.index(False))} is not; "
            "run the same `sample` command again, it goes on where it stopped"
        )
    parts: list[tuple[Tensor, Tensor]] = []
    keys: list[str] = []
    for number in range(len(counts)):
        with safe_open(path / shard_name(number), framework="pt") as file:
            parts.append((file.get_tensor("generated"), file.get_tensor("index")))
            keys += json.loads(file.metadata()[ENTRY])["keys"]
    generated, index = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Results(generated, index, keys, made, description["told"])


def shard_rows(made: dict[str, Any]) -> list[int]:
    """Rows of every shard of a finished folder: whole pictures, about samples_per_shard rows, the last one the rest."""
    pictures, each = made["pictures"], made["num_samples_per_condition"]
    step = max(1, made["samples_per_shard"] // each)
    return [(min(start + step, pictures) - start) * each for start in range(0, pictures, step)]


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """samples.json; its counts are checked, for sizes are made of them."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `blip3o-fast sample --output_dir` makes such a folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: this version reads objects with format_version {FORMAT_VERSION}")
    made, told = content.get("made"), content.get("told")
    counts = ("pictures", "num_samples_per_condition", "samples_per_shard")
    if not isinstance(made, dict) or not isinstance(told, dict) or not all(_count(made.get(name)) for name in counts):
        raise ValueError(f"{path}: needed are 'told' and 'made' with the counts {', '.join(counts)}")
    return content


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """In which settings; digests are not worth printing."""
    names = [name for name in (*asked, *found) if found.get(name) != asked.get(name)]
    told = []
    for name in dict.fromkeys(names):
        if name in ("weights", "embeddings", "rows"):
            told.append(f"other {name}")
        else:
            told.append(f"{name} {found.get(name)!r}, asked for {asked.get(name)!r}")
    return "; ".join(told)


_HINT = "\nhint: choose another folder, or --overwrite to drop them"
