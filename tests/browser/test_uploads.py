"""Files that are dropped on the page New: which are taken, and that nothing is left of the others."""

import asyncio
import errno
import http.client
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from urllib.parse import urlencode

import pytest
from PIL import Image

from browser.core.server import MAX_BYTES
from browser.core.short_names import short_digest
from browser.pages.generate.form_drafts import MAX_DRAFTS, Drafts
from browser.pages.new.uploads import (
    ADDRESS,
    FileUploads,
    UploadLimits,
    check_content,
    check_file_name,
    find_kind,
    name_upload_folder,
)
from browser.runs.runs import Runs
from modules.atomic_write import identify_machine, place_new
from modules.errors import OptionError, OutputError
from modules.output_files import fold_name
from tests.browser.serving import Answer, Served, serve_runs
from tests.data_tools.report.making import save_clip
from tests.waiting import PATIENCE, wait_for


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "roots").mkdir()
    with serve_runs(tmp_path / "roots") as served:
        yield served


def send(served: Served, name: str, content: bytes, into: str = "set", **headers: str) -> Answer:
    """Send a file as the page does."""
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    address = f"{ADDRESS}?{urlencode({'into': into, 'name': name}, errors='surrogatepass')}"
    link.request("POST", address, content, {"Origin": served.url, **headers})
    answer = link.getresponse()
    try:
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        link.close()


