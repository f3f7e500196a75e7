"""Extraction killed, on several processes, on a full disk and over many pictures: the same bytes, flat memory.

This file is also a program, so that runs can be killed: `python test_extract_restart.py TASK FOLDER ...`. It imports
once and forks a process per run.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from blip3o_fast.data.encoders import Encoder
from blip3o_fast.data.extract import Extraction, extract
from blip3o_fast.data.images import Picture, write_tars
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.preprocessing import Preprocessing
from blip3o_fast.data.shards import EncoderInfo, read_index, read_shards

COUNTS = (11, 1, 6, 9)  # pictures of the tars


class Patches(nn.Module):
    """A linear map of patches; ``seconds`` per batch make a run long enough to be killed."""

    def __init__(self, dim: int, seconds: float) -> None:
        super().__init__()
        self.conv, self.seconds = nn.Conv2d(3, dim, 4, 4), seconds
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(dim)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.conv(x)


def run(images, out: Path, seconds: float = 0.0, dims: tuple[int, int] = (6, 5), **options) -> Extraction:
    preprocess = Preprocessing(32, (127.0,) * 3, (64.0,) * 3, crop=False)
    sides = [
        Encoder(EncoderInfo(f"side {dim}", dim), preprocess, Patches(dim, seconds), lambda model, x: model(x))
        for dim in dims
    ]
    options = {"batch_size": 2, "workers": 2, "samples_per_shard": 4} | options
    return extract(images, out, condition_encoder=sides[0], target_encoder=sides[1], **options)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def make_tars(place: Path) -> Path:
    """Four tars; damaged pictures in two of them, one of them at the end of a shard, one cut tar."""
    pictures = iter([Picture(f"k{i:03d}", f"caption {i} {'long ' * 99}", png(i), ".png") for i in range(sum(COUNTS))])
    folder = place / "tars"
    for number, count in enumerate(COUNTS):
        some = [next(pictures) for _ in range(count)]
        if number in (0, 3):
            some[3] = Picture(f"bad{number}", "", b"junk", ".png")
        (path,) = write_tars(iter(some), place / "one", count)
        folder.mkdir(exist_ok=True)
        path.rename(folder / f"{number:05d}.tar")
    cut = folder / "00002.tar"
    cut.write_bytes(cut.read_bytes()[: 5 * 2048 + 700])
    return folder


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return make_tars(tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_manifest_index_and_skipped(tars: Path, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out"
    result = run(tars, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["sources"]) == [f"0000{i}.tar" for i in range(4)]
    assert [len(source["shards"]) for source in manifest["sources"].values()] == [3, 1, 2, 3]
    assert manifest["pictures"] == result.pictures == len(read_index(out)) == len(read_shards(out).keys)
    for name, shard in manifest["shards"].items():
        data = (out / name).read_bytes()
        assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert manifest["provenance"]["condition"]["name"] == "side 6"
    with safe_open(out / "shard-00000.safetensors", framework="pt") as file:
        made_by = json.loads(file.metadata()["blip3o_fast"])["made_by"]
    assert made_by == {side: manifest["provenance"][side] for side in ("condition", "target")}
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(line["source"], line["key"]) for line in skipped] == [
        ("00000.tar", "bad0"),
        ("00002.tar", "(the rest)"),
        ("00003.tar", "bad3"),
    ]
    assert "not a whole uncompressed tar" in skipped[1]["reason"] and manifest["skipped"] == len(result.skipped) == 3
    keys = [row.key for row in read_index(out)]
    assert keys == sorted(keys)  # shards are numbered in the order of the tars
    assert len(set(keys)) == len(keys) and set(keys) >= {f"k{i:03d}" for i in (*range(3), *range(4, 15))}
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith("shard-")) == [
        "index.jsonl",
        "manifest.json",
        "meta.json",
        "skipped.jsonl",
    ]


def test_beginning_while_another_process_finishes(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is read before the other process has written it, the plan after, the entries when they are gone."""
    out = tmp_path / "out"
    run(tars, out)
    before, reads = content(out), [Manifest(out)]
    (out / "parts").mkdir()
    plan = {name: source["shards"] for name, source in Manifest.read(out).sources.items()}
    (out / "parts" / "plan.json").write_text(json.dumps(plan))
    later = Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda folder: reads.pop() if reads else later(folder))
    assert run(tars, out).pictures == 0 and not reads
    assert content(out) == before


