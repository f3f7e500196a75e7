"""Batches out of a folder of shards: samples and MB a second, cold and warm, beside other readers; waiting; memory.

Everything is made here, in a temporary folder, at the default sizes in bf16 (262 kB a sample). "cold" is after
`posix_fadvise(DONTNEED)` on every file, so it is this machine's disk; "warm" comes out of the system's file cache. Each
reader delivers every sample once, in batches, shuffled as it can: what is compared is time to deliver, not order. All
of them run on one thread, as a worker of a DataLoader does.
"""

import argparse
import importlib.util
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from blip3o_fast.data.block_shuffle import BlockOrder, quality
from blip3o_fast.data.block_stream import BlockStream
from blip3o_fast.data.safe_pickle import safe_load
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.training.stream import stream_loader
from blip3o_fast.training.streamed import ShardBatches, SideView

TOKENS, CONDITION, TARGET, BATCH = 64, 1280, 768, 32
BUDGET = 1200  # samples a second that one H100 eats at 55 % MFU


def write(folder: Path, samples: int, sizes: tuple[int, int, int], per_shard: int) -> Path:
    """bf16 shards of a few random pictures repeated: what is in them does not matter to their reading."""
    tokens, condition, target = sizes
    writer = ShardWriter(folder, Meta(EncoderInfo("c", condition), EncoderInfo("t", target), tokens))
    some = torch.randn(per_shard, tokens, condition + target).bfloat16()
    for number, start in enumerate(range(0, samples, per_shard)):
        n = min(per_shard, samples - start)
        names = [f"{start + i:08d}" for i in range(n)]
        writer.write(number, some[:n, :, :condition], some[:n, :, condition:].contiguous(), names, names, "made up")
    return folder


