"""Reading captioned pictures from folders and webdataset tars, none of which is trusted.

Tars are streamed: no member is ever extracted, its name never becomes a path, and only regular files with
a known extension, of a bounded size and number, are looked at. Pictures are decoded by Pillow's PNG, JPEG
and WebP readers alone, after their announced size was checked. What cannot be read is skipped, counted and
named (`Skipped`): one damaged picture in a million must not end a day of extraction.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from .skipped import Skipped as Skipped

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
UNREAD = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".svg")  # pictures, but told as skipped
MAX_PICTURE_BYTES = 64 << 20
MAX_CAPTION_BYTES = 1 << 16
MAX_MEMBERS = 2_000_000  # of one tar
MAX_MEMBER_BYTES = 64 << 30  # of one member, also of those that are passed over
MAX_HEADER_BYTES = 1 << 20  # of a long name or of attributes, which tarfile reads whole
MAX_PIXELS = 64_000_000  # 200 MB of RGB; a small file can announce far more (a decompression bomb)


class DamagedPictureError(ValueError):
    """A picture that cannot be decoded; the message says why."""


class DamagedTarError(ValueError):
    """A tar that is none, or that breaks off."""


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it: ``data`` are the encoded bytes, ``extension`` one of `EXTENSIONS`."""

    key: str
    caption: str
    data: bytes
    extension: str


def decode(data: bytes) -> Image:
    """The picture as 8-bit RGB, upright (EXIF), transparency composited on white.

    White because cut-out pictures are drawn for a page: on black, dark outlines would vanish. Of an
    animation the first frame is taken. Raises `DamagedPictureError`.
    """
    from PIL import Image, ImageOps

    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a sample, which Pillow would clip instead of scale
            import numpy

            image = Image.fromarray((numpy.asarray(image).astype(numpy.int64) >> 8).clip(0, 255).astype(numpy.uint8))
        if image.has_transparency_data:
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image.convert("RGBA"))
            image = page
        return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise a dozen kinds on bad input; all mean "damaged"
        raise DamagedPictureError(f"{type(error).__name__}: {error}".rstrip(": ")) from error


@dataclass(frozen=True)
class Source:
    """One unit of extraction: a tar, or some files of a folder.

    ``fingerprint`` (sizes and times of the files) changes when the content may have changed, so that old
    features are not reused.
    """

    name: str
    fingerprint: str
    path: Path
    files: tuple[Path, ...] = ()  # of a folder; empty for a tar

    @property
    def count(self) -> int | None:
        """Its pictures, damaged ones too; None for a tar, where only reading tells."""
        return len(self.files) or None

    def pictures(self, skipped: Skipped) -> Iterator[Picture]:
        """What can be read, damaged parts told to ``skipped``: nothing in a picture, a caption or a tar's structure
        ends it, only a disk that fails (``ValueError``). A missing caption is an empty one.
        """
        try:
            yield from self.read(skipped)
        except DamagedTarError as error:  # what lies before the damage was given
            skipped.add(f"{self.name}:(the rest)", str(error))

    def read(self, skipped: Skipped) -> Iterator[Picture]:
        if self.files:
            return folder_pictures(self.path, self.files, skipped)
        return tar_pictures(self.path, skipped)


def find_sources(
    images: str | os.PathLike[str] | list[str | os.PathLike[str]], per_shard: int = 1000, limit: int | None = None
) -> list[Source]:
    """Every tar named or found directly in a folder named; a folder without tars gives its pictures.

    Pictures of a folder (recursively, in sorted order) are taken ``per_shard`` at a time, and so are the rows of a
    dataset (``hf:NAME``, or a folder of the library datasets: see `dataset_source`); of either at most ``limit``.
    Raises ``FileNotFoundError`` or ``ValueError`` naming what was found where there is nothing to read.
    """
    from .dataset_source import dataset_sources, is_dataset

    found: list[Source] = []
    for item in images if isinstance(images, list) else [images]:
        path = Path(item)
        if is_dataset(os.fspath(item)):
            found += dataset_sources(os.fspath(item), per_shard, limit)
        elif path.is_file():
            found.append(_tar_source(path))
        elif path.is_dir():
            tars = sorted(p for p in path.iterdir() if p.suffix == ".tar" and p.is_file())
            found += [_tar_source(tar) for tar in tars] or _folder_sources(path, per_shard, limit)
        else:
            raise FileNotFoundError(f"images: {path} does not exist; a folder of pictures or .tar files is needed")
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"images: {twice[:3]} given more than once; each source needs a name of its own")
    return found


