"""Large files in pieces: an upload that breaks goes on from where it was, and nothing half is ever taken."""

import http.client
import json
import os
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from starlette.requests import Request

from browser.pages.new import uploads
from browser.pages.new.upload_parts import ADDRESS, OLD_SECONDS, PieceUploads
from browser.pages.new.uploads import FileUploads, UploadLimits, claim_file, name_upload_folder
from browser.runs.runs import Runs
from modules.errors import OptionError
from tests.browser.serving import Served, serve_runs
from tests.browser.test_uploads import everything, picture
from tests.chromium import open_page
from tests.waiting import MILLISECONDS, PATIENCE, wait_for


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "roots").mkdir()
    with serve_runs(tmp_path / "roots") as served:
        yield served


def address(content: bytes, at: int | str, name: str = "a ü.png", **fields: Any) -> str:
    query = {
        "into": "set",
        "name": name,
        "size": len(content),
        "changed": "1700000000000",
        "at": at,
        **fields,
    }
    return f"{ADDRESS}?{urlencode(query)}"


def send(served: Served, content: bytes, at: int | str, length: int, **fields: Any) -> dict[str, Any]:
    """Send a piece as the page does; return what the server tells."""
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    begin = int(at) if str(at).isdecimal() else 0
    link.request(
        "POST", address(content, at, **fields), content[begin : begin + length], {"Origin": served.url}
    )
    answer = link.getresponse()
    told: dict[str, Any] = {**json.loads(answer.read()), "status": answer.status}
    link.close()
    return told


def test_pieces_become_the_file_also_after_a_break_and_a_new_server(tmp_path: Path) -> None:
    content = picture(tmp_path)
    third = len(content) // 3
    (tmp_path / "roots").mkdir()
    with serve_runs(tmp_path / "roots") as served:
        assert served.ask(address(content, 0)).json()["at"] == 0
        assert send(served, content, 0, third)["at"] == third
        assert send(served, content, 0, third)["at"] == third  # it came twice
        assert send(served, content, third + 1, third)["at"] == third  # one was lost
    with serve_runs(tmp_path / "roots") as served:
        assert served.ask(address(content, 0)).json()["at"] == third
        other = served.ask(address(content, 0, changed="1700000000001")).json()
        assert other["at"] == 0  # another version of the file
        link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        link.putrequest("POST", address(content, third))
        link.putheader("Origin", served.url)
        link.putheader("Content-Length", str(third))
        link.endheaders(content[third : third + 10])
        wait_for(lambda: served.ask(address(content, 0)).json()["at"] == third + 10)
        link.close()  # the network is gone
        assert [name for name in everything(tmp_path / "roots") if name.endswith("png")] == []
        wait_for(lambda: "at" in send(served, content, third + 10, 1))
        told = send(served, content, third + 11, len(content))
    assert (told["status"], "1 image" in told["words"]) == (200, True), told
    assert (tmp_path / "roots/set/a ü.png").read_bytes() == content
    assert everything(tmp_path / "roots") == ["set", "set/a ü.png"]


def test_more_than_was_announced_is_not_written_and_bad_content_leaves_nothing(
    served: Served, tmp_path: Path
) -> None:
    content = b"<script>" * 100
    part = len(content) // 2
    assert send(served, content, 0, part)["at"] == part
    refused = send(served, content, part, len(content))
    assert (refused["status"], "not an image that can be read" in refused["error"]) == (422, True)
    assert str(tmp_path) not in refused["error"]
    assert everything(tmp_path / "roots") == []

    content = picture(tmp_path)
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    link.request("POST", address(content, 0), content + b"more", {"Origin": served.url})
    assert link.getresponse().status == 200
    assert (tmp_path / "roots/set/a ü.png").read_bytes() == content


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"into": "../out"}, "out"),
        ({"name": "../a.png"}, "the character '/'"),
        ({"name": "a.exe"}, "only images, clips"),
        ({"size": 9 << 30}, "has more than 8 GiB"),
        ({"size": "1e9"}, "was sent without size"),
        ({"at": "-1"}, "was sent without at"),
    ],
)
def test_what_no_file_may_be_is_refused_before_a_byte_is_written(
    fields: dict[str, Any], reason: str, served: Served, tmp_path: Path
) -> None:
    content = picture(tmp_path)
    told = send(served, content, fields.pop("at", 0), 10, **fields)
    assert (told["status"], reason in told["error"]) == (422, True), told
    assert everything(tmp_path / "roots") == []


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_planted_link_is_not_written_through(served: Served, tmp_path: Path) -> None:
    content = picture(tmp_path)
    send(served, content, 0, 10)
    (part,) = (tmp_path / "roots/set").iterdir()
    part.unlink()
    part.symlink_to(tmp_path / "outside")
    assert "is in the way: remove it" in send(served, content, 0, 10)["error"]
    assert not (tmp_path / "outside").exists()


def test_what_was_begun_goes_after_a_day_and_its_folder_is_offered_again(
    served: Served, tmp_path: Path
) -> None:
    content = picture(tmp_path)
    day = date(2026, 11, 28)
    send(served, content, 0, 10, into="2026-11-28")
    (part,) = (tmp_path / "roots/2026-11-28").iterdir()
    assert name_upload_folder(tmp_path / "roots", day) == "2026-11-28"
    old = time.time() - OLD_SECONDS - 1
    os.utime(part, (old, old))
    send(served, content, 0, len(content), name="b.png", into="2026-11-28")
    assert everything(tmp_path / "roots") == ["2026-11-28", "2026-11-28/b.png"]
    assert name_upload_folder(tmp_path / "roots", day) == "2026-11-28-2"


