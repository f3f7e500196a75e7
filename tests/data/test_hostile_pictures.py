"""Pictures and tars that were made to hurt: each is counted with its key and a reason, and none ends a run."""

import gzip
import io
import os
import struct
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blip3o_fast.data import images
from blip3o_fast.data.encoders import Encoder
from blip3o_fast.data.extract import extract
from blip3o_fast.data.images import Skipped, decode, find_sources
from blip3o_fast.data.preprocessing import Preprocessing
from blip3o_fast.data.shards import EncoderInfo, read_shards

CAPTION = b"A caption."


def saved(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def colours(mode: str = "RGB", size: tuple[int, int] = (6, 5), seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8), mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, rows: bytes | None = None) -> bytes:
    """A grey PNG by hand, with any chunks in it; ``rows`` are its uncompressed lines."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height) if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    """100 MB of text in 100 kB."""
    packed = zlib.compress(bytes(100 << 20), 9)
    heads = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}
    return png(2, 2, chunk(kind, heads[kind] + packed))


def animation(format: str) -> bytes:
    frames = [colours(seed=i) for i in range(3)]
    options: dict[str, object] = {"lossless": True} if format == "WEBP" else {}
    return saved(frames[0], format, save_all=True, append_images=frames[1:], duration=10, **options)


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000))


def make_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def strange() -> dict[str, bytes]:
    """Unusual, and taken: name of the member -> bytes."""
    return {
        "animated_png.png": animation("PNG"),
        "animated_webp.webp": animation("WEBP"),
        "cmyk.jpg": saved(colours("CMYK"), "JPEG"),
        "grey_alpha.png": saved(colours("LA")),
        "grey_16_bits.png": sixteen_bits(),
        "one_pixel.png": saved(colours(size=(1, 1))),
        "a_line.png": saved(colours(size=(3000, 1))),
        "palette.png": saved(colours().convert("P")),
        "bits.png": saved(colours().convert("1")),
        "not_what_it_says.jpg": saved(colours()),
    }


@pytest.fixture(scope="module")
def broken() -> dict[str, tuple[bytes, str]]:
    """Skipped: name of the member -> bytes and what the reason must say."""
    return {
        "huge.png": (png(20_000, 20_000, rows=b""), "bomb|exceeds|400000000"),
        "large.png": (png(9_000, 9_000, rows=b""), "9000 x 9000 pixels; at most 64000000"),
        "text_bomb.png": (text_bomb(b"zTXt"), "(?i)too large|decompress"),
        "unicode_bomb.png": (text_bomb(b"iTXt"), "(?i)too large|decompress"),
        "profile_bomb.png": (text_bomb(b"iCCP"), "(?i)too large|decompress"),
        "cut.png": (saved(colours(size=(60, 60)))[:-500], "(?i)truncated|broken"),
        "torn.jpg": (saved(colours(size=(64, 64)), "JPEG")[:300], "(?i)truncated"),
        "short.webp": (saved(colours(size=(64, 64)), "WEBP")[:100], "."),
        "no_rows.png": (png(50, 50, rows=b""), "(?i)truncated|broken|not enough"),
        "empty.png": (b"", "cannot identify"),
        "text.png": (b"<html>404</html>", "cannot identify"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        "gif.png": (saved(colours().convert("P"), "GIF"), "cannot identify"),
        "film.gif": (saved(colours().convert("P"), "GIF"), r"a format that is not read \(\.gif\)"),
        "scan.tif": (saved(colours(), "TIFF"), r"a format that is not read \(\.tif\)"),
    }


def side(name: str, dim: int) -> Encoder:
    torch.manual_seed(dim)
    return Encoder(
        EncoderInfo(name, dim),
        Preprocessing(32, (127.0,) * 3, (128.0,) * 3, crop=True),
        nn.Conv2d(3, dim, 4, 4),
        lambda model, x: model(x),
    )


def captioned(members: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [part for name, data in members.items() for part in ((name, data), (f"{name.split('.')[0]}.txt", CAPTION))]


def test_a_run_over_all_of_it(tmp_path: Path, strange: dict[str, bytes], broken: dict[str, tuple[bytes, str]]) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    bad = {f"bad_{name}": data for name, (data, _) in broken.items()}
    make_tar(tars / "00000.tar", captioned(strange | bad))
    whole = make_tar(tars / "00001.tar", captioned({f"k{i}.png": saved(colours(seed=i)) for i in range(4)}))
    data = whole.read_bytes()
    whole.write_bytes(data[: data.index(b"k2.png") + 700])
    make_tar(
        tars / "00002.tar", [("silent.png", saved(colours())), ("blank.jpg", saved(colours())), ("blank.txt", b"\n")]
    )
    result = extract(tars, tmp_path / "out", condition_encoder=side("a", 4), target_encoder=side("b", 3), quiet=True)
    read = read_shards(tmp_path / "out")
    assert read.keys == [*(name.split(".")[0] for name in strange), "k0", "k1", "silent", "blank"]
    assert result.pictures == len(strange) + 4
    reasons = result.skipped.reasons
    for name in broken:
        key = f"00000.tar:bad_{name}" if name.endswith((".gif", ".tif")) else f"00000.tar:bad_{name.split('.')[0]}"
        assert key in reasons
    rest = reasons["00001.tar:(the rest)"]
    assert "not a whole uncompressed tar" in rest and "after 5 members" in rest
    assert len(result.skipped) == len(broken) + 1
    told = Skipped()
    silent = [p for source in find_sources(tars / "00002.tar") for p in source.pictures(told)]
    assert [p.caption for p in silent] == ["", ""] and len(told) == 0 and result.without_caption >= 2


def test_reasons(broken: dict[str, tuple[bytes, str]]) -> None:
    for name, (data, why) in broken.items():
        if not name.endswith((".gif", ".tif")):
            with pytest.raises(images.DamagedPictureError, match=why):
                decode(data)


def test_strange_pictures_are_what_they_show(strange: dict[str, bytes]) -> None:
    assert all(decode(data).mode == "RGB" for data in strange.values())
    first = colours(seed=0)
    assert decode(strange["animated_png.png"]).tobytes() == first.tobytes()
    assert decode(strange["animated_webp.webp"]).tobytes() == first.tobytes()
    assert decode(strange["not_what_it_says.jpg"]).tobytes() == first.tobytes()
    grey = np.asarray(decode(strange["grey_16_bits.png"]))[..., 0]
    assert np.array_equal(grey, (np.arange(30).reshape(5, 6) * 2000) >> 8)
    assert decode(strange["one_pixel.png"]).size == (1, 1) and decode(strange["a_line.png"]).size == (3000, 1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_bomb_is_not_unpacked(kind: bytes) -> None:
    data = text_bomb(kind)
    assert len(data) < 200_000
    tracemalloc.start()
    with pytest.raises(images.DamagedPictureError):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_compressed_tar_is_not_unpacked(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte, under the name of a plain tar."""
    with gzip.open(tmp_path / "bomb.tar", "wb", 9) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    told = Skipped()
    tracemalloc.start()
    assert [p for source in find_sources(tmp_path) for p in source.pictures(told)] == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and "not a whole uncompressed tar" in told.reasons["bomb.tar:(the rest)"]


