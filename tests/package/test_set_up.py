"""The file to double-click: downloads are checked, the build fits the card, the second start is offline."""

import contextlib
import hashlib
import http.server
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import set_up
from modules import environment
from modules.card_builds import BUILDS, read_amd_cards, select_for
from modules.environment import Build, find_cause, read_builds
from modules.errors import InstallationError, OptionError, UserError
from modules.nvidia_driver import NvidiaCard, explain_unseen_card, read_nvidia_cards
from tests.commands import ROOT
from tests.package.test_uv import ADDRESSES

COMMAND = (ROOT / "Reelsmith.command").read_text(encoding="utf-8")
BATCH = (ROOT / "Reelsmith.bat").read_bytes()
UNIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="a script of a Unix shell")


def card(capability: tuple[int, int], driver: str) -> NvidiaCard:
    return NvidiaCard("NVIDIA Card", driver, capability)


@pytest.mark.parametrize(
    ("system", "machine", "nvidia", "amd", "build"),
    [
        ("linux", "x86_64", [card((8, 9), "580.65.06")], [], "cu130"),
        ("win32", "AMD64", [card((7, 5), "581.15")], [], "cu130"),
        ("win32", "AMD64", [card((8, 6), "572.16")], [], "cu126"),
        ("linux", "x86_64", [card((6, 1), "580.65.06")], [], "cu126"),
        ("linux", "x86_64", [card((12, 0), "580.65.06"), card((6, 1), "580.65.06")], [], "cu130"),
        ("linux", "x86_64", [card((0, 0), "580.65.06")], [], "cu130"),
        ("linux", "x86_64", [], [0, 110000], "rocm"),
        ("linux", "x86_64", [], [0, 110003], "cpu"),  # graphics in a processor
        ("win32", "AMD64", [], [], "cpu"),
        ("darwin", "arm64", [], [], "mac"),
    ],
)
def test_the_build_fits_card_and_driver(
    system: str, machine: str, nvidia: list[NvidiaCard], amd: list[int], build: str
) -> None:
    assert select_for(system, machine, nvidia, amd).build == build


@pytest.mark.parametrize(
    ("nvidia", "system", "message"),
    [
        ([card((8, 6), "470.256.02")], "linux", "is 470.256.02, and NVIDIA Card needs 525 or later"),
        ([card((12, 0), "570.86")], "win32", "is 570.86, and NVIDIA Card needs 580 or later"),
        ([], "darwin", "a Mac with an Intel processor: there is no build of PyTorch"),
    ],
)
def test_a_machine_without_a_build_is_told_why(nvidia: list[NvidiaCard], system: str, message: str) -> None:
    with pytest.raises(InstallationError, match=message):
        select_for(system, "x86_64", nvidia, [])


def test_cards_are_read_from_what_the_drivers_list(tmp_path: Path) -> None:
    text = "NVIDIA RTX A, Ti, 580.65.06, 8.9\nOld, 470.1, [N/A]\nNVIDIA-SMI has failed\nNo, devices, found\n"
    assert read_nvidia_cards(text) == [
        NvidiaCard("NVIDIA RTX A, Ti", "580.65.06", (8, 9)),
        NvidiaCard("Old", "470.1", (0, 0)),
    ]
    for number, version in enumerate((0, 110000)):
        node = tmp_path / str(number)
        node.mkdir()
        (node / "properties").write_text(f"simd_count 4\ngfx_target_version {version}\n")
    assert read_amd_cards(tmp_path) == [0, 110000]
    assert read_amd_cards(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("driver", "cuda", "message"),
    [
        ("535.104", "13.0", r"driver is 535\.104, and torch 2\.13 with CUDA 13\.0 needs 580 or later"),
        ("580.65", None, "there is an NVIDIA card .NVIDIA Card., but torch 2.13 is a build without CUDA"),
        ("580.65", "13.0", "lists NVIDIA Card, but torch 2.13 with CUDA 13.0 sees no device"),
    ],
)
def test_a_card_that_torch_does_not_see_is_explained(
    monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, message: str
) -> None:
    monkeypatch.setattr("modules.nvidia_driver.find_nvidia_cards", lambda: [card((8, 9), driver)])
    assert re.search(message, explain_unseen_card("2.13", cuda) or "")
    monkeypatch.setattr("modules.nvidia_driver.find_nvidia_cards", list)
    assert explain_unseen_card("2.13", cuda) is None


