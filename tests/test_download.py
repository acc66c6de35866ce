"""AdvertiseGen/download.sh against a server on loopback."""

import functools
import hashlib
import http.server
import io
import os
import shutil
import socket
import subprocess
import tarfile
import threading

import pytest
from conftest import ROOT

TRAIN = b'{"content": "a", "summary": "b"}\n' * 3
DEV = b'{"content": "c", "summary": "d"}\n' * 2

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or not (shutil.which("curl") or shutil.which("wget")),
    reason="download.sh needs bash, and curl or wget",
)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """Address and folder of a server that serves the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    """A folder with the script and the files of an earlier download."""
    folder = tmp_path / "AdvertiseGen"
    folder.mkdir()
    shutil.copy(ROOT / "AdvertiseGen" / "download.sh", folder)
    (folder / "train.json").write_text("earlier train\n")
    (folder / "dev.json").write_text("earlier dev\n")
    return folder


def archive(**files):
    """Bytes of a .tar.gz that holds AdvertiseGen/<name>.json for each name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"AdvertiseGen/{name}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def download(target, url, path=os.environ["PATH"]):
    environment = {
        **os.environ,
        "ADGEN_URL": url,
        "ADGEN_DEV_SHA256": hashlib.sha256(DEV).hexdigest(),
        "PATH": path,
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [shutil.which("bash"), str(target / "download.sh")],
        env=environment,
        cwd=target.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_nothing_changed(target, result, message):
    """The script failed with one line of its own that holds `message`, and left the folder as it was."""
    assert result.returncode != 0
    own_lines = [line for line in result.stderr.splitlines() if line.startswith("download.sh: ")]
    assert len(own_lines) == 1 and message in own_lines[0], result.stderr
    assert sorted(path.name for path in target.iterdir()) == ["dev.json", "download.sh", "train.json"]
    assert (target / "train.json").read_text() == "earlier train\n"
    assert (target / "dev.json").read_text() == "earlier dev\n"


def test_both_files_arrive_and_nothing_else(server, target):
    url, folder = server
    (folder / "data.tar.gz").write_bytes(archive(train=TRAIN, dev=DEV))
    result = download(target, f"{url}/data.tar.gz")
    assert result.returncode == 0, result.stderr
    assert (target / "train.json").read_bytes() == TRAIN
    assert (target / "dev.json").read_bytes() == DEV
    assert sorted(path.name for path in target.iterdir()) == ["dev.json", "download.sh", "train.json"]
    assert "train.json: 3 rows" in result.stdout


def test_an_address_that_is_not_found_changes_nothing(server, target):
    url, _ = server
    assert_nothing_changed(target, download(target, f"{url}/absent.tar.gz"), "could not fetch")


def test_a_server_that_does_not_answer_changes_nothing(target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/data.tar.gz"
        assert_nothing_changed(target, download(target, url), "could not fetch")


def test_a_truncated_archive_changes_nothing(server, target):
    url, folder = server
    whole = archive(train=os.urandom(20_000), dev=DEV)
    (folder / "data.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert_nothing_changed(target, download(target, f"{url}/data.tar.gz"), "not a whole .tar.gz")


def test_a_web_page_in_place_of_the_archive_changes_nothing(server, target):
    url, folder = server
    (folder / "data.tar.gz").write_text("<html>log in first</html>")
    assert_nothing_changed(target, download(target, f"{url}/data.tar.gz"), "not a whole .tar.gz")


def test_a_wrong_checksum_changes_nothing(server, target):
    url, folder = server
    (folder / "data.tar.gz").write_bytes(archive(train=TRAIN, dev=DEV + b"\n"))
    result = download(target, f"{url}/data.tar.gz")
    assert_nothing_changed(target, result, f"expected {hashlib.sha256(DEV).hexdigest()}")


def test_an_archive_without_the_training_rows_changes_nothing(server, target):
    url, folder = server
    (folder / "data.tar.gz").write_bytes(archive(dev=DEV))
    assert_nothing_changed(target, download(target, f"{url}/data.tar.gz"), "holds no AdvertiseGen/train.json")


def member(name, content=b"", mode=0o644, **fields):
    """A tar member and its content; `fields` are those of TarInfo."""
    found = tarfile.TarInfo(name)
    found.size, found.mode = len(content), mode
    for field, value in fields.items():
        setattr(found, field, value)
    return found, content


GOOD = [member("AdvertiseGen/train.json", TRAIN), member("AdvertiseGen/dev.json", DEV)]
FOLDER = member("AdvertiseGen/", type=tarfile.DIRTYPE, mode=0o755)
# What is wrong with an archive, and its members.
STRANGE = [
    ("a symbolic link", [member("AdvertiseGen/train.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), GOOD[1]]),
    (
        "a hard link",
        [GOOD[1], member("AdvertiseGen/train.json", type=tarfile.LNKTYPE, linkname="AdvertiseGen/dev.json")],
    ),
    ("setuid", [member("AdvertiseGen/train.json", TRAIN, 0o4755), GOOD[1]]),
    ("setgid", [member("AdvertiseGen/train.json", TRAIN, 0o2644), GOOD[1]]),
    ("the sticky bit", [member("AdvertiseGen/train.json", TRAIN, 0o1644), GOOD[1]]),
    ("a device", [member("AdvertiseGen/train.json", type=tarfile.CHRTYPE, devmajor=1, devminor=5), GOOD[1]]),
    ("a pipe", [member("AdvertiseGen/train.json", type=tarfile.FIFOTYPE), GOOD[1]]),
    ("a folder in place of a file", [member("AdvertiseGen/train.json", type=tarfile.DIRTYPE), GOOD[1]]),
    ("a link in place of the folder", [member("AdvertiseGen", type=tarfile.SYMTYPE, linkname="/tmp"), *GOOD]),
    ("a third file", [*GOOD, member("AdvertiseGen/run.sh", b"true")]),
    ("a file beside the folder", [*GOOD, member("train.json", TRAIN)]),
    ("a path that climbs", [*GOOD, member("AdvertiseGen/../../evil.json", TRAIN)]),
    ("an absolute path", [*GOOD, member("/AdvertiseGen/train.json", TRAIN)]),
    ("a file twice", [*GOOD, GOOD[0]]),
    ("a name with an escape character", [*GOOD, member("AdvertiseGen/\x1b[2J", TRAIN)]),
]


def archive_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for found, content in members:
            tar.addfile(found, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("members", [pytest.param(members, id=name) for name, members in STRANGE])
def test_an_archive_of_anything_but_two_plain_files_changes_nothing(members, server, target):
    url, folder = server
    (folder / "data.tar.gz").write_bytes(archive_of(members))
    result = download(target, f"{url}/data.tar.gz")
    assert_nothing_changed(target, result, "the two files AdvertiseGen/train.json and AdvertiseGen/dev.json")
    assert "\x1b" not in result.stderr
    assert sorted(path.name for path in target.parent.iterdir()) == ["AdvertiseGen", "served"]


def test_what_arrives_has_the_modes_of_any_new_file(server, target):
    url, folder = server
    members = [FOLDER, member("AdvertiseGen/train.json", TRAIN, 0o777), member("AdvertiseGen/dev.json", DEV, 0o000)]
    (folder / "data.tar.gz").write_bytes(archive_of(members))
    result = download(target, f"{url}/data.tar.gz")
    assert result.returncode == 0, result.stderr
    (target / "new").touch()
    assert {(target / name).stat().st_mode for name in ("train.json", "dev.json")} == {(target / "new").stat().st_mode}


def test_wget_serves_where_there_is_no_curl(server, target, tmp_path):
    if shutil.which("wget") is None:
        pytest.skip("wget is not installed")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("wget", "tar", "gzip", "mkdir", "mktemp", "rm", "mv", "dirname", "sha256sum", "wc"):
        (tools / name).symlink_to(shutil.which(name))
    url, folder = server
    (folder / "data.tar.gz").write_bytes(archive(train=TRAIN, dev=DEV))
    result = download(target, f"{url}/data.tar.gz", path=str(tools))
    assert result.returncode == 0, result.stderr
    assert (target / "dev.json").read_bytes() == DEV
    (folder / "data.tar.gz").unlink()
    (target / "dev.json").write_text("earlier dev\n")
    (target / "train.json").write_text("earlier train\n")
    assert_nothing_changed(target, download(target, f"{url}/data.tar.gz", path=str(tools)), "could not fetch")


def test_the_checksum_in_the_script_and_the_readme_is_adgens(shared):
    checksum = hashlib.sha256((shared / "AdvertiseGen" / "dev.json").read_bytes()).hexdigest()
    for name in ("download.sh", "README.md"):
        assert checksum in (ROOT / "AdvertiseGen" / name).read_text(encoding="utf-8")
