"""Pictures -> grid features of two encoders -> shards: one shard per tar, each done once."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .encoders import TOKENS, Encoder, encoder_info, load_encoder
from .images import Skipped, Source, find_sources
from .pipeline import Pipeline
from .shards import META, Meta, ShardWriter, read_meta, read_shards, shard_name

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = ("shards", "pickle")
PICKLE = "blip3o_grid_embeddings.pkl"  # the original extractor's file name


@dataclass(frozen=True)
class Extraction:
    """What `extract` did: counts of pictures in this run and in all, seconds, and what was skipped."""

    output_dir: Path
    pictures: int
    reused: int
    skipped: Skipped
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.pictures / self.seconds:.1f} pictures/s" if self.pictures else ""
        text = f"{self.pictures} pictures extracted in {self.seconds:.1f} s{rate}; {self.reused} were there already"
        return text + (f"; {len(self.skipped)} skipped: {self.skipped}" if len(self.skipped) else "")


def extract(
    images: str | os.PathLike[str] | list[str | os.PathLike[str]] | None = None,
    output_dir: str | os.PathLike[str] = Path("embeddings"),
    *,
    condition_encoder: str | Encoder = "eva-clip-8b",
    target_encoder: str | Encoder = "clip-vit-l-14",
    tower: str = "",
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    format: str = "shards",
    limit: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    condition_revision: str = "",
    target_revision: str = "",
    quiet: bool | None = None,
) -> Extraction:
    """Extract ``condition [n, 64, E]`` and ``target [n, 64, C]`` of every picture into a folder of shards.

    Args:
        images: a folder of pictures, a folder of webdataset tars, a tar, a dataset of the library datasets (see
            `find_sources`), or a list of these; None is the folder ``data``, where the original project has its tars.
        output_dir: made or continued: shards that are whole and whose source has not changed are kept.
        condition_encoder, target_encoder: names (`load_encoder`) or encoders; the original project's pair, unless
            named. The efficientnets need no hub.
        tower: of both, where they are names: ``"projected"``, ``"hidden"`` or ``""`` (see `load_encoder`).
        batch_size: pictures per forward pass (4 on a CPU, 64 on a GPU).
        workers: threads (as many as cores that this process may use).
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        dtype: of the features on disk, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        format: ``"pickle"`` writes the original project's single file beside the shards as well.
        limit: take at most this many pictures of each source.
        overwrite: drop what ``output_dir`` holds of other encoders or of sources that are not among the images
            given (once the encoders that are needed have been loaded); without it that is an error.
        quiet: no progress bar; None: none where the output is not a terminal.

    Ctrl-C at any point leaves whole shards only; the same call continues. Damaged pictures are skipped and
    named in the result. Raises ``ValueError``, ``FileNotFoundError``, ``ModuleNotFoundError`` or ``OSError``
    for bad arguments, sources and encoders before any picture is read, and ``ValueError`` where a source
    gives no picture at all.
    """
    _check(batch_size, workers, dtype, format, limit)
    place = _device(device)
    sources = find_sources("data" if images is None else images)
    given = ((condition_encoder, condition_revision), (target_encoder, target_revision))
    infos = [e.info if isinstance(e, Encoder) else encoder_info(e, tower=tower, revision=r) for e, r in given]

    def load() -> tuple[Encoder, Encoder]:
        condition, target = (
            e.to(place)
            if isinstance(e, Encoder)
            else load_encoder(e, tower=tower, device=place, revision=r, trust_remote_code=trust_remote_code)
            for e, r in given
        )
        return condition, target

    meta = Meta(infos[0], infos[1], TOKENS)
    # Old features are dropped only once the encoders that replace them have been loaded: a hub out of reach or a
    # missing flag must cost nothing.
    other = overwrite and (Path(output_dir) / META).exists() and read_meta(output_dir) != meta
    sides = load() if other else None
    writer = ShardWriter(output_dir, meta, overwrite=overwrite)
    numbers, foreign = _numbers(writer, sources, overwrite)
    missing, reused, skipped = [], 0, Skipped()
    for source in sources:
        name = shard_name(numbers[source.name])
        header = None if name in foreign else writer.header(name)
        if header is not None and _stamp(source, limit, dtype).items() <= header.items():
            reused += len(writer.rows[name])
            skipped.update(Skipped(json.loads(header.get("skipped", "{}")), int(header.get("skipped_unnamed", "0"))))
        else:
            missing.append(source)
    start, made = time.perf_counter(), 0
    if missing and sides is None:
        sides = load()
    writer.drop(foreign)
    if missing and sides is not None:
        with Pipeline(*sides, DTYPES[dtype], batch_size=batch_size, workers=workers, quiet=quiet) as pipeline:
            for count, source in enumerate(missing, 1):
                done = pipeline.run(source, limit=limit, title=f"{count} of {len(missing)}")
                skipped.update(done.skipped)
                if not done.keys:
                    reasons = str(done.skipped) or "nothing was skipped"
                    raise ValueError(f"{source.path}: no picture of {source.name} could be read; {reasons}")
                extra = {
                    **_stamp(source, limit, dtype),
                    "skipped": json.dumps(done.skipped.reasons),
                    "skipped_unnamed": str(done.skipped.unnamed),
                }
                features = done.features()
                writer.write(numbers[source.name], *features, done.keys, done.captions, source.name, extra)
                made += len(done.keys)
    seconds = time.perf_counter() - start
    if format == "pickle":
        write_pickle(output_dir, Path(output_dir) / PICKLE)
    return Extraction(Path(output_dir), made, reused, skipped, seconds)


def _stamp(source: Source, limit: int | None, dtype: str) -> dict[str, str]:
    """What a shard must have been made of to be kept."""
    return {"source": source.name, "fingerprint": source.fingerprint, "limit": str(limit), "dtype": dtype}


def _numbers(writer: ShardWriter, sources: list[Source], overwrite: bool) -> tuple[dict[str, int], list[str]]:
    """The shard number of each source (the one that it has, else the next free one), and the shards to be dropped."""
    present = {rows[0].source: name for name, rows in writer.rows.items()}
    foreign = sorted(set(present) - {source.name for source in sources})
    if foreign and not overwrite:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise ValueError(
            f"{writer.folder}: holds features of {shown}, which are not among the images given; "
            "give them as well, choose another output folder, or overwrite"
        )
    dropped = [present.pop(name) for name in foreign]
    numbers = {source: int(name[len("shard-") : -len(".safetensors")]) for source, name in present.items()}
    taken = set(numbers.values())
    free = (n for n in itertools.count() if n not in taken)
    return {s.name: numbers[s.name] if s.name in numbers else next(free) for s in sources}, dropped


def write_pickle(folder: str | os.PathLike[str], path: Path) -> None:
    """The original project's file from a folder of shards: numpy float32 arrays under its own keys."""
    import pickle

    read = read_shards(folder)
    data = {
        "eva_blip3o_embeddings": read.condition.numpy(),
        "clip_blip3o_embeddings": read.target.numpy(),
        "captions": read.captions,
        "keys": read.keys,
        "total_samples": len(read.keys),
        "config": {
            "condition": vars(read.meta.condition),
            "target": vars(read.meta.target),
            "tokens": read.meta.tokens,
        },
    }
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            pickle.dump(data, file, protocol=4)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}; allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}; this machine shows {torch.cuda.device_count()} CUDA devices")
    return found


def _check(batch_size: int | None, workers: int | None, dtype: str, format: str, limit: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("workers", workers), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: got {value!r}; a whole number >= 1 or None is needed")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; allowed are {', '.join(map(repr, DTYPES))}")
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; allowed are {', '.join(map(repr, FORMATS))}")