def everything(folder: Path) -> list[str]:
    """Return all files and folders below one. `rglob` fails if the server removes a folder meanwhile."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [str((Path(place) / name).relative_to(folder)) for name in (*folders, *files)]
    return sorted(found)


def picture(folder: Path) -> bytes:
    path = folder / "source.png"
    Image.frombytes("RGB", (450, 450), random.Random(1).randbytes(450 * 450 * 3)).save(path)
    return path.read_bytes()


def test_files_arrive_whole_in_a_new_folder_below_the_first_root(served: Served, tmp_path: Path) -> None:
    content = picture(tmp_path)
    clip = save_clip(tmp_path / "source.mp4", 3, 9).read_bytes()
    assert len(content) > MAX_BYTES  # more than other requests may have

    assert send(served, "a.png", content).status == 200
    assert send(served, "b.mp4", clip).status == 200
    answer = send(served, "a.txt", "eine Katze, ü".encode())

    folder = tmp_path / "roots/set"
    assert answer.json() == {"folder": str(folder), "words": "1 image, 1 clip, 1 without caption"}
    assert everything(folder) == ["a.png", "a.txt", "b.mp4"]
    assert ((folder / "a.png").read_bytes(), (folder / "b.mp4").read_bytes()) == (content, clip)
    assert send(served, "c.png", content, into=str(folder)).json()["folder"] == str(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a.png", "contains the character '/'"),
        ("..\\a.png", "contains the character"),
        ("C:a.png", "contains the character ':'"),
        ("a\0.png", "contains"),
        ("a\n.png", "contains"),
        ("\u202egnp.exe", "contains a control code"),
        (".a.png", "begins or ends with a dot"),
        ("a.png.", "begins or ends with a dot"),
        ("", "is empty"),
        ("con.png", "name of a device"),
        ("LPT1.txt", "name of a device"),
        ("x" * 201 + ".png", "more than 200 bytes"),
        ("run.toml", "only images, clips, audio files"),
        ("evil.py", "only images, clips, audio files"),
        ("a.html", "only images, clips, audio files"),
        ("prompts.txt", "only images, clips, audio files"),
        ("a", "only images, clips, audio files"),
        ("photo.PSD", "convert them to PNG"),
        ("a.zip", "unpack them"),
    ],
)
def test_a_name_that_could_do_harm_or_is_not_read_is_refused(
    name: str, reason: str, served: Served, tmp_path: Path
) -> None:
    answer = send(served, name, picture(tmp_path))

    assert answer.status == 422
    assert reason in answer.json()["error"]
    assert everything(tmp_path / "roots") == []


def test_heic_is_taken_or_refused_as_the_reader_here_can(served: Served) -> None:
    try:
        import pillow_heif  # noqa: F401, an optional package
    except ImportError:
        error = send(served, "photo.heic", b"x").json()["error"]
        assert "convert them to PNG, or `pip install pillow-heif`" in error
    else:
        assert find_kind("photo.heic") == "picture"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"<script>alert(1)</script>", "a.png is not an image that can be read"),
        ("a.png", b"", "a.png is empty"),
        ("a.mp4", b"\x00\x00\x00\x18ftypmp42" + b"\0" * 99, "a.mp4"),
        ("a.mp4", b"#EXTM3U\n/etc/passwd\n", "a.mp4"),
        ("a.wav", b"RIFF", "a.wav"),
        ("a.txt", "Caf\u00e9".encode("cp1252"), "a.txt is not UTF-8: save it as UTF-8"),
        ("a.txt", b"x" * 70_000, "a.txt has more than 64 KiB"),
        ("a.txt", b"a\0b", "it is not text"),
    ],
)
def test_content_is_judged_whatever_the_name_says(
    name: str, content: bytes, reason: str, served: Served, tmp_path: Path
) -> None:
    answer = send(served, name, content)

    assert (answer.status, reason in answer.json()["error"]) == (422, True), answer.text
    assert str(tmp_path) not in answer.json()["error"]
    assert everything(tmp_path / "roots") == []


def test_a_file_that_is_there_stays(served: Served, tmp_path: Path) -> None:
    send(served, "a.txt", b"first")

    answer = send(served, "A.TXT", b"second")

    assert "already exists" in answer.json()["error"]
    assert (tmp_path / "roots/set/a.txt").read_bytes() == b"first"


def test_a_new_folder_is_named_by_its_whole_path_too(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root,) = served.runs.root_folders
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("USERPROFILE", str(root.parent))
    for into in (f"{root}/whole", f"~/{root.name}/home"):
        assert send(served, "a.txt", b"x", into=into).json()["folder"] == f"{root}/{into.rpartition('/')[2]}"
    assert send(served, "a.txt", b"x", into=f"{root}/cache").status == 422


@pytest.mark.parametrize("into", ["../out", "..", "/tmp", "a/b", "cache", "link", ".hidden", "set\0"])
def test_no_file_goes_outside_or_into_a_folder_of_programs(into: str, served: Served, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "roots/link").symlink_to(tmp_path / "out")

    assert send(served, "a.txt", b"x", into=into).status == 422
    assert everything(tmp_path / "out") == []
    assert everything(tmp_path / "roots") == ["link"]


def test_a_broken_upload_leaves_nothing(served: Served, tmp_path: Path) -> None:
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    link.putrequest("POST", f"{ADDRESS}?into=set&name=a.png")
    link.putheader("Origin", served.url)
    link.putheader("Content-Length", "1000000")
    link.endheaders(b"x" * 5000)
    wait_for(lambda: everything(tmp_path / "roots"))
    assert any(name.endswith(".tmp") for name in everything(tmp_path / "roots"))
    link.close()

    wait_for(lambda: everything(tmp_path / "roots") == [], lambda: everything(tmp_path / "roots"))


def test_only_pages_of_this_server_send_files_and_none_if_it_only_reads(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        assert send(served, "a.txt", b"x", Origin="http://elsewhere").status == 403
    with serve_runs(tmp_path, read_only=True) as served:
        assert send(served, "a.txt", b"x").status == 403
        assert "Choose files" not in served.ask("/new").text
    assert everything(tmp_path) == []


def test_other_requests_stay_small(served: Served) -> None:
    body = "x" * (MAX_BYTES + 1)
    assert served.ask("/new/describe", "POST", body, Origin=served.url).status == 413


def test_limits_are_said_in_numbers(tmp_path: Path) -> None:
    runs = Runs((tmp_path,))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.txt").write_bytes(b"x" * 100)
    folder = tmp_path / "set"
    with pytest.raises(OptionError, match="already has 1 files"):
        FileUploads(runs, UploadLimits(files=1)).check_upload(folder, "b.txt", 1)
    with pytest.raises(OptionError, match="would have more than 0 GiB"):
        FileUploads(runs, UploadLimits(folder_bytes=120)).check_upload(folder, "b.txt", 30)
    with pytest.raises(OptionError, match="more than 8 GiB"):
        FileUploads(runs).check_upload(folder, "b.mp4", 9 << 30)
    with pytest.raises(OutputError, match=r"b\.mp4: the disk of .* has [\d.]+ [GT]B free"):
        FileUploads(runs, UploadLimits(spare_bytes=1 << 60)).check_upload(folder, "b.mp4", 1)


def test_folders_of_a_day_have_names_of_their_own(tmp_path: Path) -> None:
    day = date(2026, 11, 26)
    assert name_upload_folder(tmp_path, day) == "2026-11-26"
    (tmp_path / "2026-11-26").mkdir()
    assert name_upload_folder(tmp_path, day) == "2026-11-26-2"


@pytest.mark.parametrize("name", ["Käse 1.png", "console.png", "a.b.png", "日本.txt", "comma, (1).jpg"])
def test_usual_names_are_taken(name: str) -> None:
    check_file_name(name)
    assert find_kind(name) in ("picture", "caption")


@pytest.mark.parametrize(
    "into",
    [
        *("reelsmith-queue", "Reelsmith-Queue", "REELSMITH-QUEUE", "reel\u017fmith-queue", "REELSMITH-BIN"),
        *("Output", "\uff47enerated", "x-State", "x-\ufb06ate", "SAMPLE", "Cache", "Compare"),
    ],
)
def test_no_folder_that_a_disk_takes_for_one_of_ours_is_made(
    into: str, served: Served, tmp_path: Path
) -> None:
    answer = send(served, "queue.txt", b"python tools/download.py --list\n", into)

    assert answer.status == 422
    assert "folder that programs write into" in answer.json()["error"]
    assert everything(tmp_path / "roots") == []


@pytest.mark.parametrize("name", ["PROMPTS.txt", "prompt\u017f.txt", "\uff50rompts.txt", "Prompts.TXT"])
def test_no_file_that_a_disk_takes_for_a_described_one_is_taken(name: str, served: Served) -> None:
    assert send(served, name, b"a cat\n").status == 422


def test_a_file_that_a_disk_takes_for_another_one_replaces_nothing(served: Served) -> None:
    assert send(served, "sides.txt", b"a cat\n").status == 200
    for name in ("SIDES.txt", "\u017fides.txt", "side\uff53.txt"):
        assert "already exists" in send(served, name, b"a dog\n").text, name


def test_a_file_without_its_size_is_not_taken(served: Served, tmp_path: Path) -> None:
    for size in ("", "x", "\u0663", "9" * 20, "-1", "1.5"):
        request = FakeRequest({"into": "set", "name": "a.txt"}, {"content-length": size})
        answer = asyncio.run(FileUploads(served.runs).take(request))  # type: ignore[arg-type]
        assert answer.status_code == 422
    chunked = {"Origin": served.url, "Transfer_Encoding": "chunked"}
    address = f"{ADDRESS}?into=set&name=a.txt"
    assert "was sent without its size" in served.ask(address, "POST", "a cat", **chunked).text
    announced = served.ask(address, "POST", "a cat" * 100, **chunked, Content_Length="5")
    assert announced.status in (400, 422)
    assert everything(tmp_path / "roots") == []


class FakeRequest:
    """The parts of a request that an upload looks at before its body."""

    def __init__(self, query: dict[str, str], headers: dict[str, str]) -> None:
        self.query_params = query
        self.headers = headers


def test_dropped_files_are_decoded_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding: list[int] = []
    maximum: list[int] = []
    lock = threading.Lock()

    def decode(path: Path) -> None:
        with lock:
            decoding.append(1)
            maximum.append(len(decoding))
        time.sleep(0.02)
        with lock:
            decoding.pop()

    monkeypatch.setattr("browser.pages.new.uploads.first_frame", decode)
    threads = [threading.Thread(target=check_content, args=(tmp_path, "picture")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maximum == [1] * 6


@pytest.mark.parametrize("names", [("a.txt", "a.txt"), ("a.txt", "A.TXT"), ("\u00e4.txt", "a\u0308.txt")])
def test_of_two_files_of_one_name_at_once_one_is_taken_and_one_is_refused(
    served: Served, tmp_path: Path, names: tuple[str, str]
) -> None:
    for number in range(10):
        answers: dict[bytes, int] = {}
        contents = [b"one", b"two"]

        def drop(
            name: str, content: bytes, answers: dict[bytes, int] = answers, number: int = number
        ) -> None:
            answers[content] = send(served, name, content, into=f"set{number}").status

        threads = [threading.Thread(target=drop, args=pair) for pair in zip(names, contents, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (path,) = (tmp_path / f"roots/set{number}").iterdir()
        assert sorted(answers.values()) == [200, 422]
        assert answers[path.read_bytes()] == 200


def test_a_file_that_another_program_writes_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_content = FileUploads.validate_content

    def write_then(self: FileUploads, path: Path, folder: Path) -> None:
        validate_content(self, path, folder)
        (folder / path.name).write_text("theirs", encoding="utf-8")

    monkeypatch.setattr(FileUploads, "validate_content", write_then)
    (tmp_path / "roots").mkdir()
    with serve_runs(tmp_path / "roots") as served:
        answer = send(served, "a.txt", b"mine")
    assert answer.status == 422
    assert "File exists" in answer.json()["error"]
    assert everything(tmp_path / "roots") == ["set", "set/a.txt"]
    assert (tmp_path / "roots/set/a.txt").read_text(encoding="utf-8") == "theirs"


def test_a_file_that_goes_while_a_folder_is_measured_is_no_fault(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "roots/set"
    folder.mkdir()
    (folder / "goes.png").touch()
    full = Path.lstat

    def vanish(path: Path) -> os.stat_result:
        if path.name == "goes.png":
            path.unlink(missing_ok=True)
        return full(path)

    monkeypatch.setattr(Path, "lstat", vanish)
    assert send(served, "a.txt", b"mine").status == 200


def test_the_claim_of_a_killed_server_does_not_hold_for_ever(served: Served, tmp_path: Path) -> None:
    assert send(served, "a.txt", b"mine").status == 200  # the folder was swept
    folder = tmp_path / "roots/set"
    ended = subprocess.Popen(["true"] if os.name != "nt" else ["cmd", "/c", "exit"])
    ended.wait()
    claim = folder / f".{short_digest(fold_name('b.txt'))}.claim.00000000.tmp"
    claim.write_text(f"{identify_machine():08x}{ended.pid & 0xFFFFFF:06x}abcd", encoding="ascii")
    if os.name == "nt":
        os.utime(claim, (1e9, 1e9))  # no process can be asked for there
    assert send(served, "b.txt", b"mine").status == 200


@pytest.mark.skipif(os.name == "nt", reason="Windows renames without replacing")
def test_a_disk_without_second_names_replaces_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", reject)
    first, second, place = tmp_path / "1", tmp_path / "2", tmp_path / "place"
    first.write_text("one", encoding="utf-8")
    second.write_text("two", encoding="utf-8")
    place_new(first, place)
    with pytest.raises(FileExistsError):
        place_new(second, place)
    assert (place.read_text(encoding="utf-8"), second.read_text(encoding="utf-8")) == ("one", "two")
    with pytest.raises(FileNotFoundError):
        place_new(tmp_path / "none", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "place"]


def test_a_draft_that_a_set_clock_dates_oldest_is_kept(tmp_path: Path) -> None:
    drafts = Drafts(tmp_path)
    for number in range(MAX_DRAFTS):
        drafts.write(f"{number:016x}", {"prompt": [str(number)]})
        os.utime(tmp_path / "drafts" / f"{number:016x}.json", (4e9 + number, 4e9 + number))
    drafts.write("f" * 16, {"prompt": ["mine"]})
    assert drafts.read("f" * 16) == {"prompt": ["mine"]}
    assert len(list((tmp_path / "drafts").iterdir())) == MAX_DRAFTS
    assert drafts.read(f"{0:016x}") is None