def test_builds_are_those_of_pyproject() -> None:
    builds = read_builds()
    assert list(builds) == list(BUILDS)
    assert builds["cu130"] == Build("cu130", environment.TORCH, ADDRESSES["pytorch-cu130"])
    assert builds["mac"].index is None


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("  Caused by: failed to write: No space left on device (os error 28)", "is full"),
        ("error: There is not enough space on the disk. (os error 112)", "is full"),
        ("error: Failed to fetch: `https://x`\n  Caused by: dns error", "the package index does not answer"),
        ("NewConnectionError('Failed to establish a new connection')", "the package index does not answer"),
        ("ERROR: No matching distribution found for nothing", "^$"),
    ],
)
def test_what_an_installer_says_becomes_a_sentence(tmp_path: Path, said: str, sentence: str) -> None:
    (tmp_path / "bin").mkdir()
    assert re.search(sentence, find_cause(said, tmp_path / "bin" / "python"))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A folder in place of the checkout, and the builds that were installed there."""
    installed: list[tuple[str, bool]] = []

    def prepare(packages: list[str], build: Build, is_replacing: bool) -> Path:
        assert packages == ["pip"]
        installed.append((build.name, is_replacing))
        python = environment.get_python_path(tmp_path / ".venv")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        return python

    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "NOTE", tmp_path / ".reelsmith" / "build.txt")
    monkeypatch.setattr(set_up, "prepare_environment", prepare)
    monkeypatch.setattr("modules.card_builds.find_nvidia_cards", lambda: [card((8, 9), "580.65")])
    monkeypatch.setattr(sys, "platform", "linux")
    return installed


def test_the_build_is_announced_once_and_kept_until_another_one_is_asked_for(
    made: list[tuple[str, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up.set_up(None)
    said = capsys.readouterr().err
    assert "once: the build cu130 of torch (NVIDIA Card, driver 580.65)" in said
    assert re.search(rf"about 3.3 GB.*\n.*about 9 GB in {re.escape(str(tmp_path))}", said)
    set_up.set_up(None)
    assert capsys.readouterr().err == ""
    set_up.set_up("cpu")
    set_up.set_up(None)
    assert made == [("cu130", False), ("cu130", False), ("cpu", True), ("cpu", False)]


def test_a_build_that_was_replaced_by_half_is_replaced_again(
    made: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the torch of the build before would be kept, under the name of the new one."""
    set_up.set_up("cpu")
    full = set_up.prepare_environment

    def stop(**_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(set_up, "prepare_environment", stop)
    with pytest.raises(KeyboardInterrupt):
        set_up.set_up("cu130")
    monkeypatch.setattr(set_up, "prepare_environment", full)
    for _ in range(2):
        set_up.set_up(None)
    assert made == [("cpu", False), ("cu130", True), ("cu130", False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--build", "cpu", "update"], "--build: it chooses torch for the start, and update starts nothing"),
        (["upgrade"], "upgrade: unknown. Type update"),
        (["back"], "back: unknown. Type update"),
        (["update", "a.zip", "b.zip"], "update a.zip b.zip: unknown"),
    ],
)
def test_words_that_go_nowhere_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["set_up.py", *words])
    with pytest.raises(OptionError, match=message):
        set_up.main()