def _tar_source(path: Path) -> Source:
    if path.suffix != ".tar":
        raise ValueError(f"images: {path} is not a .tar file; compressed archives are not read, unpack the outer layer")
    state = path.stat()
    return Source(path.name, f"{state.st_size} {state.st_mtime_ns}", path)


def _folder_sources(path: Path, per_shard: int, limit: int | None) -> list[Source]:
    files = picture_files(path)[:limit]
    if not files:
        raise ValueError(f"images: {path} holds no .tar file and no picture ({', '.join(EXTENSIONS)})")
    sources = []
    for start in range(0, len(files), per_shard):
        some = tuple(files[start : start + per_shard])
        digest = hashlib.sha256()
        for file in some:
            state = file.stat()
            digest.update(f"{file.relative_to(path)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        sources.append(Source(f"{path.name}[{start}:]", digest.hexdigest(), path, some))
    return sources


def picture_files(folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    """Pictures below ``folder``, sorted by their relative path; links to folders are not followed."""
    found = []
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(base, name)
            if path.suffix.lower() in EXTENSIONS and not name.startswith(".") and path.is_file() and keep(path):
                found.append(path)
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def folder_pictures(folder: Path, files: tuple[Path, ...] | list[Path], skipped: Skipped) -> Iterator[Picture]:
    """Pictures with the caption on line 1 of the ``.txt`` beside each (none: an empty caption).

    The key is the path below ``folder`` without its extension, dots replaced (a webdataset key ends at the
    first dot), made unique by the extension where two files share a stem.
    """
    seen: set[str] = set()
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            if file.stat().st_size > MAX_PICTURE_BYTES:
                raise DamagedPictureError(f"more than {MAX_PICTURE_BYTES} bytes")
            data = file.read_bytes()
            text = file.with_suffix(".txt")
            caption = first_line(text.open("rb").read(MAX_CAPTION_BYTES)) if text.is_file() else ""
        except (OSError, DamagedPictureError) as error:
            skipped.add(name, str(error))
            continue
        stem = file.relative_to(folder).with_suffix("").as_posix()
        key = "/".join(part.replace(".", "_") for part in stem.split("/"))
        key = key.encode(errors="replace").decode()  # a name that is not UTF-8 could not be written to the index
        if key in seen:
            key = f"{key}_{file.suffix[1:].lower()}"
        while key in seen:
            key += "_"
        seen.add(key)
        yield Picture(key, caption, data, file.suffix.lower())


def tar_pictures(path: Path, skipped: Skipped, stream: IO[bytes] | None = None) -> Iterator[Picture]:
    """Pictures of one uncompressed webdataset tar: ``key.png`` (or jpg, jpeg, webp) and ``key.txt``, adjacent.

    With ``stream`` the bytes come from there as they arrive, and ``path`` only names them.
    Raises `DamagedTarError` where it is none or breaks off, ``ValueError`` where it cannot be read for another
    reason; both name the tar.
    """
    key, caption, found = None, "", None
    number = 0
    room = path.stat().st_size if stream is None else MAX_MEMBER_BYTES
    try:
        with tarfile.open(path, "r|", fileobj=stream, tarinfo=_Member, errors="replace") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a stream has no use for a list of what is past
                number += 1
                if not 0 <= member.size <= room:  # tarfile would pass over what is not there, block by block, for hours
                    raise tarfile.ReadError(f"a member announces {member.size} bytes")
                if number > MAX_MEMBERS:
                    raise ValueError(f"{path}: more than {MAX_MEMBERS} members; split it")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    skipped.add(f"{path.name}:{member.name}", "not a regular file")
                    continue
                base = member.name.rsplit("/", 1)[-1]
                stem, _, extension = base.partition(".")
                extension = "." + extension.lower()
                if extension in UNREAD:
                    skipped.add(f"{path.name}:{member.name}", f"a picture in a format that is not read ({extension})")
                if extension not in EXTENSIONS and extension != ".txt":
                    continue  # json, cls and the like of other datasets: not ours to read
                this = member.name[: len(member.name) - len(base)] + stem
                if this != key:
                    if key is not None and found is not None:
                        yield Picture(key, caption, *found)
                    key, caption, found = this, "", None
                limit = MAX_CAPTION_BYTES if extension == ".txt" else MAX_PICTURE_BYTES
                if member.size > limit:
                    skipped.add(f"{path.name}:{member.name}", f"{member.size} bytes; at most {limit} are read")
                    continue
                file = tar.extractfile(member)
                assert file is not None  # it is a regular file
                data = file.read()
                if extension == ".txt":
                    caption = first_line(data)
                elif found is None:
                    found = (data, extension)
                else:
                    skipped.add(f"{path.name}:{member.name}", "a second picture of the same key")
        if key is not None and found is not None:
            yield Picture(key, caption, *found)
    except (tarfile.TarError, EOFError) as error:
        raise DamagedTarError(f"{path}: not a whole uncompressed tar ({error}), after {number} members") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}), after {number} members") from error


