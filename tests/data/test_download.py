"""Fetching shards from a hub of our own that drops connections, truncates, lies and refuses; and the check of tars."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest

from blip3o_fast.cli import main
from blip3o_fast.data import download as module
from blip3o_fast.data.download import Shard, chosen, download, list_shards, repository, shard_numbers
from blip3o_fast.data.verify import verify_tar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_tar(seed: int, pictures: int = 5) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for i in range(pictures):
            for suffix, data in ((".jpg", hashlib.sha256(b"%d %d" % (seed, i)).digest() * 400), (".txt", b"a caption")):
                member = tarfile.TarInfo(f"{seed:03d}{i:03d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return body.getvalue()


class Hub:
    """Enough of the hub: a set of tars, and faults: what happens to a file's next requests, one after the other."""

    def __init__(self) -> None:
        self.files = {f"{k:05d}.tar": make_tar(k) for k in range(3)} | {"README.md": b"a set"}
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = urlparse(self.path).path
                if path.startswith("/api/datasets/"):
                    return self.api(path)
                match = re.fullmatch(r"/datasets/(.+)/resolve/([^/]+)/(.+)", path)
                if match is None or match[3] not in hub.files:
                    return self.fail(404, {"X-Error-Code": "EntryNotFound"})
                name, data = match[3], hub.files[match[3]]
                hub.requests[name] += body
                fault = hub.fault(name, body)
                if fault and fault.isdigit():
                    return self.fail(int(fault))
                start = 0
                if given := self.headers.get("Range"):
                    hub.ranges.append(given)
                    start = int(re.match(r"bytes=(\d+)-", given)[1])
                rest = data[start:]
                if fault == "lies":
                    rest = bytes(len(rest))
                self.send_response(206 if start else 200)
                checksum = hashlib.sha256(data).hexdigest()
                for key, value in {
                    "X-Repo-Commit": COMMIT, "ETag": f'"{checksum}"', "X-Linked-Etag": f'"{checksum}"',
                    "X-Linked-Size": str(len(data)), "Content-Length": str(len(rest)), "Accept-Ranges": "bytes",
                }.items():  # fmt: skip
                    self.send_header(key, value)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if body:
                    self.wfile.write(rest[: len(rest) // 2] if fault == "drop" else rest)
                if fault == "drop":
                    self.wfile.flush()
                    self.connection.close()
                    self.close_connection = True

            def api(self, path: str) -> None:
                fault = hub.fault("api", True)
                if fault:
                    return self.fail(int(fault))
                if "/BLIP3o/" not in path and "/me/set" not in path:
                    return self.fail(404, {"X-Error-Code": "RepoNotFound"})
                tree = []
                for name, data in hub.files.items():
                    tree.append({"type": "file", "path": name, "size": len(data), "oid": "0" * 40})
                    if name.endswith(".tar"):
                        oid = hashlib.sha256(data).hexdigest()
                        tree[-1]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
                text = json.dumps(tree).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def fail(self, status: int, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fault(self, name: str, body: bool) -> str | None:
        waiting = self.faults.get(name)
        if not waiting or (not body and waiting[0] in ("drop", "lies")):  # these spoil a body
            return None
        return waiting.pop(0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants
    import huggingface_hub.file_download

    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.0, 0.0))
    yield made
    made.server.shutdown()
    made.server.server_close()


def whole(folder: Path) -> set[str]:
    """The tars under their final names; nothing else may lie there."""
    return {path.name for path in folder.iterdir()}


def test_shards_arrive_and_are_kept(hub, tmp_path):
    said = []
    paths = download("short-caption", "0-2", tmp_path, quiet=True, say=said.append)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"] and whole(tmp_path) == {
        *(path.name for path in paths)
    }
    for path in paths:
        assert path.read_bytes() == hub.files[path.name]
    assert len(said) == 3 and all("MB in" in line for line in said)
    download("short-caption", "1", tmp_path, quiet=True, say=said.append)
    assert hub.requests["00001.tar"] == 1 and said[-1].startswith("00001.tar: there already")
    (tmp_path / "00001.tar").write_bytes(b"something else")
    download("short-caption", "1", tmp_path, quiet=True)
    assert (tmp_path / "00001.tar").read_bytes() == hub.files["00001.tar"]
    download("short-caption", "1", tmp_path, quiet=True, force=True)
    assert hub.requests["00001.tar"] == 3


def test_a_dropped_connection_is_resumed_where_it_broke(hub, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.faults = {"00000.tar": ["drop", "drop"]}
    (path,) = download(shards="0", output_dir=tmp_path, quiet=True)
    assert path.read_bytes() == hub.files["00000.tar"]
    assert hub.ranges and all(not given.startswith("bytes=0-") for given in hub.ranges)


@pytest.mark.parametrize("fault", ["500", "503", "429"])
def test_a_hub_that_stumbles_is_asked_again(hub, tmp_path, fault):
    hub.faults = {"00000.tar": [fault, fault], "api": [fault]}
    (path,) = download(shards="0", output_dir=tmp_path, quiet=True)
    assert path.read_bytes() == hub.files["00000.tar"]


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"00000.tar": ["500"] * 40}, OSError, r"Short-Caption: 00000.tar: the hub"),
        ({"00000.tar": ["403"] * 40}, PermissionError, r"00000.tar: the hub refused \(403\)\nhint: hf auth login"),
        ({"api": ["500"] * 40}, OSError, r"BLIP3o/BLIP3o-Pretrain-Short-Caption: the hub answered 500"),
        ({"api": ["403"] * 40}, PermissionError, r"the hub refused \(403\)"),
        ({"00000.tar": ["lies"] * 40}, OSError, r"00000.tar arrived damaged and was dropped: its SHA-256 is"),
    ],
)
def test_what_never_works_is_an_error_that_names_it_and_leaves_no_tar(hub, tmp_path, faults, error, message):
    hub.faults = faults
    with pytest.raises(error, match=message):
        download(shards="0", output_dir=tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists() or not whole(tmp_path / "new")
    hub.faults = {}
    (path,) = download(shards="0", output_dir=tmp_path / "new", quiet=True)
    assert path.read_bytes() == hub.files["00000.tar"]


def test_one_that_fails_ends_the_others_and_keeps_what_is_whole(hub, tmp_path):
    hub.faults = {"00001.tar": ["403"] * 9}
    with pytest.raises(PermissionError, match="00001.tar"):
        download(shards="0,1", output_dir=tmp_path, quiet=True, workers=1)
    assert whole(tmp_path) == {"00000.tar"}


def test_no_network(hub, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="Short-Caption: the hub cannot be reached"):
        download(output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_bad_arguments_are_named(hub, tmp_path):
    with pytest.raises(
        ValueError, match=r"--shards: BLIP3o/.* has no shard 7, 9; it has 3, from 00000.tar to 00002.tar"
    ):
        download(shards="0,7,9", output_dir=tmp_path / "new")
    with pytest.raises(ValueError, match="the hub has no such set"):
        download("nobody/nothing", output_dir=tmp_path / "new")
    with pytest.raises(ValueError, match="--dataset must be one of short-caption, long-caption, journeydb, or"):
        repository("long")
    with pytest.raises(ValueError, match="--workers must be a whole number >= 1, got 0"):
        download(workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        download(output_dir=tmp_path / "file")
    assert not (tmp_path / "new").exists()


def test_numbers_of_shards():
    assert shard_numbers("0-2, 7,1") == [0, 1, 2, 7]
    for text in ("", "a", "3-1", "1-", "-1", "1;2"):
        with pytest.raises(ValueError, match="--shards must be numbers and ranges"):
            shard_numbers(text)


def test_sets_whose_tars_have_other_names_are_counted():
    shards = [Shard(name, 1, None) for name in ("a/x.tar", "a/y.tar", "b/x.tar")]
    assert [shard.name for shard in chosen(shards, [2, 0], "me/set")] == ["b/x.tar", "a/x.tar"]


def test_the_list(hub, capsys):
    assert [shard.name for shard in list_shards("me/set")] == ["00000.tar", "00001.tar", "00002.tar"]
    assert main(["download", "--list"]) == 0
    text = capsys.readouterr().out
    assert "00002.tar" in text and "3 shards" in text and "README" not in text


def test_as_the_originals_user_types_it(hub, tmp_path):
    command = [sys.executable, "-m", "blip3o_fast", "download", "--shard", "1", "--data_dir", "set"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "set" / "00001.tar").read_bytes() == hub.files["00001.tar"]
    assert "next: blip3o-fast extract --images set\n" in done.stdout


# ---- the check of tars -----------------------------------------------------------------------------------------------


def test_a_whole_tar(tmp_path, capsys):
    path = tmp_path / "00000.tar"
    path.write_bytes(make_tar(0))
    assert str(verify_tar(path)) == "whole: 10 members, 5 pictures, 5 captions"
    assert main(["download", "--verify", str(path)]) == 0
    assert main(["download", "--verify", "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("whole: 10 members") == 2


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 2048, 14000, 20000, -1, -512, -1024, -5000, -9000, -10240])
def test_a_tar_cut_anywhere_is_named(tmp_path, cut, capsys):
    path = tmp_path / "00000.tar"
    path.write_bytes(make_tar(0)[:cut])
    whole_size = len(make_tar(0).rstrip(b"\0")) + 1024
    if path.stat().st_size >= whole_size + 512:  # only padding behind the end mark is gone
        return
    with pytest.raises(ValueError, match=r"00000.tar: not a whole tar"):
        verify_tar(path)
    assert main(["download", "--verify", str(path)]) == 1
    assert "hint: 1 of 1 are damaged" in capsys.readouterr().err


def test_every_tar_of_the_folder_is_verified(tmp_path, capsys):
    for place in ("deep/er", ".incoming-x"):  # a set may have folders; what is still on its way is not looked at
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "00000.tar").write_bytes(make_tar(0))
    assert main(["download", "--verify", "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/deep/er/00000.tar: whole: 10 members, 5 pictures, 5 captions"
    ]
    one = tmp_path / "deep" / "er" / "00000.tar"
    assert main(["download", "--verify", str(tmp_path / "none.tar"), str(one)]) == 1
    told = capsys.readouterr()
    assert "none.tar: there is no such file" in told.err and f"{one}: whole" in told.out


def test_a_flipped_header_is_named(tmp_path):
    data = bytearray(make_tar(0))
    data[14 * 512 + 512 * 12 : 14 * 512 + 512 * 12 + 20] = b"\xff" * 20
    path = tmp_path / "00000.tar"
    path.write_bytes(bytes(data))
    try:
        verify_tar(path)  # bytes of a picture: nothing in a tar says what they should be
    except ValueError as error:
        assert "00000.tar: not a whole tar" in str(error)
    data[:20] = b"\xff" * 20
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="in its first header"):
        verify_tar(path)


@pytest.mark.parametrize("member", range(1, 10))
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, member):
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for k in range(10):
            info = tarfile.TarInfo(f"{k}.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    bent = bytearray(path.read_bytes())
    bent[member * (512 + 1024) + 100] ^= 7  # in the header's mode
    path.write_bytes(bent)
    with pytest.raises(
        ValueError, match=f"at byte {member * 1536} is no header; the last whole member is '{member - 1}.jpg'"
    ):
        verify_tar(path)


def test_nothing_to_verify(tmp_path, capsys):
    assert main(["download", "--verify", "--output_dir", str(tmp_path)]) == 2
    assert "holds no .tar to verify" in capsys.readouterr().err
    for flags in (["--shard", "1", "--shards", "2"], ["--data_dir", "a", "--output_dir", "b"]):
        assert main(["download", *flags]) == 2 and "give one of them" in capsys.readouterr().err
    assert main(["download", str(tmp_path / "a.tar")]) == 2
    assert "files are for --verify" in capsys.readouterr().err
