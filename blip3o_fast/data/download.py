"""BLIP3-o's public pretraining sets from the HuggingFace hub, shard by shard, each whole or not there.

`huggingface_hub` transfers (it resumes what was cut off). Here are the choice of shards, the check of what arrived
against the hub's own sizes and checksums, and what each refusal means to the user.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASETS = {
    "short-caption": "BLIP3o/BLIP3o-Pretrain-Short-Caption",
    "long-caption": "BLIP3o/BLIP3o-Pretrain-Long-Caption",
    "journeydb": "BLIP3o/BLIP3o-Pretrain-JourneyDB",
}
STAGING = ".incoming-"
PAUSES = (1.0, 4.0, 16.0)  # seconds before each further try of a shard


class Cancelled(Exception):
    """A transfer that was given up because another failed or the user interrupted."""


@dataclass(frozen=True)
class Shard:
    """A tar of the hub: its size in bytes, and its SHA-256 where the hub states one."""

    name: str
    size: int
    sha256: str | None


def repository(dataset: str) -> str:
    """The hub's name of a set: one of `DATASETS`, or OWNER/NAME."""
    if dataset in DATASETS:
        return DATASETS[dataset]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        return dataset
    raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, or OWNER/NAME on the hub, got {dataset!r}")


def shard_numbers(text: str) -> list[int]:
    """``"0-2,7"`` -> ``[0, 1, 2, 7]``."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"--shards must be numbers and ranges such as 0-11 or 0,3,7-9, got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def list_shards(dataset: str, *, revision: str | None = None) -> list[Shard]:
    """The tars of a set, in order. Raises ValueError or OSError saying why the hub does not give them."""
    from huggingface_hub import HfApi

    repo = repository(dataset)
    files = _patiently(
        lambda: list(HfApi().list_repo_tree(repo, repo_type="dataset", recursive=True, revision=revision)), repo
    )
    found = []
    for file in files:
        if getattr(file, "size", None) is not None and file.path.endswith(".tar"):
            found.append(Shard(file.path, file.size, getattr(file.lfs, "sha256", None) if file.lfs else None))
    if not found:
        raise ValueError(f"{repo}: holds no .tar")
    return sorted(found, key=lambda shard: shard.name)


def chosen(shards: Sequence[Shard], numbers: Iterable[int], repo: str) -> list[Shard]:
    """Shard k is ``<k with five digits>.tar`` where there is one, else the k-th tar in the order of names."""
    by_name = {shard.name: shard for shard in shards}
    numbered = any(f"{k:05d}.tar" in by_name for k in range(len(shards)))
    found, missing = [], []
    for k in numbers:
        shard = by_name.get(f"{k:05d}.tar") if numbered else shards[k] if k < len(shards) else None
        found += [shard] if shard is not None else []
        missing += [k] if shard is None else []
    if missing:
        raise ValueError(
            f"--shards: {repo} has no shard {', '.join(map(str, missing))}; it has {len(shards)}, "
            f"from {shards[0].name} to {shards[-1].name}"
        )
    return found


def download(
    dataset: str = "short-caption",
    shards: str = "0",
    output_dir: str | Path = "data",
    *,
    force: bool = False,
    workers: int = 4,
    revision: str | None = None,
    quiet: bool = False,
    say: Callable[[str], Any] = lambda line: None,
) -> list[Path]:
    """Fetch shards of a set into a folder; returns their paths.

    A shard that is there with the hub's size (and checksum, where the hub states one) is kept unless ``force``. Each
    arrives under a name of its own and gets its final name when it is whole and its checksum is right.
    workers: transfers at once. say: takes a line per shard.
    Raises ValueError for a set, shard or folder that is not there, OSError where the hub cannot be reached, refuses, or
    sends something else than it announced, naming the shard. A connection that drops is taken up where it broke; a
    command that was killed begins its unfinished shards again.
    """
    if workers < 1:
        raise ValueError(f"--workers must be a whole number >= 1, got {workers}")
    repo, numbers, folder = repository(dataset), shard_numbers(shards), Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; a folder is needed")
    wanted = chosen(list_shards(dataset, revision=revision), numbers, repo)
    stop = threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the final names: what lies under those is whole. What a killed command left there goes after a day.
    for old in folder.glob(f"{STAGING}*"):
        if time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=STAGING, ignore_cleanup_errors=True) as staging,
        ThreadPoolExecutor(min(workers, len(wanted))) as pool,
    ):
        jobs = [
            pool.submit(_fetch, repo, shard, folder, Path(staging), revision, force, quiet, stop, say)
            for shard in wanted
        ]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            if not all(job.done() and job.exception() is None for job in jobs):
                stop.set()  # the others end at their next piece
                for job in jobs:
                    job.cancel()
    failed = [error for job in jobs if not job.cancelled() and (error := job.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, Cancelled)):
        raise error
    return [job.result() for job in jobs]


def _fetch(
    repo: str,
    shard: Shard,
    folder: Path,
    staging: Path,
    revision: str | None,
    force: bool,
    quiet: bool,
    stop: threading.Event,
    say: Callable[[str], Any],
) -> Path:
    from huggingface_hub import hf_hub_download

    path = folder / shard.name
    if not force and path.is_file() and difference(path, shard) is None:
        say(f"{shard.name}: there already, {shard.size / 1e6:.1f} MB")
        return path
    start = time.perf_counter()
    arrived = Path(
        _patiently(
            lambda: hf_hub_download(
                repo,
                shard.name,
                repo_type="dataset",
                revision=revision,
                local_dir=staging,
                force_download=force,
                tqdm_class=_bar(stop, quiet),
            ),
            f"{repo}: {shard.name}",
            stop,
        )
    )
    problem = difference(arrived, shard)
    if problem is not None:
        arrived.unlink()
        raise OSError(f"{repo}: {shard.name} arrived damaged and was dropped: {problem}; run the command again")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrived.replace(path)
    seconds = time.perf_counter() - start
    say(f"{shard.name}: {shard.size / 1e6:.1f} MB in {seconds:.1f} s")
    return path


def difference(path: Path, shard: Shard) -> str | None:
    """How a file differs from what the hub states of it; None where it does not."""
    size = path.stat().st_size
    if size != shard.size:
        return f"it has {size} bytes, the hub says {shard.size}"
    if shard.sha256 is None:
        return None
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == shard.sha256 else f"its SHA-256 is {found[:12]}..., the hub says {shard.sha256[:12]}..."


def _bar(stop: threading.Event, quiet: bool) -> Any:
    """A progress bar that ends its transfer once `stop` is set."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": quiet})

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise Cancelled("given up")
            return super().update(n)

    return Bar


