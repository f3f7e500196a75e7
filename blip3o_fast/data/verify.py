"""Is a tar whole? Read from its first header to its end, every byte of every member."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from .images import EXTENSIONS

_BLOCK = 512


@dataclass(frozen=True)
class Contents:
    """What a whole tar holds."""

    members: int
    pictures: int
    captions: int

    def __str__(self) -> str:
        return f"whole: {self.members} members, {self.pictures} pictures, {self.captions} captions"


def verify_tar(path: str | Path) -> Contents:
    """Read a tar from its first header to its end, every byte of every member.

    Raises ValueError naming the file, where it breaks off or what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    names: list[str] = []
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                names.append(member.name)
                body = tar.extractfile(member) if member.isreg() else None
                while body is not None and body.read(1 << 20):
                    pass
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError) as error:
        where = f"after {names[-1]!r}, member {len(names)}" if names else "in its first header"
        raise ValueError(f"{path}: not a whole tar, it breaks off {where} ({error})") from error
    last = f"; the last whole member is {names[-1]!r}" if names else ""
    size = path.stat().st_size
    if size % _BLOCK or size < end + 2 * _BLOCK:
        raise ValueError(f"{path}: not a whole tar, its end mark is missing after {size} bytes{last}")
    # tarfile takes a damaged header for the end mark; that is zeros, and so is what follows it
    with open(path, "rb") as file:
        file.seek(end)
        while rest := file.read(1 << 20):
            if any(rest):
                raise ValueError(f"{path}: not a whole tar, what stands at byte {end} is no header{last}")
    suffixes = [Path(name).suffix.lower() for name in names]
    return Contents(len(names), sum(s in EXTENSIONS for s in suffixes), sum(s == ".txt" for s in suffixes))
