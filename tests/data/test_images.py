"""Pictures from folders and tars: what is read, what is skipped and named, what is never touched."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from blip3o_fast.data import images
from blip3o_fast.data.images import (
    DamagedPictureError,
    Picture,
    Skipped,
    decode,
    find_sources,
    folder_pictures,
    iterate,
    picture_files,
    tar_pictures,
    write_tars,
)


def encoded(mode: str = "RGB", size: tuple[int, int] = (5, 4), format: str = "PNG", seed: int = 0, **options) -> bytes:
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], channels), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode).save(out, format, **options)
    return out.getvalue()


def put(folder: Path, name: str, data: bytes, caption: str | None = None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# --- decoding --------------------------------------------------------------------------------------


def test_transparency_becomes_white() -> None:
    data = encoded("RGBA")
    original = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64)
    alpha = original[..., 3:] / 255
    wanted = original[..., :3] * alpha + 255 * (1 - alpha)
    found = decode(data)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found) - wanted).max() <= 1.0  # rounding of 8-bit compositing

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=1)
    assert np.asarray(decode(out.getvalue())).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert decode(encoded("LA")).mode == "RGB"


def test_every_mode_becomes_rgb() -> None:
    assert decode(encoded("L")).getpixel((0, 0)) == (Image.open(io.BytesIO(encoded("L"))).getpixel((0, 0)),) * 3
    assert decode(encoded("CMYK", format="JPEG")).mode == "RGB"
    assert decode(encoded(format="WEBP", lossless=True)).tobytes() == decode(encoded()).tobytes()
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(out, "PNG")
    assert np.asarray(decode(out.getvalue()))[0, :, 0].tolist() == [0, 1, 128, 255]  # scaled, not clipped


def test_exif_turns_the_picture_upright() -> None:
    picture = Image.new("RGB", (6, 3), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    assert decode(out.getvalue()).size == (3, 6)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify"),
        (b"not a picture", "cannot identify"),
        (encoded(size=(50, 40))[:-60], "truncated|broken"),
        (encoded(format="JPEG", size=(64, 64))[:300], "(?i)truncated"),
        (encoded(format="GIF", mode="L"), "cannot identify"),  # a format that is not read
        (encoded(format="TIFF"), "cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot identify"),  # would start a program
        (bomb(9_000, 9_000), "81000000|9000 x 9000 pixels; at most 64000000"),
        (bomb(100_000, 100_000), "bomb|DecompressionBomb|exceeds"),
    ],
)
def test_what_is_damaged_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(DamagedPictureError, match=reason):
        decode(data)


# --- folders ---------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    put(tmp_path, "b/frog.png", encoded(), "A frog.\nEin Frosch.")
    put(tmp_path, "a/cat.v2.JPG", encoded(format="JPEG"), "\ufeff  A cat.  ")
    put(tmp_path, "a/cat.v2.png", encoded())
    put(tmp_path, "a/plain.webp", encoded(format="WEBP"))
    put(tmp_path, "a/empty.jpeg", encoded(format="JPEG"), "\n\n")
    put(tmp_path, "a/notes.md", b"x")
    put(tmp_path, "a/.hidden.png", encoded())
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    files = picture_files(tmp_path)
    found = list(folder_pictures(tmp_path, files, Skipped()))
    assert [(p.key, p.caption, p.extension) for p in found] == [
        ("a/cat_v2", "A cat.", ".jpg"),
        ("a/cat_v2_png", "A cat.", ".png"),
        ("a/empty", "", ".jpeg"),
        ("a/plain", "", ".webp"),
        ("b/frog", "A frog.", ".png"),
    ]
    assert found[4].data == encoded()
    only = picture_files(tmp_path, keep=lambda path: "cat" not in path.name)
    assert [path.name for path in only] == ["empty.jpeg", "plain.webp", "frog.png"]


def test_iterate_decodes_and_names_what_is_damaged(tmp_path: Path) -> None:
    put(tmp_path, "good.png", encoded(), "good")
    put(tmp_path, "bad.png", b"junk", "bad")
    skipped = Skipped()
    found = list(iterate(tmp_path, skipped))
    assert [(key, picture.size, caption) for key, picture, caption in found] == [("good", (5, 4), "good")]
    assert len(skipped) == 1 and "bad (UnidentifiedImageError" in str(skipped)


def test_oversized_files_are_skipped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PICTURE_BYTES", 100)
    put(tmp_path, "big.png", bytes(101))
    put(tmp_path, "unreadable.png", b"")
    skipped = Skipped()
    assert [p.key for p in folder_pictures(tmp_path, picture_files(tmp_path), skipped)] == ["unreadable"]
    assert skipped.reasons == {"big.png": "more than 100 bytes"}


def test_sources(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path / "pictures", f"{i}.png", encoded(seed=i))
    sources = find_sources(tmp_path / "pictures", per_shard=2)
    assert [s.name for s in sources] == ["pictures[0:]", "pictures[2:]", "pictures[4:]"]
    assert [p.key for s in sources for p in s.pictures(Skipped())] == ["0", "1", "2", "3", "4"]
    again = find_sources(tmp_path / "pictures", per_shard=2)
    assert [s.fingerprint for s in again] == [s.fingerprint for s in sources]
    put(tmp_path / "pictures", "3.png", encoded(seed=9, size=(9, 9)))
    changed = find_sources(tmp_path / "pictures", per_shard=2)
    assert [a.fingerprint == b.fingerprint for a, b in zip(sources, changed, strict=True)] == [True, False, True]

    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("00001.tar", "00000.tar"):
        make_tar(tars / name, [("a.png", encoded())])
    put(tars, "ignored.png", encoded())  # where there are tars, they are the data
    assert [s.name for s in find_sources(tars)] == ["00000.tar", "00001.tar"]
    assert [s.name for s in find_sources([tars / "00001.tar", tmp_path / "pictures"])] == ["00001.tar", "pictures[0:]"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="images: .*missing does not exist"):
        find_sources(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no \.tar file and no picture \(\.png, \.jpg"):
        find_sources(tmp_path)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match=r"a\.tar\.gz is not a \.tar file"):
        find_sources(tmp_path / "a.tar.gz")
    make_tar(tmp_path / "b.tar", [])
    with pytest.raises(ValueError, match=r"\['b.tar'\] given more than once"):
        find_sources([tmp_path / "b.tar", tmp_path / "b.tar"])


# --- tars ------------------------------------------------------------------------------------------


def test_tar_layout(tmp_path: Path) -> None:
    png, jpg = encoded(), encoded(format="JPEG")
    tar = make_tar(
        tmp_path / "x.tar",
        [
            ("./dir/one.png", png),
            ("./dir/one.txt", b"first\nsecond"),
            ("two.txt", "zwei 🐸".encode()),
            ("two.json", b"{}"),
            ("two.JPG", jpg),
            ("three.txt", b"no picture"),
            ("four.jpeg", jpg),
            ("five.png", png),
            ("five.jpg", jpg),
            ("six.seg.png", png),
        ],
    )
    skipped = Skipped()
    found = list(tar_pictures(tar, skipped))
    assert [(p.key, p.caption, p.extension, p.data) for p in found] == [
        ("./dir/one", "first", ".png", png),
        ("two", "zwei 🐸", ".jpg", jpg),
        ("four", "", ".jpeg", jpg),
        ("five", "", ".png", png),
    ]
    assert skipped.reasons == {"x.tar:five.jpg": "a second picture of the same key"}


def test_same_pictures_as_webdataset(tmp_path: Path) -> None:
    pictures = [Picture(f"k{i}", f"caption {i}", encoded(seed=i), ".png") for i in range(7)]
    tars = write_tars(iter(pictures), tmp_path, 3)
    assert [tar.name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    oracle = [
        (sample["__key__"], sample["txt"].decode(), sample["png"])
        for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    ]
    ours = [(p.key, p.caption, p.data) for tar in tars for p in tar_pictures(tar, Skipped())]
    assert ours == oracle == [(p.key, p.caption, p.data) for p in pictures]


def test_equal_tars_are_left_alone(tmp_path: Path) -> None:
    pictures = [Picture(f"k{i}", "", encoded(seed=i), ".png") for i in range(4)]
    tars = write_tars(iter(pictures), tmp_path, 2)
    before = [(tar.stat().st_ino, tar.stat().st_mtime_ns) for tar in tars]
    write_tars(iter(pictures[:3]), tmp_path, 2)
    after = [(tar.stat().st_ino, tar.stat().st_mtime_ns) for tar in tars]
    assert after[0] == before[0] and after[1] != before[1]
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar"]
    with pytest.raises(ValueError, match="per_tar: got 0"):
        write_tars(iter(pictures), tmp_path, 0)


def test_an_interrupted_tar_is_not_there(tmp_path: Path) -> None:
    def pictures():
        yield Picture("a", "", encoded(), ".png")
        yield Picture("b", "", encoded(), ".png")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tars(pictures(), tmp_path, 2)
    assert os.listdir(tmp_path) == ["00000.tar"]
    assert len(list(tar_pictures(tmp_path / "00000.tar", Skipped()))) == 2


def test_nothing_in_a_tar_reaches_the_disk_or_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    path = tmp_path / "tar" / "evil.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (
            ("link.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("hard.png", tarfile.LNKTYPE, "../secret.png"),
            ("device.png", tarfile.CHRTYPE, ""),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("folder.png", tarfile.DIRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for name in ("../../escaped.png", "/absolute.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = len(encoded())
            tar.addfile(member, io.BytesIO(encoded()))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    skipped = Skipped()
    found = [p.key for p in tar_pictures(path, skipped)]
    assert found == ["../../escaped", "/absolute", "good"]  # names are keys, never paths
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert set(skipped.reasons) == {f"evil.tar:{n}.png" for n in ("link", "hard", "device", "pipe")}
    assert set(skipped.reasons.values()) == {"not a regular file"}


def test_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded()
    tar = make_tar(
        tmp_path / "x.tar", [("a.png", data), ("b.png", bytes(len(data) + 1)), ("b.txt", bytes(99)), ("c.png", data)]
    )
    monkeypatch.setattr(images, "MAX_PICTURE_BYTES", len(data))
    monkeypatch.setattr(images, "MAX_CAPTION_BYTES", 10)
    skipped = Skipped()
    assert [p.key for p in tar_pictures(tar, skipped)] == ["a", "c"]
    assert "at most 10 are read" in skipped.reasons["x.tar:b.txt"]
    assert f"{len(data) + 1} bytes" in skipped.reasons["x.tar:b.png"]
    monkeypatch.setattr(images, "MAX_MEMBERS", 3)
    with pytest.raises(ValueError, match=r"x\.tar: more than 3 members"):
        list(tar_pictures(tar, Skipped()))


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", [("a.png", encoded(size=(60, 60))), ("b.png", encoded(size=(60, 60)))])
    whole = tar.read_bytes()
    for damaged in (b"not a tar" * 100, whole[:700], whole[: len(encoded(size=(60, 60))) + 512 + 1024], whole[:512]):
        tar.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.tar: not a whole uncompressed tar"):
            list(tar_pictures(tar, Skipped()))
    second = whole.index(b"b.png")
    for damaged in (whole[:second], whole[: second + 100], whole[:second] + b"U" * 512 + whole[second + 512 :]):
        tar.write_bytes(damaged)  # tarfile itself takes each of these for the end of the archive
        with pytest.raises(ValueError, match=r"x\.tar: not a whole uncompressed tar .* after 1 members"):
            list(tar_pictures(tar, Skipped()))
    import gzip

    tar.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="not a whole uncompressed tar"):
        list(tar_pictures(tar, Skipped()))


def test_names_that_are_not_utf8_become_keys_that_can_be_written(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", [("caf\udce9.png", encoded())])
    assert [p.key.encode() for p in tar_pictures(tar, Skipped())] == ["caf\N{REPLACEMENT CHARACTER}".encode()]
    (tmp_path / "caf\udce9.png").write_bytes(encoded())
    (found,) = folder_pictures(tmp_path, picture_files(tmp_path), Skipped())
    assert found.key.encode() == b"caf?"