def _patiently(call: Callable[[], Any], what: str, stop: threading.Event | None = None) -> Any:
    """Call, and again after a pause where the network or the hub failed for the moment."""
    for pause in (*PAUSES, None):
        if stop is not None and stop.is_set():
            raise Cancelled("given up")
        try:
            return call()
        except Exception as error:
            refusal, passing = _reason(error, what)
            if refusal is None:
                raise
            if pause is None or not passing:
                raise refusal from error
            (stop or threading.Event()).wait(pause)
    raise AssertionError


def _reason(error: Exception, what: str) -> tuple[Exception | None, bool]:
    """The error for the user and whether it may pass; None for what is no fault of network or hub."""
    from huggingface_hub import errors

    transport: Any = errors.HfHubHTTPError.__mro__[1]  # HTTPError of the library that the hub's client is built on
    # What it says when nothing lies here either; the cause is what went wrong at the hub.
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(error.__cause__, Exception) and (found := _reason(error.__cause__, what))[0] is not None:
            return found
        return ConnectionError(f"{what}: the hub cannot be reached ({_first_line(error)})"), True
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{what}: the hub wants a login that may read it\nhint: hf auth login"), False
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"{what}: the hub has no such set, or not for you\nhint: hf auth login, or check --dataset"
        ), False
    if isinstance(error, errors.EntryNotFoundError | errors.RevisionNotFoundError):
        return ValueError(f"{what}: the hub has no such file or revision"), False
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(f"{what}: HF_HUB_OFFLINE is set, so nothing is fetched"), False
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return PermissionError(f"{what}: the hub refused ({status})\nhint: hf auth login"), False
        return OSError(f"{what}: the hub answered {status}"), status is None or status == 429 or status >= 500
    if isinstance(error, transport | ConnectionError):
        return ConnectionError(f"{what}: the hub cannot be reached ({_first_line(error)})"), True
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return OSError(f"{what}: the transfer was cut short ({_first_line(error)})"), True
    return None, False


def _first_line(error: Exception) -> str:
    return (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
