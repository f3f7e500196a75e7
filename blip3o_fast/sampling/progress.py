"""A progress bar where it is wanted and stderr is a terminal; elsewhere nothing, and tqdm is not even imported."""

import sys
from typing import Any


def bar(wanted: bool, **arguments: Any) -> Any:
    """`with bar(wanted, total=30, ...) as shown: shown.update()`. arguments: of `tqdm`."""
    if not (wanted and sys.stderr.isatty()):
        return _Hidden()
    from tqdm import tqdm

    return tqdm(**arguments)


class _Hidden:
    """What is used of tqdm, doing nothing."""

    def __enter__(self) -> "_Hidden":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass
