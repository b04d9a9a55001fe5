"""The page Settings, and the bin that it empties."""

import errno
import html
import os
import re
import shlex
from pathlib import Path
from urllib.parse import urlencode

import cv2
import numpy as np
import pytest

from browser.core.bin_folder import BinFolder
from browser.core.options import BrowserOptions
from browser.core.qr_code import compute_cells, draw_svg
from browser.core.server_state import ServerSettings
from browser.core.tokens import PageToken
from modules.errors import OptionError, OutputError
from modules.script_options import parse_options
from tests.browser.serving import Answer, Served, python_of, serve_runs
from tests.chromium import open_page

ADDRESS = "http://192.168.178.23:8765/?token=Zk3vQ9xL_1a-B7cD2eF4gH5jK6mN8pR0"


def post(served: Served, what: str, **fields: str) -> Answer:
    return served.ask(f"/settings/{what}", "POST", urlencode(fields), Origin=served.url)


def shown_command(text: str) -> list[str]:
    """Return the words of the command that starts the page."""
    shown = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert shown is not None
    return shlex.split(html.unescape(re.sub(r"<!--.*?-->", "", shown[1])))


def test_the_command_starts_the_page_with_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    (tmp_path / "token.txt").write_text("a-secret-word-of-letters", encoding="utf-8")
    settings = ServerSettings(
        "0.0.0.0", 9000, PageToken("k3-v9-zz", tmp_path / "token.txt"), True, is_local=False, address=ADDRESS
    )
    with serve_runs(tmp_path / "my runs", models=tmp_path / "m", settings=settings) as served:
        text = served.ask("/settings").text

    words, begin = shown_command(text), shlex.split(python_of("tools/run_browser.py"))[-1]
    options, *_ = parse_options("", words[words.index(begin) + 1 :], BrowserOptions)
    assert options.folders == (tmp_path / "my runs",)
    assert (options.host, options.port, options.token) == ("0.0.0.0", 9000, tmp_path / "token.txt")
    assert (options.models, options.work, options.read_only) == (tmp_path / "m", False, False)
    assert "k3-v9-zz" not in text
    assert "Zk3vQ9xL" not in text
    assert 'role="img" aria-label="QR code of this page&#39;s address"' in text


def test_a_word_of_the_pages_own_is_not_typed_and_without_one_the_command_says_so(tmp_path: Path) -> None:
    own = ServerSettings(token=PageToken("secret-word", tmp_path / "page_token"))
    with serve_runs(tmp_path, settings=own) as served:
        text = served.ask("/settings").text
    assert not any("token" in word for word in shown_command(text) if word.startswith("--"))
    assert f"the word in {tmp_path / 'page_token'}" in re.sub("<.*?>", "", text)
    assert "secret-word" not in text
    with serve_runs(tmp_path) as served:
        text = served.ask("/settings").text
    assert "--no_token" in shown_command(text)
    assert "every account of this machine" in text


