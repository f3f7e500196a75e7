"""Fetching pictures: a package archive that fails, lies and breaks off, a streamed tar, a user's folder."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from blip3o_fast.data import images
from blip3o_fast.demo import fetch

# An apt-get that knows the package only after `update` into a private folder, and serves it from $ARCHIVE.
FAKE_APT = """#!{python}
import os, pathlib, shutil, sys
archive, log = pathlib.Path(os.environ["ARCHIVE"]), pathlib.Path(os.environ["LOG"])
words = [w for w in sys.argv[1:] if not w.startswith("-")]
log.write_text((log.read_text() if log.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
lists = [w.partition("=")[2] for w in sys.argv if w.startswith("Dir::State::lists=")]
if "update" in words:
    pathlib.Path(lists[0], "known").touch()
elif not (lists and pathlib.Path(lists[0], "known").exists()):
    sys.exit("E: Unable to locate package")
elif "--print-uris" in sys.argv:
    print(f"'http://archive/{{archive.name}}' {{archive.name}} {{os.environ['SIZE']}} SHA256:0")
else:
    shutil.copy(archive, ".")
"""


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A machine whose only apt-get is the fake one, with a real .deb behind it."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb to build a package")
    stamps = tmp_path / "tree/usr/share/tuxpaint/stamps/animals"
    stamps.mkdir(parents=True)
    for name in ("frog", "frog_mirror", "newt", "newt_flip"):
        (stamps / f"{name}.png").write_bytes(png("green"))
    (stamps / "frog.txt").write_text("A frog.\nes.utf8=Una rana.\n")
    control = tmp_path / "tree/DEBIAN/control"
    control.parent.mkdir()
    control.write_text(
        f"Package: {fetch.PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    deb = tmp_path / f"{fetch.PACKAGE}_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "tree"), str(deb)], check=True, capture_output=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(FAKE_APT.format(python=sys.executable))
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    for name, value in {"ARCHIVE": deb, "LOG": tmp_path / "log", "SIZE": deb.stat().st_size}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(fetch, "_from_hub", no_hub)
    return deb


def no_hub(folder):
    raise RuntimeError("the hub cannot be reached (Offline)")


def test_empty_lists_are_refreshed_privately(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fetch.fetch(Path("cache"))  # relative, as `make demo` gives it
    files = images.picture_files(folder, keep=lambda path: not fetch._VARIANT.search(path.stem))
    assert [file.name for file in files] == ["frog.png", "newt.png"]
    calls = (tmp_path / "log").read_text().splitlines()
    assert any("update" in call.split() for call in calls)
    private = str(tmp_path / "cache")
    assert all(f"Dir::State::lists={private}" in call for call in calls[1:]), "nothing outside the cache is touched"
    before = len(calls)
    assert fetch.fetch(tmp_path / "cache") == folder
    assert len((tmp_path / "log").read_text().splitlines()) == before, "the second time nothing is fetched"


def test_a_truncated_package_is_not_taken(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"left no whole .*; hub: .*\n?hint: make demo IMAGES=folder"):
        fetch.fetch(tmp_path / "cache")
    assert not (tmp_path / "cache" / "whole").exists()


def test_a_damaged_package_is_not_taken(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-40] + bytes(40))
    with pytest.raises(ValueError, match="dpkg-deb failed"):
        fetch.fetch(tmp_path / "cache")


def test_without_apt_and_hub_the_user_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetch, "_from_hub", no_hub)
    with pytest.raises(ValueError, match=r"no apt-get and dpkg-deb; hub: the hub cannot be reached.*") as raised:
        fetch.fetch(tmp_path / "cache")
    assert "IMAGES=folder" in str(raised.value)


def tar_bytes(count):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for number in range(count):
            for name, content in ((f"../x{number}.jpg", png("red")), (f"../x{number}.txt", b"Words.")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_the_first_pictures_of_a_stream(tmp_path):
    fetch.save_pictures(io.BytesIO(tar_bytes(5)), tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.jpg", "00000.txt", "00001.jpg", "00001.txt", "00002.jpg", "00002.txt"
    ]  # fmt: skip


def test_a_stream_that_breaks_off_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a whole uncompressed tar"):
        fetch.save_pictures(io.BytesIO(tar_bytes(5)[:3000]), tmp_path, 5)


def folder_of(path, count):
    path.mkdir()
    for number in range(count):
        (path / f"{number}.png").write_bytes(png("blue"))
    return path


def test_a_folder_needs_32_pictures(tmp_path):
    with pytest.raises(ValueError, match="images must hold at least 32 pictures .* has 31"):
        fetch.pictures_to_tars(str(folder_of(tmp_path / "few", 31)), tmp_path / "cache", tmp_path / "tars")
    assert fetch.pictures_to_tars(str(folder_of(tmp_path / "ok", 32)), tmp_path / "cache", tmp_path / "tars") == 32
    found = list(images.tar_pictures(tmp_path / "tars" / "00000.tar", images.Skipped()))
    assert len({picture.key for picture in found}) == 32


def test_an_interruption_leaves_no_tars(tmp_path, monkeypatch):
    def interrupted(pictures, folder, per_tar):
        folder.mkdir()
        (folder / "00000.tar").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "write_tars", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.pictures_to_tars(str(folder_of(tmp_path / "own", 40)), tmp_path / "cache", tmp_path / "tars")
    assert not (tmp_path / "tars").exists()
    assert fetch.pictures_to_tars(str(tmp_path / "own"), tmp_path / "cache", tmp_path / "tars") == 40
