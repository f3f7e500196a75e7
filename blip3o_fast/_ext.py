"""Loads the optional extensions and remembers why they are missing.

`C`, the C++ extension for the CPU, is a module or None; `ERROR` says why it is None. The hash of the sources that an
extension was built from is compared with the source tree where there is one (a checkout, an editable install): a stale
binary is not used.
Imports only the standard library, since setup.py loads this file to stamp the same hash.
"""

import hashlib
import importlib
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


def source_hash(folder: Path, *parts: str) -> str:
    """16 hex digits over the names and contents of the native sources in `folder` and its subfolders `parts`."""
    digest = hashlib.sha256()
    folders = [folder, *(folder / part for part in parts)]
    for path in sorted(p for place in folders for p in place.glob("*") if p.suffix in _SUFFIXES):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def load(name: str, part: str) -> tuple[Any, str]:
    """The extension blip3o_fast.<name>, built from csrc and csrc/<part>, or None and the reason why it is missing."""
    what = {"_C": "C++", "_cuda": "CUDA"}[name]
    try:
        module = importlib.import_module(f"blip3o_fast.{name}")
    except ImportError as error:
        return None, f"not available: the {what} extension is not built ({error})"
    if (SOURCES / "bindings.cpp").is_file():
        built, tree = module.source_hash, source_hash(SOURCES, part)
        if built != tree:
            return (
                None,
                f"not available: the {what} extension is stale (built from {built}, sources are {tree}); reinstall",
            )
    return module, ""


C: Any
ERROR: str
C, ERROR = (None, "") if __name__ != "blip3o_fast._ext" else load("_C", "cpu")
