"""The data path: rows a second out of shards, pictures a second through the decoder, and through a whole extraction.

Everything is made here, in a temporary folder: random features, and drawn pictures stored as PNG, which loses nothing.
"""

import functools
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.work import Absent, Inputs, Values, Verdict, Work, judge_by_contract
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.encoders import Encoder, load_encoder
from blip3o_fast.data.extract import extract
from blip3o_fast.data.images import decode
from blip3o_fast.data.reader import open_conditions
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter, read_shards

CONVOLUTIONS = 1e-4  # relative L2 of an encoder in fp32: fifty layers, some in other orders of summation
TOKENS = 64


def _work(case: dict[str, Any], providers: dict[str, Any], gold: Callable[[], Tensor], **more: Any) -> Work:
    given = {"bytes_moved": {}, "flops": {}, "modes": ("whole",), "rotate": False, **more}
    return Work(
        suite="data",
        case=case,
        inputs=lambda: Inputs((), {}, torch.zeros(())),
        providers=providers,
        gold=lambda inputs: {"y": gold()},
        **given,
    )


# ---- shards --------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, rows: int, width: int, per_shard: int) -> Tensor:
    """Random features in shards; the conditions [rows, T, E], in order."""
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(rows, TOKENS, width, generator=generator)
    target = torch.randn(rows, TOKENS, width // 2, generator=generator)
    writer = ShardWriter(folder, Meta(EncoderInfo("condition", width), EncoderInfo("target", width // 2), TOKENS))
    for number, start in enumerate(range(0, rows, per_shard)):
        part = slice(start, start + per_shard)
        names = [f"{i:06d}" for i in range(rows)[part]]
        writer.write(number, condition[part], target[part], names, names, f"source {number}")
    return condition


def plain_read(folder: Path) -> Tensor:
    """safetensors and a concatenation: what anybody would write, and no check of anything."""
    from safetensors.torch import load_file

    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    torch.cat([shard["clip"] for shard in shards])
    return torch.cat([shard["eva"] for shard in shards])


def read_in_batches(folder: Path, batch: int) -> Tensor:
    reader = open_conditions(folder)
    count = len(reader.indices)
    return torch.cat([reader.read(start, min(start + batch, count)) for start in range(0, count, batch)])


def shards_work(folder: Path, rows: int = 512, width: int = 1280, per_shard: int = 128) -> Work:
    """Every row of a folder, once. The file cache of the system holds it: what is timed is the reading, not a disk."""
    condition = write_shards(folder, rows, width, per_shard)
    return _work(
        {"what": "shards", "rows": rows, "tokens": TOKENS, "width": width, "dtype": "float32"},
        {
            "safetensors": lambda: plain_read(folder),
            "read_shards": lambda: read_shards(folder).condition,
            "EmbeddingDataset": lambda: EmbeddingDataset(folder).conditions,
            "open_conditions": lambda: read_in_batches(folder, 64),
        },
        condition.double,
        items=(rows, "rows"),
    )


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_pictures(count: int, side: int) -> list[Tensor]:
    """Smooth random pictures, uint8 [side, side, 3]: noise would not compress as photographs do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return list((255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1))


def as_png(picture: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "PNG")
    return file.getvalue()


def _pixels(images: list[Any]) -> Tensor:
    import numpy

    return torch.stack([torch.from_numpy(numpy.array(image)) for image in images]).float()


def decode_work(count: int = 32, side: int = 512) -> Work:
    """PNG to RGB in one thread: Pillow alone, and `data.images.decode`, which also looks for what can be wrong."""
    from PIL import Image

    pictures = draw_pictures(count, side)
    files = [as_png(picture) for picture in pictures]
    return _work(
        {"what": "decode", "pictures": count, "pixels": f"{side}x{side}", "dtype": "uint8"},
        {
            "Pillow": lambda: _pixels([Image.open(io.BytesIO(data)).convert("RGB") for data in files]),
            "ours": lambda: _pixels([decode(data) for data in files]),
        },
        lambda: torch.stack(pictures).double(),
        items=(count, "pictures"),
    )


def plain_loop(files: list[Path], encoder: Encoder, batch: int) -> Tensor:
    """One thread, a batch at a time: what a script does."""
    from PIL import Image

    done = []
    for start in range(0, len(files), batch):
        images = [Image.open(path).convert("RGB") for path in files[start : start + batch]]
        done.append(encoder.encode(torch.stack([encoder.preprocess(image) for image in images])))
    return torch.cat(done)


def features_of(files: list[Path], encoder: Encoder) -> Tensor:
    """The gold: the same network in fp64, of the same pixels, which preprocessing makes in fp32 for everybody."""
    import copy

    double = copy.copy(encoder)
    double.model, double.dtype = copy.deepcopy(encoder.model).double(), torch.float64
    return plain_loop(files, double, 4).double()


def judge_features(given: Values, baseline: Values, gold: Values) -> Verdict:
    verdict = judge_by_contract(given, baseline, gold)
    error = verdict.errors.get("y")
    if error is None:
        return verdict
    return Verdict(None if error <= CONVOLUTIONS else f"y: relative L2 error {error:.3e}", None, verdict.errors)


def extract_work(folder: Path, encoder: Encoder | Absent, count: int = 32, side: int = 320) -> Work:
    """A folder of pictures to a folder of shards. One encoder stands on both sides, so every picture is encoded twice;
    the plain loop does so as well, and writes nothing."""
    case = {"what": "extract", "pictures": count, "pixels": f"{side}x{side}", "dtype": "float32"}
    if isinstance(encoder, Absent):
        return _work(case, {"plain loop": encoder, "ours": encoder}, lambda: torch.zeros(()))
    (folder / "pictures").mkdir()
    files = [folder / "pictures" / f"{i:04d}.png" for i in range(count)]
    for path, picture in zip(files, draw_pictures(count, side), strict=True):
        path.write_bytes(as_png(picture))
    numbers = itertools.count()

    def ours() -> Tensor:
        out = folder / f"features{next(numbers)}"
        extract(folder / "pictures", out, condition_encoder=encoder, target_encoder=encoder, quiet=True)
        return read_shards(out).condition

    def loop() -> Tensor:
        plain_loop(files, encoder, 4)
        return plain_loop(files, encoder, 4)

    return _work(
        {**case, "encoder": encoder.name},
        {"plain loop": loop, "ours": ours},
        lambda: features_of(files, encoder),
        items=(count, "pictures"),
        judge=judge_features,
    )


@functools.cache
def small_encoder() -> Encoder | Absent:
    """The smallest network whose weights come with a package, or why there is none here."""
    try:
        return load_encoder("efficientnet-lite0")
    except (ImportError, OSError, ValueError) as error:
        return Absent(str(error))


pytestmark = pytest.mark.full


@pytest.mark.parametrize("what", ["shards", "decode", "extract"])
def bench_data(compare: Callable[[Work], None], what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            "shards": lambda: shards_work(Path(folder)),
            "decode": decode_work,
            "extract": lambda: extract_work(Path(folder), small_encoder()),
        }
        compare(makers[what]())
