"""The program: it says where it listens, as a picture too, and ends when it is told to."""

import io
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest

from browser.core.options import BrowserOptions
from browser.core.qr_code import draw_code
from browser.core.serving import may_open_page, open_socket, select_folders
from browser.core.tokens import choose_account_port
from browser.runs.runs import Runs
from modules.errors import OptionError, OutputError
from modules.script_options import parse_options
from tests.browser.serving import serve_runs, write_run
from tests.commands import ROOT, run_python
from tests.waiting import PATIENCE


@pytest.mark.skipif(sys.platform == "win32", reason="no signal of this kind")
def test_it_prints_an_address_that_answers_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    write_run(tmp_path, "x")
    command = [sys.executable, str(ROOT / "tools" / "run_browser.py"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        name = r"127\.0\.0\.1" if sys.platform == "darwin" else r"[0-9a-f]{12}\.localhost"
        assert re.fullmatch(rf"http://{name}:\d+/\?token=[\w-]{{43}}", address)
        # browsers resolve names below localhost by themselves, Python does not
        address = re.sub("//[^:]+:", "//127.0.0.1:", address)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        bare = address.partition("?")[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            opener.open(bare, timeout=PATIENCE)
        with opener.open(address, timeout=PATIENCE) as opened:
            (root,) = re.findall('content="0;url=/(~.+)"', opened.read().decode())
        with opener.open(bare + root, timeout=PATIENCE) as answer:
            assert "<h2>x</h2>" in answer.read().decode()
        os.kill(process.pid, signal.SIGINT)
        message = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "1 run, 0 running. Ctrl-C ends this page" in message[1]


def test_a_port_that_is_taken_is_refused_with_a_free_one_and_the_usual_one_is_kept_if_it_can_be() -> None:
    with open_socket("127.0.0.1", 0) as taken, pytest.raises(OutputError) as caught:
        open_socket("127.0.0.1", taken.getsockname()[1])
    told = re.search(r"Port (\d+) is free", str(caught.value))
    assert told is not None
    open_socket("127.0.0.1", int(told[1])).close()

    with open_socket("127.0.0.1", None) as first, open_socket("127.0.0.1", None) as second:
        ports = first.getsockname()[1], second.getsockname()[1]
    assert ports[0] != ports[1]
    assert ports[1] != choose_account_port()
    with pytest.raises(OutputError, match=f"--host 192.0.2.1 --port {choose_account_port()} cannot be used"):
        open_socket("192.0.2.1", None)  # of no machine


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["page.html"], "is a file: pass a folder with runs in it"),
        (["--host", "0.0.0.0"], "secrets.token_urlsafe"),
        (["--host", "0.0.0.0", "--no_token"], "omit --no_token"),
        (["--token", "short.txt", "--no_token"], "--no_token"),
        (["--host", "0.0.0.0", "--token", "short.txt"], "without spaces. This makes one: python -c"),
        (["--host", "0.0.0.0", "--token", "none.txt"], "none.txt cannot be read: No such file"),
    ],
)
def test_refusals_say_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.html").write_text("", encoding="utf-8")
    Path("short.txt").write_text("a b", encoding="utf-8")

    with pytest.raises(OptionError, match=re.escape(message)):
        parse_options("", words, BrowserOptions)[0].read_token()


def test_the_output_folder_of_a_described_folder_need_not_exist_yet(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such folder"):
        parse_options("", [str(tmp_path / "output")], BrowserOptions)
    (tmp_path / "dataset.toml").write_text("[[datasets]]\n", encoding="utf-8")

    options, *_ = parse_options("", [str(tmp_path / "output")], BrowserOptions)

    runs = Runs(options.folders)
    assert (runs.root_folders, runs.list_all()) == ([tmp_path / "output"], [])
    assert not runs.is_below(tmp_path / "dataset.toml")


def test_without_a_folder_it_looks_into_this_one() -> None:
    assert parse_options("", [], BrowserOptions)[0].folders == (Path(),)


@pytest.mark.parametrize("place", ["home", "checkout"])
def test_in_the_home_folder_or_the_checkout_it_uses_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    home.mkdir()
    checkout.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    caplog.set_level("INFO")
    plain, *_ = parse_options("", [], BrowserOptions)

    places = select_folders(plain, tmp_path / place, checkout)

    assert places.folders == (home / "Reelsmith",)
    # a checkout's models are where its pages download them to
    assert places.models == (home / "Reelsmith" / "models" if place == "home" else Path("models"))
    assert not (home / "Reelsmith").exists()
    assert f"The folder is {home / 'Reelsmith'}, which is made when something is written." in caplog.text

    caplog.clear()
    assert select_folders(plain, tmp_path, checkout).folders == (Path(),)
    typed, *_ = parse_options("", [str(tmp_path / place)], BrowserOptions)
    assert select_folders(typed, tmp_path / place, checkout).folders == (tmp_path / place,)
    assert caplog.text == ""


def test_pages_of_a_root_that_does_not_exist_yet_are_shown(tmp_path: Path) -> None:
    root = tmp_path / "Reelsmith"
    with serve_runs(root) as served:
        for address in ("/", "/new", "/queue", "/generate", "/datasets", "/models", "/settings", "/machine"):
            assert served.ask(address).status == 200, address
        assert not root.exists()
        answer = served.ask("/settings/work", "POST", "", Origin=served.url)
        assert answer.status == 200
        assert (root / "reelsmith-queue").is_dir()


def test_the_page_is_opened_only_for_a_person_who_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "WAYLAND_DISPLAY", "REELSMITH_FROM_QUEUE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    options = BrowserOptions()
    assert may_open_page(options)
    assert not may_open_page(BrowserOptions(no_open=True))
    assert not may_open_page(BrowserOptions(host="0.0.0.0", token=Path("t")))
    monkeypatch.setenv("SSH_TTY", "/dev/pts/1")
    assert not may_open_page(options)
    monkeypatch.delenv("SSH_TTY")
    monkeypatch.setenv("REELSMITH_FROM_QUEUE", "1")
    assert not may_open_page(options)
    monkeypatch.delenv("REELSMITH_FROM_QUEUE")
    monkeypatch.delenv("DISPLAY")
    assert not may_open_page(options)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not may_open_page(options)


def test_the_browser_never_loads_torch() -> None:
    modules = "browser.core.server, browser.core.serving, browser.runs.run_views"
    code = f"import {modules}, sys; print('torch' in sys.modules)"

    assert run_python("-c", code, folder=ROOT).stdout == "False\n"


def test_the_picture_of_an_address_can_be_read() -> None:
    address = "http://192.168.178.23:8765/?token=Zk3vQ9xL_1a-B7cD2eF4gH5jK6mN8pR0"
    lines = re.sub(r"\033\[[\d;]*m", "", draw_code(address)).splitlines()
    halves = {" ": (255, 255), "\u2580": (0, 255), "\u2584": (255, 0), "\u2588": (0, 0)}
    cells = np.array([[halves[sign][half] for sign in line] for line in lines for half in (0, 1)], np.uint8)

    text, *_ = cv2.QRCodeDetector().detectAndDecode(cells.repeat(8, 0).repeat(8, 1))

    assert text == address