def header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "b.png") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "damage",
    [
        header(1 << 42),  # tarfile would pass over it for minutes, over 1 << 60 for ever
        header(1 << 60),
        header(1 << 60, name="not_ours.bin"),
        header(-1024),
        header(1 << 60, tarfile.GNUTYPE_SPARSE),
        header(1 << 42, tarfile.XHDTYPE),
        header(1 << 42, tarfile.GNUTYPE_LONGNAME),
        header(2 << 20, tarfile.XHDTYPE) + bytes(2 << 20),
        header(20, tarfile.XHDTYPE) + b"18 size=-9999999999\n".ljust(512, b"\0") + header(5),
        header(31, tarfile.XHDTYPE) + b"31 size=9999999999999999999999\n".ljust(512, b"\0") + header(5),
    ],
    ids=(
        *("terabytes", "exabytes", "exabytes of another kind", "negative", "sparse", "attributes", "long name"),
        *("attributes that are there", "negative by attribute", "exabytes by attribute"),
    ),
)
def test_a_header_that_lies_ends_its_tar_at_once(tmp_path: Path, damage: bytes) -> None:
    data = saved(colours())
    whole = make_tar(tmp_path / "x.tar", [("a.png", data), ("a.txt", CAPTION), ("b.txt", CAPTION)])
    end = whole.read_bytes()
    start = end.index(b"b.txt")
    whole.write_bytes(end[:start] + damage + bytes(10240))
    (source,), told, begun = find_sources(tmp_path), Skipped(), time.perf_counter()
    found = [picture.key for picture in source.pictures(told)]
    assert found in ([], ["a"]) and time.perf_counter() - begun < 2
    reason = told.reasons["x.tar:(the rest)"]
    # Python's tarfile refuses some of them itself, which of them changes between its versions
    assert "not a whole uncompressed tar" in reason and ("announces" in reason or "invalid header" in reason)


def test_a_disk_that_fails_is_not_a_damaged_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not read because of the machine must be read by the next run, not be skipped for good."""
    make_tar(tmp_path / "x.tar", captioned({"a.png": saved(colours())}))

    def failing(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    (source,) = find_sources(tmp_path)
    monkeypatch.setattr(images.tarfile, "open", failing)
    told = Skipped()
    with pytest.raises(ValueError, match=r"x\.tar: cannot be read \(\[Errno 5\] Input/output error\)"):
        list(source.pictures(told))
    assert len(told) == 0


def test_commands_are_file_names(tmp_path: Path) -> None:
    for item in ("pipe:touch ran", "http://localhost/x.tar", "|touch ran"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            find_sources(item)
    assert os.listdir(tmp_path) == []