def test_interrupted_before_every_rename(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first, the second, ... file comes into its place: each time the next run ends with the same bytes."""

    def two() -> Extraction:
        return run([tars / "00000.tar", tars / "00002.tar"], tmp_path / "out")

    two()
    wanted, real, left_to_do = content(tmp_path / "out"), os.replace, []
    shutil.rmtree(tmp_path / "out")

    class Killed(BaseException):
        pass

    for survives in range(10**6):
        left = [survives]

        def replace(a, b, left=left):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            real(a, b)

        monkeypatch.setattr(os, "replace", replace)
        try:
            two()
        except Killed:
            pass
        else:
            break
        monkeypatch.setattr(os, "replace", real)
        left_to_do.append(two().pictures)
        assert content(tmp_path / "out") == wanted, survives
        shutil.rmtree(tmp_path / "out")
    assert len(left_to_do) > 15
    assert left_to_do == sorted(left_to_do, reverse=True)  # nothing that was finished is done again
    assert left_to_do.count(0) >= 4  # while the last parts are being listed


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_number_of_ranks_changes_no_byte(
    tars: Path, tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tars, tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    results = []
    for rank in reversed(range(world)):  # the order in which they finish does not matter
        monkeypatch.setenv("RANK", str(rank))
        results.append(run(tars, tmp_path / "out"))
        if rank:
            assert not list((tmp_path / "out").glob("shard-*"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert [result.complete for result in results] == [False] * (world - 1) + [True]
    assert "other processes have not finished" in str(results[0])
    monkeypatch.setenv("RANK", "0")
    assert run(tars, tmp_path / "out").pictures == 0


def program(*words: object) -> str:
    command = [sys.executable, __file__, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    # One arena, and large blocks given back at once: by default malloc keeps 80 MiB of what was freed, sooner or later.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the fast form of every task of the program below found; one program, for torch takes long to import."""
    folder = tmp_path_factory.mktemp("program")
    make_tars(folder)
    return json.loads(program("all", folder))


def check_kills(found: dict, kills: int) -> None:
    print(found)
    assert found == {"kills": kills, "lost": 0, "twice": 0, "identical": True}


def test_sigkill_at_random_points(report) -> None:
    check_kills(report["kill"], 3)


@pytest.mark.slow
def test_sigkill_at_many_random_points(tars: Path, tmp_path: Path) -> None:
    check_kills(json.loads(program("kill", tmp_path, 20)), 20)


def test_ranks_at_the_same_time(report) -> None:
    assert report["ranks"] == {"codes": [0] * 4, "identical": True}


def test_a_full_disk_names_the_file_and_leaves_nothing_half(report) -> None:
    """By a limit on the size of files: one that stops the shards, and one that stops the index."""
    shard, index = report["full"]["shard"], report["full"]["index"]
    assert "safetensors: could not be written" in shard["error"] and shard["files"] == ["meta.json"]
    assert "index.jsonl" in index["error"] and not [name for name in index["files"] if name.startswith(".index")]
    assert 0 < index["readable"] < 24  # the index of the tars before
    assert shard["identical"] and index["identical"]  # once there is room


def fewer(count: int) -> int:
    """What a run is compared with."""
    return max(1000, count // 5)


def check_memory(found: list[int], count: int) -> None:
    small, large = found
    print(f"peak RSS: {fewer(count)} pictures {small / 2**10:.0f} MiB, {count} pictures {large / 2**10:.0f} MiB")
    assert large - small < 30 * 2**10


def test_memory_does_not_grow_with_the_tar(report) -> None:
    """Features of 384 channels in fp32 are 98 kB a picture: 1000 more would be 98 MB, were they kept."""
    check_memory(report["memory"], 2000)


@pytest.mark.slow
def test_memory_over_100_000_pictures(tmp_path: Path) -> None:
    check_memory(json.loads(program("memory", tmp_path, 100_000)), 100_000)


# ---- the program ---------------------------------------------------------------------------------------------------


def forked(work) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill(folder: Path, kills: int) -> dict[str, object]:
    start = time.monotonic()
    os.waitpid(forked(lambda: run(folder / "tars", folder / "whole", 0.004)), 0)
    duration, done, identical, chance = time.monotonic() - start, 0, True, random.Random(kills)
    wanted, out = content(folder / "whole"), folder / "out"
    while done < kills:
        pid = forked(lambda: run(folder / "tars", out, 0.004))
        time.sleep(chance.uniform(0, 0.6 * duration))
        os.kill(pid, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            done += 1
        else:  # it had finished: look, and begin anew
            identical &= content(out) == wanted
            shutil.rmtree(out)
    os.waitpid(forked(lambda: run(folder / "tars", out)), 0)
    keys, all_keys = ([row.key for row in read_index(f)] for f in (out, folder / "whole"))
    found = {"lost": len(set(all_keys) - set(keys)), "twice": len(keys) - len(set(keys))}
    return {"kills": done, **found, "identical": identical and content(out) == wanted}


def ranks(folder: Path, world: int) -> dict[str, object]:
    os.waitpid(forked(lambda: run(folder / "tars", folder / "whole")), 0)

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        run(folder / "tars", folder / "out")

    started = [forked(lambda rank=rank: one(rank)) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    return {"codes": codes, "identical": content(folder / "out") == content(folder / "whole")}


def full(folder: Path) -> dict[str, object]:
    tiny = {"dims": (1, 1), "samples_per_shard": 100, "dtype": "int8"}  # then the index is the largest file
    return {"shard": limited(folder, "shard", 5000, {}), "index": limited(folder, "index", 9000, tiny)}


def limited(folder: Path, name: str, most: int, options: dict) -> dict[str, object]:
    """A run whose files may have ``most`` bytes, and then one without the limit."""
    whole, out, note = (folder / f"{name} {what}" for what in ("whole", "out", "note"))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            run(folder / "tars", out, **options)
        except OSError as raised:
            note.write_text(str(raised))

    os.waitpid(forked(lambda: run(folder / "tars", whole, **options)), 0)
    os.waitpid(forked(work), 0)
    left = sorted(p.name for p in out.rglob("*") if p.is_file())
    readable = len(read_shards(out).keys) if "index.jsonl" in left else 0
    os.waitpid(forked(lambda: run(folder / "tars", out, **options)), 0)
    identical = content(out) == content(whole)
    return {"error": note.read_text(), "files": left, "readable": readable, "identical": identical}


def memory(folder: Path, count: int) -> list[int]:
    data, peaks = png(0), []
    for some in (fewer(count), count):
        path = folder / str(some) / "a.tar"
        path.parent.mkdir()
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for i in range(some):
                member = tarfile.TarInfo(f"{i:07d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                tar.members.clear()  # else they are in the memory that the run below is forked with
        options = {"dims": (256, 128), "samples_per_shard": 250, "batch_size": 50}
        pid = forked(lambda path=path, options=options: run(path, path.parent / "out", **options))
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    return peaks


def every(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, task, *count in (("kill", kill, 3), ("ranks", ranks, 4), ("full", full), ("memory", memory, 2000)):
        place = folder / name
        place.mkdir()
        (place / "tars").symlink_to(folder / "tars")
        found[name] = task(place, *count)
    return found


if __name__ == "__main__":
    chosen = {"kill": kill, "ranks": ranks, "full": full, "memory": memory, "all": every}[sys.argv[1]]
    print(json.dumps(chosen(Path(sys.argv[2]), *map(int, sys.argv[3:]))))