def forget(folder: Path) -> None:
    """Out of the system's file cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- readers: each yields batches of (condition, target) -----------------------------------------------------------


def ours(folder: Path, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    stream = iter(BlockStream(folder, batch_size=BATCH))
    for _ in range(samples // BATCH):
        batch = next(stream)
        yield batch["eva"], batch["clip"]


def loader(folder: Path, samples: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What `blip3o-fast train --num_workers` uses."""
    from blip3o_fast.data.mapped import MappedShards

    shards = MappedShards(folder)
    rows = torch.arange(shards.count, dtype=torch.int32)
    views = [SideView(shards, side, rows) for side in ("condition", "target")]
    order = BlockOrder(shards.count, 0)
    stream = ShardBatches(*views, order, BATCH, rank=0, world_size=1, ahead=max(1, 2 * workers))
    for batch in stream_loader(stream, samples // BATCH, lambda: 0, num_workers=workers, pin_memory=False):
        yield batch["encoder_hidden_states"], batch["target"]


def whole_files(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """safetensors' own `load_file`, a shard at a time, shuffled within it."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        sides = load_file(path)
        for rows in torch.randperm(len(sides["eva"])).split(BATCH):
            yield sides["eva"][rows], sides["clip"][rows]


def from_pickle(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """The original's single pickle (fp32), which is read whole before the first batch."""
    data = safe_load(next(folder.glob("*.pkl")))
    condition, target = (torch.tensor(data[f"{name}_blip3o_embeddings"]) for name in ("eva", "clip"))
    for rows in torch.randperm(len(condition)).split(BATCH):
        yield condition[rows], target[rows]


def from_tars(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """webdataset: a member per side and sample, its shuffle buffer, no auto-decoder."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def decode(sample: dict[str, bytes]) -> tuple[Tensor, Tensor]:
        flat = (torch.frombuffer(bytearray(sample[name]), dtype=torch.bfloat16) for name in ("eva", "clip"))
        condition, target = flat
        return condition.view(TOKENS, -1), target.view(TOKENS, -1)

    samples: list[tuple[Tensor, Tensor]] = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).shuffle(256).map(decode):
        samples.append(sample)
        if len(samples) == BATCH:
            yield torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])
            samples = []


def from_arrow(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """`datasets`: an Arrow table on disk of bytes, memory-mapped, a full shuffle of its rows."""
    import datasets

    table = datasets.load_from_disk(str(folder))
    for rows in torch.randperm(len(table)).split(BATCH):
        found = table[rows.tolist()]
        sides = [
            torch.stack([torch.frombuffer(bytearray(b), dtype=torch.bfloat16).view(TOKENS, -1) for b in found[name]])
            for name in ("eva", "clip")
        ]
        yield sides[0], sides[1]


# ---- the same samples in the other formats -------------------------------------------------------------------------


def _samples(folder: Path) -> Iterator[dict[str, bytes]]:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        sides = load_file(path)
        for i in range(len(sides["eva"])):
            yield {name: sides[name][i].view(torch.int16).numpy().tobytes() for name in ("eva", "clip")}


def write_pickle(shards: Path, folder: Path) -> None:
    from safetensors.torch import load_file

    parts = [load_file(path) for path in sorted(shards.glob("*.safetensors"))]
    data = {f"{name}_blip3o_embeddings": torch.cat([p[name] for p in parts]).float().numpy() for name in parts[0]}
    with open(folder / "embeddings.pkl", "wb") as file:
        pickle.dump(data, file, protocol=4)


def write_tars(shards: Path, folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=1024, verbose=0) as sink:
        for number, sample in enumerate(_samples(shards)):
            sink.write({"__key__": f"{number:08d}", **sample})


def write_arrow(shards: Path, folder: Path) -> None:
    import datasets

    rows = list(_samples(shards))
    columns = {name: [row[name] for row in rows] for name in ("eva", "clip")}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))


# ---- what is reported ----------------------------------------------------------------------------------------------


def timed(read: Callable[[], Iterator[tuple[Tensor, Tensor]]], started: bool) -> tuple[int, int, float]:
    """Samples, bytes and seconds until every batch was delivered; ``started``: from the first batch on, not counted."""
    batches = read()
    if started:
        next(batches)
    samples, size, start = 0, 0, time.perf_counter()
    for batch in batches:
        samples += len(batch[0])
        size += sum(side.nbytes for side in batch)
    return samples, size, time.perf_counter() - start


def throughput(root: Path, samples: int, rounds: int) -> None:
    torch.set_num_threads(1)
    shards = write(root / "shards", samples, (TOKENS, CONDITION, TARGET), 512)
    readers: dict[str, tuple[Path, Callable[[], Iterator[tuple[Tensor, Tensor]]]]] = {
        "ours, no worker": (shards, lambda: ours(shards, samples)),
        "workers: ours, 1, once started": (shards, lambda: loader(shards, samples, 1)),
        "workers: ours, 2, once started": (shards, lambda: loader(shards, samples, 2)),
        "safetensors.load_file, a shard at a time": (shards, lambda: whole_files(shards)),
    }
    others = {
        "the original's pickle (fp32), safe_load": (None, write_pickle, from_pickle),
        "webdataset tars": ("webdataset", write_tars, from_tars),
        "datasets (Arrow)": ("datasets", write_arrow, from_arrow),
    }
    for number, (name, (package, prepare, reader)) in enumerate(others.items()):
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed")
            continue
        folder = root / f"other{number}"
        folder.mkdir()
        prepare(shards, folder)
        readers[name] = folder, lambda reader=reader, folder=folder: reader(folder)
    print("| reader | cold: samples/s | MB/s | warm: samples/s | MB/s | warm over budget |\n|---|---|---|---|---|---|")
    for name, (folder, read) in readers.items():
        cells = []
        for cold in (True, False):
            runs = []
            for _ in range(rounds):
                if cold:
                    forget(folder)
                runs.append(timed(read, started=name.startswith("workers")))
            count, size, seconds = sorted(runs, key=lambda run: run[2])[len(runs) // 2]
            cells += [count / seconds, size / seconds / 1e6]
        print(f"| {name} | {cells[0]:,.0f} | {cells[1]:,.0f} | {cells[2]:,.0f} | {cells[3]:,.0f} | "
              f"{cells[2] / BUDGET:.1f} x |", flush=True)  # fmt: skip


def waiting(root: Path, steps: int, preset: str) -> None:
    """The share of a training step that is spent waiting for its batch."""
    from blip3o_fast.flow.loss import FlowMatchingLoss
    from blip3o_fast.models.config import BLIP3oConfig
    from blip3o_fast.models.nextdit import BLIP3oDiT

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = BLIP3oDiT(BLIP3oConfig.preset(preset, in_channels=TARGET, cross_attention_dim=CONDITION))
    loss_function = FlowMatchingLoss.from_config(model.config)
    for workers in (0, 1):
        batches = loader(root / "shards", steps * BATCH, workers)
        next(batches)
        waited, start = 0.0, time.perf_counter()
        for step in range(steps - 1):
            before = time.perf_counter()
            condition, target = next(batches)
            waited += time.perf_counter() - before
            loss, _ = loss_function(model, target.float(), condition.float(), seed=0, sample_index=step * BATCH)
            loss.backward()
        total = time.perf_counter() - start
        batches.close()  # type: ignore[attr-defined]
        print(f"preset {preset}, batch {BATCH}, {workers} workers: {(steps - 1) * BATCH / total:.0f} samples/s, "
              f"{waited / total:.1%} of the time waiting for data")  # fmt: skip


def memory(root: Path, samples: int) -> None:
    """What the process itself holds while it reads every sample once."""

    def held() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

    folder = write(root / "many", samples, (4, 32, 16), 5000)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    stream = iter(BlockStream(folder, batch_size=100))
    for number in range(1, samples // 100 + 1):
        next(stream)
        if number in (1, samples // 1000, samples // 100):
            print(f"after {number * 100:>7,} of {samples:,} samples ({size:.0f} MB): {held():.1f} MB held")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak RSS of the process, pages of the files included: {peak:.0f} MB")


def shuffle(samples: int) -> None:
    print("of a full shuffle: displacement / n 1/3, neighbours' correlation 0\n")
    print("| blocks x window | displacement / n | correlation | same block in a batch of 256 | in a full shuffle |")
    print("|---|---|---|---|---|")
    for block, window in ((256, 32), (64, 128), (32, 256), (16, 512)):
        q = quality(BlockOrder(samples, 0, block=block, window=window).pictures(0, samples), block, 256)
        cells = f"{q.displacement:.4f} | {q.correlation:.4f} | {q.same_block:.2f} | {q.same_block_full:.2f}"
        print(f"| {block} x {window} | {cells} |")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("what", nargs="*", default=[], help="throughput, waiting, memory, shuffle (all)")
    parser.add_argument("--samples", type=int, default=2048, help="of the default sizes (2048, 0.5 GB)")
    parser.add_argument("--many", type=int, default=100_000, help="small samples of the memory test (100000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each reader; the median is told (3)")
    parser.add_argument("--steps", type=int, default=8, help="training steps of the waiting test (8)")
    parser.add_argument("--preset", default="small", help="network of the waiting test (small)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args(arguments)
    known = ("memory", "throughput", "waiting", "shuffle")  # memory first: a peak is never forgotten
    if unknown := set(options.what) - set(known):
        parser.error(f"what: got {', '.join(sorted(unknown))}; allowed are {', '.join(known)}")
    stamp = machine.stamp()
    print(f"{stamp['cpu']['model']}, {stamp['threads']} threads, commit {stamp['commit']}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        chosen = [word for word in known if word in (options.what or known)]
        for word in chosen:
            print(f"\n{word}")
            if word == "waiting" and not (root / "shards").is_dir():
                write(root / "shards", options.samples, (TOKENS, CONDITION, TARGET), 512)
            {
                "memory": lambda: memory(root, options.many),
                "throughput": lambda: throughput(root, options.samples, options.rounds),
                "waiting": lambda: waiting(root, options.steps, options.preset),
                "shuffle": lambda: shuffle(262_144),
            }[word]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
