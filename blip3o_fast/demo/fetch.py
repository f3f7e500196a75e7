"""Real captioned pictures for the demo, from Debian's archive, from the hub, or from the user's folder.

Debian's package tuxpaint-stamps-default (GPL-2) holds 785 PNGs in 16 categories, each with an English caption. It is
downloaded with `apt-get download` and unpacked with `dpkg-deb -x` into the demo's folder: no root, nothing installed.
Pictures are fetched when the demo runs and are not part of this project.
"""

import itertools
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO

import typer
from tqdm import tqdm

from blip3o_fast.data.images import EXTENSIONS, Skipped, folder_pictures, picture_files, tar_pictures, write_tars
from blip3o_fast.env import inherited

PACKAGE = "tuxpaint-stamps-default"
HUB_DATASET, HUB_FILE, HUB_PICTURES = "BLIP3o/BLIP3o-Pretrain-Short-Caption", "00000.tar", 800
MIN_PICTURES = 32
PER_TAR = 200
_DONE = "whole"  # the file that names the folder of fetched pictures, written last
_VARIANT = re.compile(r"_(mirror|flip|mirrorflip)$")  # drawn by hand for Tux Paint's mirror and flip buttons
_HINT = "\nhint: make demo IMAGES=folder takes your own pictures (at least 32; a caption in a .txt beside each is used)"


def pictures_to_tars(images: str, cache: Path, tars: Path) -> int:
    """Fetch pictures (or take those of the folder `images`) and write them as webdataset tars. Returns their number.

    `tars` appears whole or not at all. Raises ValueError where there are too few pictures or none can be fetched.
    """
    folder = Path(images) if images else fetch(cache)
    files = picture_files(folder, keep=lambda path: not _VARIANT.search(path.stem))
    if len(files) < MIN_PICTURES:
        raise ValueError(
            f"images must hold at least {MIN_PICTURES} pictures ({', '.join(EXTENSIONS)}), {folder} has {len(files)}"
        )
    beside = tars.with_name(tars.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    skipped = Skipped()
    write_tars(folder_pictures(folder, files, skipped), beside, PER_TAR)
    if skipped:
        typer.echo(f"      skipped {len(skipped)}: {skipped}")
    shutil.rmtree(tars, ignore_errors=True)
    os.replace(beside, tars)
    return len(files) - len(skipped)


# ---- where the pictures come from ----------------------------------------------------------------------------------


def fetch(cache: Path) -> Path:
    """A folder of captioned pictures below `cache`: from Debian's archive, else from the hub. ValueError if neither."""
    cache = cache.resolve()  # the programs below run in folders of their own
    done = cache / _DONE
    if (before := fetched(cache)) is not None:
        return before
    cache.mkdir(parents=True, exist_ok=True)
    reasons = []
    for name, get in (("stamps", _from_debian), ("hub", _from_hub)):
        beside = cache / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            get(beside)
        except (OSError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
            continue
        shutil.rmtree(cache / name, ignore_errors=True)
        os.replace(beside, cache / name)
        (cache / f"{_DONE}.part").write_text(name)
        os.replace(cache / f"{_DONE}.part", done)
        return cache / name
    raise ValueError(f"no pictures could be fetched ({'; '.join(reasons)}){_HINT}")


def fetched(cache: Path) -> Path | None:
    """The folder that an earlier `fetch` gave; None where nothing was fetched."""
    done = cache / _DONE
    return cache / done.read_text() if done.is_file() else None


def _from_debian(folder: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError("this machine has no apt-get and dpkg-deb")
    with tempfile.TemporaryDirectory(dir=folder.parent) as text:
        scratch = Path(text)
        options: list[str] = []
        try:
            deb = _download(options, scratch)
        except RuntimeError:  # the machine's package lists are empty or older than the archive
            typer.echo("      apt's package lists are empty or stale: refreshing them into a private folder")
            options = private_lists(scratch)
            _apt([*options, "update"], scratch)
            deb = _download(options, scratch)
        unpacked = scratch / "unpacked"
        _run(["dpkg-deb", "-x", str(deb), str(unpacked)], scratch)
        stamps = unpacked / "usr/share/tuxpaint/stamps"
        if not stamps.is_dir():
            raise RuntimeError(f"{deb.name} has no usr/share/tuxpaint/stamps")
        folder.rmdir()
        os.replace(stamps, folder)


def private_lists(folder: Path) -> list[str]:
    """apt options that keep package lists and cache below `folder`, so that no root is needed and nothing changes."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return [
        "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache",
        "-o", "APT::Sandbox::User=root", "-o", "APT::Update::Post-Invoke=", "-o", "Debug::NoLocking=1",
    ]  # fmt: skip


def _download(options: list[str], folder: Path) -> Path:
    listed = _apt([*options, "download", "--print-uris", PACKAGE], folder)
    match = re.search(r"^'[^']+' (\S+) (\d+)", listed, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"apt-get knows no package {PACKAGE}")
    deb, size = folder / match[1], int(match[2])
    with _watched(deb, size):
        _apt([*options, "download", PACKAGE], folder)
    if not deb.is_file() or deb.stat().st_size != size:
        raise RuntimeError(f"apt-get download left no whole {deb.name}")
    return deb


class _watched:
    """A progress bar over a file that another program writes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.stop = path, threading.Event()
        self.bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"      {PACKAGE}", disable=None)
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.stop.wait(0.2):
            self._update()

    def _update(self) -> None:
        # apt writes beside first (partial/) and moves the file in the end
        files = [f for f in (self.path, self.path.parent / "partial" / self.path.name) if f.is_file()]
        if files:
            self.bar.update(max(f.stat().st_size for f in files) - self.bar.n)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._update()
        self.bar.close()


def _apt(arguments: list[str], folder: Path) -> str:
    return _run(["apt-get", "-q", "-q", *arguments], folder)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=inherited(LC_ALL="C"))
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{command[0]} failed with code {done.returncode}: {' '.join(last)}")
    return done.stdout


def _from_hub(folder: Path) -> None:
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem().open(f"datasets/{HUB_DATASET}/{HUB_FILE}", "rb") as stream:
            save_pictures(stream, folder, HUB_PICTURES)
    except OSError:
        raise
    except Exception as error:  # the hub's client raises its own and its HTTP library's errors, which share no base
        raise RuntimeError(f"the hub cannot be reached ({type(error).__name__})") from error


def save_pictures(stream: IO[bytes], folder: Path, count: int) -> None:
    """The first `count` pictures and captions of a tar that is read as it arrives; no member's name becomes a path."""
    pictures = itertools.islice(tar_pictures(Path(HUB_FILE), Skipped(), stream), count)
    for number, picture in enumerate(tqdm(pictures, total=count, unit="picture", desc="      pictures", disable=None)):
        (folder / f"{number:05d}{picture.extension}").write_bytes(picture.data)
        (folder / f"{number:05d}.txt").write_text(picture.caption)