class _Member(tarfile.TarInfo):
    """A header that is missing, torn, damaged or absurd is an error here; tarfile takes some for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} where a member or the end mark should be") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        describes = member.type in (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if not 0 <= member.size <= (MAX_HEADER_BYTES if describes else MAX_MEMBER_BYTES):
            raise tarfile.ReadError(f"a header announces {member.size} bytes")
        return member


def first_line(data: bytes) -> str:
    """The first line of a caption, without what surrounds it."""
    text = data.decode("utf-8-sig", errors="replace")
    return text.splitlines()[0].strip() if text.strip() else ""


def write_tars(pictures: Iterator[Picture], folder: str | os.PathLike[str], per_tar: int) -> list[Path]:
    """Write ``00000.tar``, ``00001.tar``, ... of ``per_tar`` pictures each, in webdataset's layout.

    The bytes depend on the pictures alone, and a tar that is there already with the same bytes is left
    untouched, so that features extracted from it stay valid. Each tar is written beside and renamed.
    """
    if per_tar < 1:
        raise ValueError(f"per_tar: got {per_tar}; a whole number >= 1 is needed")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    some: list[Picture] = []
    for picture in pictures:
        some.append(picture)
        if len(some) == per_tar:
            written.append(_write_tar(folder / f"{len(written):05d}.tar", some))
            some = []
    if some:
        written.append(_write_tar(folder / f"{len(written):05d}.tar", some))
    return written


def _write_tar(path: Path, pictures: list[Picture]) -> Path:
    beside = path.with_name(f".{path.name}.part")
    try:
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
            for picture in pictures:
                for extension, data in ((picture.extension, picture.data), (".txt", picture.caption.encode())):
                    member = tarfile.TarInfo(picture.key + extension)
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
        if not (path.is_file() and filecmp.cmp(path, beside, shallow=False)):
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def iterate(
    images: str | os.PathLike[str] | list[str | os.PathLike[str]], skipped: Skipped | None = None
) -> Iterator[tuple[str, Image, str]]:
    """``(key, picture, caption)`` of every picture of a folder or of tars; damaged ones go to ``skipped``."""
    skipped = Skipped() if skipped is None else skipped
    for source in find_sources(images):
        for picture in source.pictures(skipped):
            try:
                yield picture.key, decode(picture.data), picture.caption
            except DamagedPictureError as error:
                skipped.add(f"{source.name}:{picture.key}", str(error))
