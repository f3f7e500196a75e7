"""What lies in a run's folder, and which of it is whole.

    run.json            settings, versions, data, status: running | interrupted | stopped | finished
    metrics.jsonl       one object per log
    checkpoint-N/       weights as models.checkpoints names them, config.json, normalizer.safetensors, ema.safetensors,
                        state.json (see `saving`), and complete.json, written last: a folder without it was cut
                        off and is never continued
    interrupted_checkpoint      after Ctrl-C or SIGTERM: a link to the checkpoint of the last step
    model.safetensors, config.json, normalizer.safetensors      the trained model, once the run is finished

All small files are written beside and renamed. No pickle of ours is written; optimizer.pt and scheduler.pt are the
Trainer's and are read with ``weights_only=True``.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from blip3o_fast.files import replacing
from blip3o_fast.models.reading import OUR_WEIGHTS, STOCK_WEIGHTS

MARKER = "complete.json"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside and rename, so that a reader sees the old file or the new one."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_run(output_dir: Path) -> dict[str, Any] | None:
    """run.json, or None where there is none; ValueError naming the file where it cannot be read."""
    path = output_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text())
        if not isinstance(run, dict):
            raise ValueError(f"it holds a {type(run).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is not the run.json of a training run ({error})") from error
    return run


def mark_complete(folder: Path, step: int) -> None:
    """Record the sizes of all files of a checkpoint; after this it counts as whole."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        # A model card is there to be edited.
        if path.is_file() and path.name not in (MARKER, "README.md")
    }
    write_json(folder / MARKER, {"step": step, "files": files})


def unmark(folder: Path) -> None:
    """Before writing into a checkpoint folder that may exist: from now on it is not whole."""
    (folder / MARKER).unlink(missing_ok=True)


def what_is_missing(folder: Path) -> str | None:
    """None for a whole checkpoint, else the reason why it is not, for a message."""
    if not folder.is_dir():
        return "there is no such folder"
    marker = folder / MARKER
    if not marker.is_file():
        return f"it has no {MARKER}: writing it was interrupted, or it is no checkpoint of this program"
    try:
        files = json.loads(marker.read_text())["files"]
        sizes = {name: (folder / name).stat().st_size for name in files}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    if OUR_WEIGHTS not in sizes and STOCK_WEIGHTS not in sizes:
        return f"{OUR_WEIGHTS} is missing"
    if _STATE not in sizes:
        return f"{_STATE} is missing"
    for name, size in sizes.items():
        if size != files[name]:
            return f"{name} has {size} bytes instead of {files[name]}"
    return None


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, whole or not, oldest step first."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if path.is_dir() and step_of(path) >= 0), key=step_of)


def last_whole(output_dir: Path) -> Path | None:
    """The whole checkpoint with the highest step."""
    whole = [path for path in checkpoints(output_dir) if what_is_missing(path) is None]
    return whole[-1] if whole else None


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json; empty where an earlier version wrote none."""
    path = folder / STATE_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def last_good(output_dir: Path) -> Path | None:
    """The newest whole checkpoint that was not saved right after a step whose loss or gradient was not finite.

    Its weights are finite in any case; but those that a bad step is due to may be in it.
    """
    whole = [path for path in checkpoints(output_dir) if what_is_missing(path) is None]
    good = [path for path in whole if not read_state(path).get("skipped_in_a_row")]
    return good[-1] if good else None


def best_whole(output_dir: Path) -> Path | None:
    """The whole checkpoint with the lowest evaluation loss, the earlier one of two; None where none was evaluated."""
    whole = [path for path in checkpoints(output_dir) if what_is_missing(path) is None]
    losses = {path: read_state(path).get("eval_loss") for path in whole}
    evaluated = {path: loss for path, loss in losses.items() if loss is not None}
    return min(evaluated, key=evaluated.__getitem__, default=None)


def rotate(output_dir: Path, keep: int | None, *, keep_best: bool = False) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and folders cut off before the newest whole one.

    keep_best: nor the one with the lowest evaluation loss.
    """
    everything = checkpoints(output_dir)
    whole = [path for path in everything if what_is_missing(path) is None]
    if not whole:
        return
    kept = set(whole if keep is None else whole[-keep:])
    if keep_best and (best := best_whole(output_dir)) is not None:
        kept.add(best)
    for path in everything:
        if path not in kept and step_of(path) < step_of(whole[-1]):
            unmark(path)  # first: a deletion that is cut off must not leave something that looks whole
            shutil.rmtree(path)


def set_aside(output_dir: Path, resume: Path | None) -> list[Path]:
    """Rename the whole checkpoints after the one that a run is continued from, and return their new places.

    Left where they are, they would count as the newest: `rotate` would delete what the run saves, and ``auto`` would
    leave its present course.
    """
    moved = []
    for path in checkpoints(output_dir) if resume is not None and resume.parent.samefile(output_dir) else []:
        if resume is not None and step_of(path) > step_of(resume) and what_is_missing(path) is None:
            places = (path.with_name(f"earlier-{path.name}" + (f"-{i}" if i else "")) for i in itertools.count())
            moved.append(path.rename(next(place for place in places if not place.exists())))
    return moved


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what was logged after ``step``: a continued run logs it again. A torn last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("step", 0) <= step and not entry.get("finished"):
            kept.append(line)
    with replacing(path) as beside:
        beside.write_text("".join(line + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries of a metrics.jsonl, skipping a torn line."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
