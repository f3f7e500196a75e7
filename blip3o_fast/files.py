"""Files that a reader never sees half of."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as beside:` write beside; then it becomes path. On an error path stays as it was.

    The folder must exist.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)  # a write to a full disk does not say of which file
        raise
    finally:
        beside.unlink(missing_ok=True)