def test_a_local_page_says_how_a_phone_gets_in_and_has_no_code(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        text = served.ask("/settings").text
    assert "<svg" not in text
    assert "--host 0.0.0.0 --port 8765 --token" in text


def test_the_queue_is_started_and_paused_and_the_command_says_so(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        assert "Start the queue" in served.ask("/settings").text
        assert post(served, "work").headers["hx-redirect"] == "/settings"
        text = served.ask("/settings").text
        assert "Pause the queue" in text
        assert shown_command(text)[-1] == "--work"
        assert post(served, "pause").status == 200
        assert "paused: jobs wait" in served.ask("/settings").text
        assert post(served, "format").status == 404


def test_with_read_only_nothing_is_offered_or_done(tmp_path: Path) -> None:
    (tmp_path / "reelsmith-bin" / "x").mkdir(parents=True)
    with serve_runs(tmp_path, read_only=True) as served:
        text = served.ask("/settings?ask=empty").text
        assert "hx-post" not in text
        assert shown_command(text)[-1] == "--read_only"
        assert (
            post(served, "empty", mark=BinFolder(tmp_path / "reelsmith-bin").compute_checksum()).status == 403
        )
    assert (tmp_path / "reelsmith-bin" / "x").is_dir()


def test_the_bin_is_emptied_only_as_it_was_shown(tmp_path: Path) -> None:
    place = tmp_path / "reelsmith-bin"
    (place / "2026_a").mkdir(parents=True)
    (place / "2026_a" / "x.bin").write_bytes(b"12345")
    with serve_runs(tmp_path) as served:
        text = served.ask("/settings?ask=empty").text
        mark = re.search(r'name="mark" value="(\w+)"', text)
        assert mark is not None
        (place / "later").mkdir()
        answer = post(served, "empty", mark=mark[1])
        assert (answer.status, "has changed in the meantime" in answer.text) == (422, True)
        assert (place / "2026_a" / "x.bin").is_file()
        assert post(served, "empty", mark=BinFolder(place).compute_checksum()).status == 200
        assert "empty" in served.ask("/settings").text
    assert [*place.iterdir()] == []


def test_a_person_starts_the_queue_and_asks_for_the_code(tmp_path: Path) -> None:
    settings = ServerSettings(
        "0.0.0.0", 8765, PageToken("k3-v9-zz", tmp_path / "t"), True, is_local=False, address=ADDRESS
    )
    with serve_runs(tmp_path, settings=settings) as served, open_page(f"{served.url}/settings", 360) as page:
        page.get_by_role("button", name="Start the queue").click()
        page.wait_for_selector("button:text('Pause the queue')")
        page.get_by_text("Show the QR code").click()
        box = page.locator("svg.code").bounding_box()
        assert (box["width"] > 150, box["x"] + box["width"] <= 360) == (True, True)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.problems == []


def test_the_code_as_svg_has_the_cells_of_the_code() -> None:
    cells = compute_cells(ADDRESS)
    svg = draw_svg(ADDRESS, "a <b>")
    drawn = np.full(cells.shape, True)
    for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", svg):
        drawn[int(y), int(x)] = False

    assert (drawn == cells).all()
    assert 'aria-label="a &lt;b&gt;"' in svg
    image = (drawn * 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    assert cv2.QRCodeDetector().detectAndDecode(image)[0] == ADDRESS


# --- the bin


def test_what_is_taken_keeps_its_inner_paths_and_never_replaces_anything(tmp_path: Path) -> None:
    for name in ("a/x.bin", "b/x.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    bin_folder = BinFolder(tmp_path / "bin")

    folder = bin_folder.move_in("my <run>/../x", tmp_path, [tmp_path / "a" / "x.bin", tmp_path / "b"])

    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_my_run_.._x", folder.name)
    assert (folder / "a" / "x.bin").read_bytes() == b"123"
    assert (folder / "b" / "x.bin").read_bytes() == b"123"
    assert [(entry.size_bytes, entry.num_files) for entry in bin_folder.list_entries()] == [(6, 2)]
    (tmp_path / "a" / "x.bin").write_bytes(b"4567")
    again = bin_folder.move_in("my <run>/../x", tmp_path, [tmp_path / "a" / "x.bin"])
    assert sorted(path.read_bytes() for path in (tmp_path / "bin").rglob("x.bin*")) == [
        b"123",
        b"123",
        b"4567",
    ]
    assert again.parent == tmp_path / "bin"


def test_files_of_another_disk_go_into_the_second_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.pth").write_bytes(b"1")
    first, second = tmp_path / "root" / "bin", tmp_path / "models" / "bin"
    rename = Path.rename

    def rename_here(path: Path, target: Path) -> Path:
        if target.is_relative_to(first):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    link = os.link

    def link_here(path: Path, target: Path) -> None:
        if target.is_relative_to(first):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(path, target)

    monkeypatch.setattr(Path, "rename", rename_here)
    monkeypatch.setattr(os, "link", link_here)
    folder = BinFolder(first, second).move_in("models", tmp_path / "models", [tmp_path / "models" / "x.pth"])

    assert folder.parent == second
    assert not first.exists()
    (tmp_path / "models" / "y.pth").write_bytes(b"1")
    with pytest.raises(OutputError, match="is on a different disk than"):
        BinFolder(first).move_in("models", tmp_path / "models", [tmp_path / "models" / "y.pth"])
    assert (tmp_path / "models" / "y.pth").is_file()


def test_emptying_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_bytes(b"1")
    (tmp_path / "bin" / "a").mkdir(parents=True)
    (tmp_path / "bin" / "a" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "bin" / "link").symlink_to(tmp_path / "kept")
    bin_folder = BinFolder(tmp_path / "bin")
    with pytest.raises(OptionError, match="changed in the meantime"):
        bin_folder.empty("")

    assert bin_folder.empty(bin_folder.compute_checksum()) == 0

    assert (tmp_path / "kept" / "x").is_file()
    assert [*(tmp_path / "bin").iterdir()] == []
    (tmp_path / "linked").symlink_to(tmp_path / "kept")
    assert BinFolder(tmp_path / "linked").list_entries() == []
