"""Pictures -> grid features of two encoders -> shards: every picture once, whatever interrupts it.

Several processes (torchrun, srun, a Slurm array) may run the same command on one folder: each takes its share of the
tars (ranks.py), writes parts (parts.py), and whoever finishes last gives them their numbers (manifest.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path

import torch

from blip3o_fast.models.device_flops import peak_of

from .encoders import TOKENS, Encoder, encoder_info, load_encoder
from .images import Picture, Source, find_sources
from .int8_report import measure, summary
from .manifest import MANIFEST, NO_CAPTION, Manifest, read_skipped
from .parts import Entry, Parts, Stamp, sha256_of
from .pickle_output import PICKLE, write_pickle
from .pipeline import Pipeline
from .ranks import Share, this_share
from .shards import INDEX, META, Meta, claim_folder, drop_all, read_meta
from .skipped import MAX_NAME, Skipped
from .stored import DTYPES, quantize, save_sides
from .throughput import Progress, check_precision, flops_per_picture

FORMATS = ("shards", "pickle")
_MERGE_SHARE = 20  # while it runs, a process alone lists what is done, in at most 1/20 of its time


@dataclass(frozen=True)
class Extraction:
    """What `extract` did: counts of pictures in this run and in all, seconds, and what was skipped.

    complete: the folder holds everything; False where other processes are still at work. int8: what it costs.
    without_caption: pictures of the folder whose caption is empty.
    """

    output_dir: Path
    pictures: int
    reused: int
    skipped: Skipped
    seconds: float
    complete: bool = True
    int8: str = ""
    without_caption: int = 0

    def __str__(self) -> str:
        rate = f", {self.pictures / self.seconds:.1f} pictures/s" if self.pictures else ""
        text = f"{self.pictures} pictures extracted in {self.seconds:.1f} s{rate}; {self.reused} were there already"
        text += f"; {len(self.skipped)} skipped: {self.skipped}" if len(self.skipped) else ""
        text += f"; {self.without_caption} have no caption" if self.without_caption else ""
        text += "" if self.complete else f"\n{self.output_dir}: other processes have not finished their tars yet"
        return text + (f"\n{self.int8}" if self.int8 else "")


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
    precision: str = "fp32",
    compile_encoders: bool = False,
    dtype: str = "float32",
    samples_per_shard: int = 1000,
    format: str = "shards",
    limit: int | None = None,
    overwrite: bool = False,
    yes: bool = False,
    trust_remote_code: bool = False,
    condition_revision: str = "",
    target_revision: str = "",
    quiet: bool | None = None,
) -> Extraction:
    """Extract the condition ``[n, 64, E]`` and the target ``[n, 64, C]`` of every picture into a folder of shards.

    Args:
        images: a folder of pictures, a folder of webdataset tars, a tar, a dataset of the library datasets (see
            `find_sources`), or a list of these; None is the folder ``data``, where the original project has its tars.
        output_dir: made or continued: shards that are whole and whose source has not changed are kept.
        condition_encoder, target_encoder: names (`load_encoder`) or encoders; the original project's pair, unless
            named. The efficientnets need no hub.
        tower: of both, where they are names: ``"projected"``, ``"hidden"`` or ``""`` (see `load_encoder`).
        batch_size: pictures per forward pass (4 on a CPU, 64 on a GPU).
        workers: threads (as many as cores that this process may use).
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; under torchrun the first two mean this process's GPU.
        precision: of the encoders, ``"fp32"``, ``"bf16"`` or (on a GPU) ``"fp16"``, by torch.autocast.
        compile_encoders: run them through torch.compile.
        dtype: of the features on disk, ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"int8"``, a scale per token.
        samples_per_shard: so many pictures of a source make a shard (damaged ones counted); bounds the memory.
        format: ``"pickle"`` writes the original project's single file beside the shards as well.
        limit: take at most this many pictures of each tar, folder or dataset.
        overwrite: drop what ``output_dir`` holds of other encoders, of other settings (dtype, precision, limit,
            samples_per_shard) or of sources that are not among the images given (once the encoders that are needed
            have been loaded); without it that is an error.
        yes: do not ask before a run of more than two hours on a CPU.
        quiet: no progress bar; None: none where the output is not a terminal.

    Killed at any point, the same call continues and the files come out the same. Damaged pictures and broken tars are
    skipped and listed in skipped.jsonl. Raises ``ValueError``, ``FileNotFoundError``, ``ModuleNotFoundError`` or
    ``OSError`` for bad arguments, sources and encoders before any picture is read, ``OSError`` naming the file where
    the disk is full, and ``ValueError`` where no picture at all can be read.
    """
    _check(batch_size, workers, dtype, format, limit, samples_per_shard)
    share = this_share()
    place = _device(device, share)
    computing = check_precision(precision, place)
    sources = find_sources("data" if images is None else images, limit=limit)
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

    meta, folder, start = Meta(infos[0], infos[1], TOKENS), Path(output_dir), time.perf_counter()
    own = share.of(sources)
    if not own:
        return Extraction(folder, 0, 0, Skipped(), 0.0, complete=False)
    described = hashlib.sha256(json.dumps(asdict(meta), sort_keys=True).encode()).hexdigest()
    stamps = {
        s.name: Stamp(s.name, s.fingerprint, limit, dtype, precision, samples_per_shard, described) for s in sources
    }
    # Old features are dropped only once the encoders that replace them have been loaded: a hub out of reach or a
    # missing flag must cost nothing.
    unlike = (folder / META).exists() and read_meta(folder) != meta
    unlisted = (folder / INDEX).exists() and not (folder / MANIFEST).exists() and not Parts(folder).folder.exists()
    if unlisted and not unlike and not overwrite:
        raise ValueError(
            f"{folder}: holds shards without a {MANIFEST} (of an older version, or converted); they can be read, but "
            "not continued: choose another output folder, or overwrite"
        )
    sides = load() if overwrite and (unlike or unlisted) else None
    claim_folder(folder, meta, overwrite=overwrite)
    if unlisted and (folder / INDEX).exists():
        drop_all(folder)
    if share.world == 1:  # nobody else writes here: these are of runs that were killed
        for left in folder.glob(".*.json*.*"):
            left.unlink(missing_ok=True)
    parts = Parts(folder)
    manifest = Manifest.continued(folder, parts)
    foreign = sorted(set(manifest.sources) - set(stamps))
    if foreign and not overwrite:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise ValueError(
            f"{folder}: holds features of {shown}, which are not among the images given; "
            "give them as well, choose another output folder, or overwrite"
        )
    there_already = [there for there in (*manifest.stamps(), *parts.stamps(own)) if there.source in stamps]
    other = next((told for there in there_already if (told := stamps[there.source].unlike(there))), "")
    if other and not overwrite:
        raise ValueError(
            f"{folder}: holds features of {other}; give the same, choose another output folder, or overwrite"
        )
    missing, reused = [], 0
    for source in own:
        if stamps[source.name] in manifest:
            reused += manifest.sources[source.name]["pictures"]
        elif parts.done(stamps[source.name])[1]:
            reused += sum(len(entry.rows) for entry in parts.entries(source.name))
        else:
            missing.append(source)
    if missing and sides is None:
        sides = load()
    manifest.drop(foreign + [name for name in manifest.sources if name in stamps and stamps[name] not in manifest])
    made = 0
    if missing and sides is not None:
        hide = quiet if quiet is not None else share.rank > 0 or not sys.stderr.isatty()
        shown_flops = (0, None) if hide else (flops_per_picture(sides), peak_of(place, computing).flops)
        progress = Progress(
            missing, limit, quiet=hide, on_cpu=place.type == "cpu", yes=yes, flops=shown_flops[0], peak=shown_flops[1]
        )
        kept = torch.float32 if dtype == "int8" else DTYPES[dtype]
        pipeline = Pipeline(
            *sides,
            kept,
            precision=computing,
            compile_encoders=compile_encoders,
            batch_size=batch_size,
            workers=workers,
        )
        merged, cost = time.perf_counter(), 0.0
        with progress, pipeline:
            for count, source in enumerate(missing, 1):
                progress.title(f"{source.name} ({count} of {len(missing)})")
                before, more = _source(source, stamps[source.name], meta, parts, pipeline, progress)
                made, reused = made + more, reused + before
                if share.world == 1 and time.perf_counter() - merged > _MERGE_SHARE * cost:
                    began = time.perf_counter()
                    _take_in(folder, sources, stamps, parts, all_or_nothing=False)
                    merged = time.perf_counter()
                    cost = merged - began
    final = _take_in(folder, sources, stamps, parts, all_or_nothing=share.world > 1)
    skipped, report, without_caption = Skipped(), "", 0
    if final is not None:
        for name, key, reason in read_skipped(folder):
            without_caption += reason == NO_CAPTION
            if key and reason != NO_CAPTION:
                skipped.add(f"{name}:{key}", reason)
        skipped.unnamed += sum(source["skipped"] for source in final.sources.values()) - len(skipped)
        if not final.shards:
            raise ValueError(
                f"{sources[0].path}: no picture of {', '.join(list(stamps)[:3])} could be read; "
                f"{skipped if len(skipped) else 'nothing was skipped'}"
            )
        dims = {"condition": meta.condition.dim, "target": meta.target.dim}
        report = summary((shard["int8"] for shard in final.shards.values() if "int8" in shard), dims)
        if format == "pickle":
            write_pickle(folder, folder / PICKLE)
    return Extraction(
        folder, made, reused, skipped, time.perf_counter() - start, final is not None, report, without_caption
    )


def _source(
    source: Source, stamp: Stamp, meta: Meta, parts: Parts, pipeline: Pipeline, progress: Progress
) -> tuple[int, int]:
    """Write the parts of a source that are missing; how many pictures were there, and how many were made."""
    aside = Skipped()  # what the reader of the tar passes over
    pictures = islice(_tolerant(source, aside), stamp.limit)
    part = parts.done(stamp)[0]
    before = sum(len(entry.rows) for done in range(part) if (entry := parts.read(source.name, done)) is not None)
    for _ in islice(pictures, part * stamp.samples_per_shard):
        progress.passed()
    ahead = next(pictures, None)
    if part:  # the parts before have listed it
        _emptied(aside)
    made, last = 0, False
    while not last:
        done = pipeline.run(_first(ahead, islice(pictures, stamp.samples_per_shard - 1)), progress)
        ahead = next(pictures, None)
        last = ahead is None
        passed = _emptied(aside)
        listed = [(name.removeprefix(f"{source.name}:"), reason) for name, reason in passed.reasons.items()]
        listed += [(key[:MAX_NAME], reason) for key, reason in done.skipped]
        entry = Entry(stamp, part, last, list(zip(done.keys, done.captions, strict=True)), listed, passed.unnamed)
        parts.folder.mkdir(exist_ok=True)
        if entry.rows:
            condition, target = done.features()
            path = parts.shard(source.name, part)
            header = {"source": source.name, "fingerprint": stamp.fingerprint, "part": str(part), "dtype": stamp.dtype}
            if stamp.dtype == "int8":
                pairs = quantize(condition), quantize(target)
                entry.int8 = {"condition": measure(condition, *pairs[0]), "target": measure(target, *pairs[1])}
                save_sides(path, *pairs, meta, header)
            else:
                save_sides(path, condition, target, meta, header)
            entry.bytes, entry.sha256 = path.stat().st_size, sha256_of(path)
        parts.write(entry)
        made, part = made + len(entry.rows), part + 1
    return before, made


def _tolerant(source: Source, aside: Skipped) -> Iterator[Picture]:
    """The pictures of a source; where a tar breaks off, what stands before, and the break among the skipped."""
    try:
        yield from source.pictures(aside)
    except ValueError as error:
        if isinstance(error.__cause__, OSError) and source.count is None:
            raise  # the disk, not the tar
        aside.add(f"{source.name}:(the rest)", str(error))


def _first(ahead: Picture | None, more: Iterator[Picture]) -> Iterator[Picture]:
    if ahead is not None:
        yield ahead
        yield from more


def _emptied(skipped: Skipped) -> Skipped:
    """What was noted so far; the notes begin anew."""
    taken = Skipped(dict(skipped.reasons), skipped.unnamed)
    skipped.reasons.clear()
    skipped.unnamed = 0
    return taken


def _take_in(
    folder: Path, sources: list[Source], stamps: dict[str, Stamp], parts: Parts, *, all_or_nothing: bool
) -> Manifest | None:
    """Number and list the sources that are done, up to the first that is not; the manifest once it has them all."""
    names = [source.name for source in sources]
    for _ in range(3):
        manifest = Manifest.read(folder)
        pending = [name for name in names if stamps[name] not in manifest]
        ready = list(takewhile(lambda name: parts.done(stamps[name])[1], pending))
        if all_or_nothing and len(ready) < len(pending):
            return None
        try:
            manifest.add(ready, parts)
        except FileNotFoundError:
            if not all_or_nothing:
                raise
            continue  # another process finished at the same time and has cleared the parts
        if len(ready) == len(pending):
            shutil.rmtree(parts.folder, ignore_errors=True)  # what killed runs and other settings left
            return manifest
        return None
    return None


def _device(device: str, share: Share) -> torch.device:
    if device in ("auto", "cuda") and torch.cuda.is_available() and share.world > 1:
        return torch.device("cuda", share.local_rank % torch.cuda.device_count())
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}; allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}; this machine shows {torch.cuda.device_count()} CUDA devices")
    return found


def _check(
    batch_size: int | None, workers: int | None, dtype: str, format: str, limit: int | None, samples_per_shard: int
) -> None:
    for name, value in (("batch_size", batch_size), ("workers", workers), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: got {value!r}; a whole number >= 1 or None is needed")
    if type(samples_per_shard) is not int or samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: got {samples_per_shard!r}; a whole number >= 1 is needed")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; allowed are {', '.join(map(repr, DTYPES))}")
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; allowed are {', '.join(map(repr, FORMATS))}")