def test_what_has_arrived_takes_no_further_room(tmp_path: Path) -> None:
    content = picture(tmp_path)
    (tmp_path / "set").mkdir()
    limited = FileUploads(Runs((tmp_path,)), UploadLimits(folder_bytes=len(content)))
    query = address(content, 0).partition("?")[2].encode()
    request = Request({"type": "http", "query_string": query})
    arriving = PieceUploads(limited).find(request)

    arriving.partial_path.write_bytes(content[:10])
    assert PieceUploads(limited).find(request) == arriving
    (tmp_path / "set" / "b.txt").write_bytes(b"1")
    with pytest.raises(OptionError, match="would have more than"):
        PieceUploads(limited).find(request)


def test_old_files_of_other_programs_stay(served: Served, tmp_path: Path) -> None:
    content = picture(tmp_path)
    send(served, content, 0, 10)
    other = tmp_path / "roots/set/.film.mp4.part"
    other.write_bytes(b"1")
    os.utime(other, (0, 0))
    send(served, content, 0, 10, name="b.png")
    assert other.exists()


def test_two_pages_do_not_write_one_file_at_a_time(served: Served, tmp_path: Path) -> None:
    content = picture(tmp_path)
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    link.putrequest("POST", address(content, 0))
    link.putheader("Origin", served.url)
    link.putheader("Content-Length", "100")
    link.endheaders(content[:10])
    wait_for(lambda: served.ask(address(content, 0)).json()["at"] == 10)
    refused = send(served, content, 10, 10)
    assert (refused["status"], "is also being uploaded from another page" in refused["error"]) == (503, True)
    link.close()


def test_a_folder_that_another_page_makes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    find = uploads.find_folder

    def make_after_first_look(runs: Runs, into: str) -> Path | None:
        found = find(runs, into)
        folder.mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(uploads, "find_folder", make_after_first_look)
    assert FileUploads(Runs((tmp_path,))).find_target("set") == folder


def test_a_page_sends_a_large_file_in_pieces_through_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("browser.pages.new.new_pages.PIECE_BYTES", 200_000)
    (tmp_path / "roots").mkdir()
    source = tmp_path / "large.png"
    source.write_bytes(picture(tmp_path))
    with serve_runs(tmp_path / "roots") as served, open_page(f"{served.url}/new") as page:
        breaks = iter([False, True, True, False, True])

        def pass_on(route: Any) -> None:
            if route.request.method == "POST" and next(breaks, False):
                route.abort()
            else:
                route.continue_()

        page.route("**/new/piece?*", pass_on)
        page.locator("#drop").set_input_files(source)
        page.get_by_role("button", name="Put them there").click()
        page.wait_for_url("**/new?*folder=*", timeout=PATIENCE * MILLISECONDS)
    assert list(breaks) == []
    (taken,) = (tmp_path / "roots").glob("*/large.png")
    assert taken.read_bytes() == source.read_bytes()


def test_an_upload_that_goes_on_next_week_is_joined_rightly(served: Served, tmp_path: Path) -> None:
    """What is old is removed when a piece arrives: not the file that this piece belongs to."""
    content = picture(tmp_path)
    half = len(content) // 2
    send(served, content, 0, half)
    send(served, content, 0, 10, name="other.png")
    for part in (tmp_path / "roots/set").iterdir():
        os.utime(part, (1e9, 1e9))
    assert send(served, content, half, len(content))["status"] == 200
    assert everything(tmp_path / "roots") == ["set", "set/a ü.png"]
    assert (tmp_path / "roots/set/a ü.png").read_bytes() == content


def test_a_clock_that_jumps_and_files_of_other_programs_lose_nothing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = picture(tmp_path)
    send(served, content, 0, 10)
    foreign = tmp_path / "roots/set/.theirs.0123456789abcdef.part"
    foreign.write_bytes(b"theirs")
    now = time.time()
    monkeypatch.setattr("browser.pages.new.upload_parts.time.time", lambda: now + 400 * OLD_SECONDS)
    assert send(served, content, 0, len(content), name="b.png")["status"] == 200
    assert send(served, content, 10, len(content))["status"] == 200
    assert everything(tmp_path / "roots/set") == [foreign.name, "a ü.png", "b.png"]


def test_two_servers_do_not_add_to_one_file_at_once(tmp_path: Path) -> None:
    """Each has its own memory: the claim is a file."""
    (tmp_path / "roots/set").mkdir(parents=True)
    content = picture(tmp_path)
    with serve_runs(tmp_path / "roots") as served:
        send(served, content, 0, 10)
        (part,) = (tmp_path / "roots/set").iterdir()
        with claim_file(tmp_path / "roots/set", part.name):  # as the other server does
            assert send(served, content, 10, len(content))["status"] == 503
        with claim_file(tmp_path / "roots/set", "A Ü.PNG"):  # another file of this name is judged
            assert send(served, content, 10, len(content))["status"] == 503
            assert not (tmp_path / "roots/set/a ü.png").exists()
        assert send(served, content, len(content), 0)["status"] == 200
    assert (tmp_path / "roots/set/a ü.png").read_bytes() == content
