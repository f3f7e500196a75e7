"""A data loader that dies stops the run with an error that says where, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader


class DataLoaderError(ValueError):
    """The training data could not be loaded: a worker process died, or reading raised an error."""


class NamingLoader(DataLoader):
    """A DataLoader whose errors say which micro-batch of the run was being loaded.

    first_batch: asked when an iteration begins, for the number of the first one that it gives. What was raised while
    loading is the error's ``__cause__``.
    """

    def __init__(self, *args: Any, first_batch: Callable[[], int], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        number = self.first_batch()
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if _is_dead_worker(error) or _has_dead_worker(batches, error):
                    raise _dead_worker(error) from error
                what = f"{type(error).__name__}: {_cause(error)}"
                raise DataLoaderError(f"the data loader failed at micro-batch {number} of the run: {what}") from error
            number += 1
            yield batch


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """torch raises "DataLoader worker is killed" from a signal handler, so wherever the run happens to be."""
    try:
        yield
    except RuntimeError as error:
        if not _is_dead_worker(error):
            raise
        raise _dead_worker(error) from error


def _is_dead_worker(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _has_dead_worker(batches: Any, error: Exception) -> bool:
    """Whether a process of this iteration is gone. Reading from one that is says anything; a connection that is reset
    or ends means one, although the system may still call it alive.
    """
    workers = getattr(batches, "_workers", ())
    lost = bool(workers) and isinstance(error, ConnectionError | EOFError)
    try:  # torch's signal handler speaks once the process is buried: here, and not later, wherever the program then is
        for worker in workers if lost else ():
            worker.join(2)
    except RuntimeError as spoken:
        if not _is_dead_worker(spoken):
            raise
    return lost or any(not worker.is_alive() for worker in workers)


def _dead_worker(error: Exception) -> DataLoaderError:
    return DataLoaderError(
        f"a process of the data loader died: {type(error).__name__}: {str(error).splitlines()[0]}\n"
        "hint: with --num_workers 0 the data is loaded in the main process, where an error shows itself; a worker that "
        "is killed has often run out of memory (fewer --num_workers) or of /dev/shm. Continue from the last checkpoint "
        "with --resume_from_checkpoint auto"
    )


def _cause(error: Exception) -> str:
    """The error's own last line: torch puts the worker's whole traceback into the message."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