def test_a_build_goes_into_the_folder_even_if_another_environment_is_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[tuple[Path, bool]] = []

    def install(python: Path, packages: list[str], build: Build, is_replacing: bool) -> None:
        installed.append((python, is_replacing))
        python.parent.mkdir(exist_ok=True)
        python.touch()

    def create(folder: Path, may_inherit: bool) -> None:
        assert not may_inherit
        folder.mkdir()

    monkeypatch.setattr(environment, "_install", install)
    monkeypatch.setattr(environment, "create_environment", create)
    builds = read_builds()
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "another"))

    for is_replacing in (False, False, True):
        environment.prepare_environment(build=builds["cpu"], is_replacing=is_replacing)

    python = environment.get_python_path(tmp_path / ".venv")
    assert installed == [(python, False), (python, True)]


def test_an_environment_of_the_user_is_used_as_it_is(made: list[tuple[str, bool]], tmp_path: Path) -> None:
    python = environment.get_python_path(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert set_up.set_up(None) == python
    with pytest.raises(OptionError, match=r"\.venv is an environment of yours"):
        set_up.set_up("cpu")
    assert made == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_downloaded(
    made: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda _: usage._replace(free=2_500_000_000))
    with pytest.raises(InstallationError, match=r"has 2\.5 GB free, and the build cu130 takes about 9 GB"):
        set_up.set_up(None)
    assert made == []


def test_both_files_pin_one_uv_and_the_windows_one_has_its_line_ends() -> None:
    """cmd finds the labels of a file only if its lines end with CR and LF."""
    batch = BATCH.decode("ascii")
    assert batch.count("\r\n") == batch.count("\n")
    (of_unix,) = re.findall(r"(?m)^version=([\d.]+)$", COMMAND)
    (of_windows,) = re.findall(r"(?m)^set VERSION=([\d.]+)\r$", batch)
    assert of_unix == of_windows
    sums = [*re.findall(r"sum=([0-9a-f]{64}) ", COMMAND), *re.findall(r"SUM=([0-9a-f]{64})\r", batch)]
    assert len(set(sums)) == 4
    labels = set(re.findall(r"(?m)^:(\w+)", batch))
    assert set(re.findall(r"(?:goto|call) :?(\w+)", batch)) == labels
    # the file may be another one after an update: nothing of it is read then
    for line in batch.splitlines():
        if "set_up.py" in line:
            assert line.endswith("%* & pause & exit /b")
    assert os.access(ROOT / "Reelsmith.command", os.X_OK) or sys.platform == "win32"


class Server(http.server.BaseHTTPRequestHandler):
    """Serve one file, from where it is asked to begin, and stop after half of it once."""

    content = b""
    breaks = False
    starts: list[int]

    def do_GET(self) -> None:
        start = int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0)
        type(self).starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        end = len(self.content) // 2 if self.breaks else len(self.content)
        self.wfile.write(self.content[start:end])
        type(self).breaks = False

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that has a stand-in for uv's archive."""
    until = 'while [ "$1" != set_up.py ]; do shift; done'
    version = '[ "$1" = --version ] && echo "uv 0.0.0" && exit'
    text = (
        f'#!/bin/sh\n{version}\n[ "$1" = python ] && exit\n{until}\necho {shlex.quote(sys.executable)} "$@"\n'
    )
    content = text.encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        entry = tarfile.TarInfo("uv-any/uv")
        entry.size, entry.mode = len(content), 0o755
        archive.addfile(entry, io.BytesIO(content))
    Server.content, Server.breaks, Server.starts = packed.getvalue(), False, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def start(folder: Path, address: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Reelsmith.command in a folder, with the stand-in in place of uv."""
    folder.mkdir(exist_ok=True)
    text = re.sub("https://github.com/.*(?=/uv-)", address, COMMAND)
    text = re.sub("sum=[0-9a-f]{64}", f"sum={hashlib.sha256(Server.content).hexdigest()}", text)
    (folder / "Reelsmith.command").write_text(text.replace("--retry 3 ", ""), encoding="utf-8")
    return subprocess.run(
        ["sh", str(folder / "Reelsmith.command"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "no_proxy": "127.0.0.1", **environment},
    )


@UNIX_ONLY
@pytest.mark.skipif(shutil.which("curl") is None, reason="it needs curl")
def test_a_broken_download_goes_on_and_the_second_start_needs_no_network(tmp_path: Path, server: str) -> None:
    folder = tmp_path / "a b ü"
    Server.breaks = True
    first = start(folder, server)
    assert first.returncode == 1
    assert "uv could not be downloaded. Check the connection" in first.stderr
    second = start(folder, server, "update", "a b.zip")
    assert second.stdout == f"{sys.executable} set_up.py update a b.zip\n", second.stderr
    assert (
        f"(about 25 MB) and with it Python 3.12 (about 30 MB) from github.com into {folder}" in second.stderr
    )
    assert Server.starts == [0, len(Server.content) // 2]
    third = start(folder, "http://127.0.0.1:9")
    assert (third.stdout, third.stderr) == (f"{sys.executable} set_up.py\n", "")
    assert Server.starts[2:] == []


@UNIX_ONLY
@pytest.mark.skipif(shutil.which("curl") is None, reason="it needs curl")
def test_another_file_than_the_pinned_one_is_deleted_and_not_run(tmp_path: Path, server: str) -> None:
    folder = tmp_path / "folder"
    (folder / ".reelsmith").mkdir(parents=True)
    text = COMMAND.replace("https://github.com/astral-sh/uv/releases/download/$version", server)
    (folder / "Reelsmith.command").write_text(text, encoding="utf-8")
    done = subprocess.run(["sh", str(folder / "Reelsmith.command")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not uv 0." in done.stderr
    assert "deleted and not run" in done.stderr
    assert list((folder / ".reelsmith").iterdir()) == []


@UNIX_ONLY
@pytest.mark.skipif(shutil.which("curl") is None, reason="it needs curl")
def test_a_proxy_is_asked_and_no_network_is_one_sentence(tmp_path: Path, server: str) -> None:
    through = start(tmp_path / "a", "http://uv.invalid", http_proxy=server, no_proxy="")
    assert through.stdout == f"{sys.executable} set_up.py\n", through.stderr
    none = start(tmp_path / "b", "http://127.0.0.1:9")
    assert none.returncode == 1
    assert none.stderr.endswith("Check the connection and the room on the disk; the next start goes on.\n")


@UNIX_ONLY
def test_an_environment_that_exists_is_used_without_uv(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" "$REELSMITH_STARTED_IN"\n', encoding="utf-8")
    python.chmod(0o755)
    done = start(tmp_path, "http://127.0.0.1:9", "update")
    assert done.stdout == f"set_up.py update {Path.cwd()}\n"
    assert not (tmp_path / ".reelsmith").exists()


@UNIX_ONLY
@pytest.mark.skipif(shutil.which("curl") is None, reason="it needs curl")
@pytest.mark.parametrize("is_executable", [False, True])
def test_a_start_that_was_ended_while_uv_was_unpacked_is_done_by_the_next_one(
    tmp_path: Path, server: str, is_executable: bool
) -> None:
    """Earlier versions unpacked into the place itself: what is there beside the download may be half."""
    own = tmp_path / ".reelsmith"
    (own / "unpacked").mkdir(parents=True)
    (own / "uv").write_bytes(b"\x7fELF half")
    (own / "uv").chmod(0o755 if is_executable else 0o644)
    (own / "uv-0.11.28.part").write_bytes(Server.content)
    done = start(tmp_path, "http://127.0.0.1:9")
    assert done.stdout == f"{sys.executable} set_up.py\n", done.stderr
    assert [path.name for path in own.iterdir()] == ["uv"]


@UNIX_ONLY
@pytest.mark.skipif(shutil.which("curl") is None, reason="it needs curl")
def test_a_part_that_no_server_goes_on_with_is_downloaded_anew(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".reelsmith").mkdir()
    (tmp_path / ".reelsmith" / "uv-0.11.28.part").write_bytes(Server.content[:100])
    full = Server.do_GET

    def forget_where_to_begin(request: Server) -> None:
        del request.headers["Range"]
        full(request)

    monkeypatch.setattr(Server, "do_GET", forget_where_to_begin)
    done = start(tmp_path, server)
    assert done.stdout == f"{sys.executable} set_up.py\n", done.stderr


@UNIX_ONLY
@pytest.mark.skipif(shutil.which("curl") is None, reason="it needs curl")
@pytest.mark.parametrize("content", [b"\x7fELF half", b"", b"\n", b"# text\n", b"<html>login</html>\n"])
def test_a_uv_that_is_none_is_named_and_downloaded_again(content: bytes, tmp_path: Path, server: str) -> None:
    own = tmp_path / ".reelsmith"
    own.mkdir()
    (own / "uv").write_bytes(content)
    (own / "uv").chmod(0o755)
    without_network = start(tmp_path, "http://127.0.0.1:9")
    assert without_network.returncode == 1
    assert f"{own}/uv is damaged: it is downloaded again" in without_network.stderr
    assert "uv could not be downloaded. Check the connection" in without_network.stderr
    done = start(tmp_path, server)
    assert done.stdout == f"{sys.executable} set_up.py\n", done.stderr


@UNIX_ONLY
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--build", "nix"], "--build nix: there is no such build of torch. Type one of"),
        (["--build=nix"], "--build nix: there is no such build of torch. Type one of"),
        (["--build"], "--build nothing: there is no such build"),
        (["upgrade"], "upgrade: unknown. Type update, update NEW.zip, or nothing to start"),
    ],
)
def test_a_slip_is_told_before_anything_is_downloaded(tmp_path: Path, words: list[str], message: str) -> None:
    done = start(tmp_path, "http://127.0.0.1:9", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert not (tmp_path / ".reelsmith").exists()


def test_both_files_know_all_builds() -> None:
    assert f"{' | '.join(BUILDS)})" in COMMAND
    assert f"Type one of {', '.join(BUILDS)}" in COMMAND
    batch = BATCH.decode("ascii")
    assert f"in ({' '.join(BUILDS)}) do" in batch
    assert f"Type one of {', '.join(BUILDS)}." in batch


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"nix", b"\n"])
def test_a_note_that_is_damaged_is_no_environment_of_the_user(
    made: list[tuple[str, bool]], tmp_path: Path, content: bytes
) -> None:
    set_up.set_up(None)
    set_up.NOTE.write_bytes(content)
    set_up.set_up(None)
    assert made == [("cu130", False), ("cu130", True)]
    assert set_up.NOTE.read_text(encoding="utf-8") == "cu130"


def test_an_installation_that_was_killed_begins_anew_and_one_that_failed_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv and pip take half a package for whole if its list of files is there."""
    made: list[str] = []
    ends: list[BaseException | None] = [
        KeyboardInterrupt(),
        None,
        UserError("no answer"),
        None,
        KeyboardInterrupt(),
    ]

    def create(folder: Path, may_inherit: bool) -> None:
        made.append("environment")
        shutil.rmtree(folder, ignore_errors=True)
        python = environment.get_python_path(folder)
        python.parent.mkdir(parents=True)
        python.touch()

    def install(*_: object) -> None:
        made.append("packages")
        end = ends.pop(0)
        if end is not None:
            raise end

    monkeypatch.setattr(environment, "_install", install)
    monkeypatch.setattr(environment, "create_environment", create)
    build = read_builds()["cpu"]
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)

    def prepare(*packages: str) -> list[str]:
        made.clear()
        with contextlib.suppress(KeyboardInterrupt, UserError):
            environment.prepare_environment(packages=packages, build=build)
        return list(made)

    assert prepare() == ["environment", "packages"]  # killed
    assert prepare() == ["environment", "packages"]
    assert prepare() == []
    assert prepare("more") == ["packages"]  # failed
    assert prepare() == []
    assert prepare("more") == ["packages"]
    assert prepare("other") == ["packages"]  # killed
    ends.append(None)
    assert prepare("more") == ["environment", "packages"]
