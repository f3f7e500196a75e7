"""How much memory a process may still take: of its GPU, or of the machine within the limits of its control groups."""

from __future__ import annotations

from pathlib import Path

import torch

from blip3o_fast import env


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that one process may still take: of its GPU, or its share of the machine's memory within the limit of its
    control group. None where the system does not say.

    root: where /proc and /sys are looked for.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [free for free in (_machine(root), *_control_groups(root)) if free is not None]
    return min(found) // int(env.read("LOCAL_WORLD_SIZE") or "1") if found else None


def _machine(root: Path) -> int | None:
    lines = _text(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _control_groups(root: Path) -> list[int]:
    """What each control group that this process is in, and each above it, leaves. Version 2, and 1 where it is used."""
    free = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path is often that outside, and the group itself is mounted at the base.
        for group in (folder, *folder.parents):
            limit, used = (_number(group / name) for name in names)
            if limit is not None:
                # Cached files count as used, and go when the memory is needed.
                free.append(max(0, limit - (used or 0) + _cached(group / "memory.stat")))
            if group == base:
                break
    return free


def _cached(stat: Path) -> int:
    """Of the files that a group has read: those that no one uses."""
    pairs = dict(line.split()[:2] for line in _text(stat).splitlines())
    return int(pairs.get("inactive_file", 0))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
