"""A link to one run for a friend: what it shows, and that it opens nothing else."""

import os
import re
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from browser.core.page_access import COOKIE
from browser.pages.runs import shares
from browser.pages.runs.shares import DAY, Shares
from browser.runs.run_views import COMPARED_FOLDER
from modules.media.reading import video_frames
from modules.media.writing import write_png, write_video
from modules.text_files import read_safetensors_texts
from tests.browser.entering import enter
from tests.browser.serving import PNG, Served, serve_runs, write_run
from tests.browser.test_safe_clicks import list_addresses
from training.reports.history import History, history_path

TOKEN = "a-secret-word-of-letters"


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "user"))


def make_link(served: Served, name: str = "x", days: str = "7") -> str:
    """Make a link to a run as its page does; return its path."""
    made = enter(served, TOKEN).ask(served.of(name, "share"), "POST", f"days={days}", Origin=served.url)
    assert made.status == 200, made.text
    addresses = re.findall(rf'href="{served.url}(/shared/[^"]+)"', made.text)
    return str(addresses[-1])


def test_a_friend_sees_the_page_the_samples_and_the_files_of_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    write_run(folder, "x", 10, changed=[["seed", "1"], ["output_dir", str(folder)]])
    write_run(folder, "y", 4, None)
    with serve_runs(folder, token=TOKEN) as served:
        assert "Share with a friend" in enter(served, TOKEN).ask(served.of("x")).text
        link = make_link(served)
        page = served.ask(link)
        assert page.status == 200
        for shown in ("a &lt;b&gt;cat", "finished", "x.safetensors"):
            assert shown in page.text
        for hidden in (str(folder), "What next", "<form", "<pre", "/run/", "hx-", TOKEN, link[8:-1]):
            assert hidden not in page.text, hidden
        assert "refresh" not in page.headers
        assert served.ask(f"{link}sample/x_1.png").body == PNG
        assert served.ask(f"{link}x.safetensors").body == b"0123456789"
        running = served.ask(make_link(served, "y"))
        assert running.headers["refresh"] == "60"
        policy = running.headers["content-security-policy"]
        assert "img-src 'self' data:" in policy
        assert "frame-ancestors 'none'" in policy
        assert "frame-ancestors" not in running.text  # browsers warn of it there
        assert "connect-src" not in policy


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_a_shared_page_is_in_the_language_of_the_friend(code: str, tmp_path: Path) -> None:
    write_run(tmp_path, "x", 10)
    with serve_runs(tmp_path, token=TOKEN) as served:
        page = served.ask(make_link(served), Accept_Language=code).text
    assert "<code>sample/</code>" not in page  # each sample is the file itself
    for english in ("mostly noise", "written "):
        assert english not in page, english


def test_a_page_that_is_shared_names_no_folder_no_file_and_no_other_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    typed = {
        "learning_rate": "0.0001",
        "network_args": "0.5 True",
        "output_dir": "/home/anna/wedding",
        "sample_prompts": "private/prompts.txt",
        "network_weights": "other_run.safetensors",
        "config_file": "plan.toml",
    }
    write_run(folder, "x", 10, None, changed=[*typed.items()], unchanged=[["seed", "7"], ["resume", "state"]])
    history = History(history_path(folder, "x"), 1, 10)
    history.add(4, samples="000004", files={"1": "x_2.mp4"}, prompts={"1": "as in /home/anna/cat.png"})
    history.add(10, ended="ended by an error after step 10: no secret/data.toml", kind="bad")
    history.flush()
    compared = folder / COMPARED_FOLDER / "000_7_other-run.png"
    compared.parent.mkdir()
    compared.write_bytes(PNG)
    with serve_runs(folder, token=TOKEN) as served:
        link = make_link(served)
        text = served.ask(link).text
        for shown in ("--learning_rate", "0.5 True", "--seed", '<img src="./sample/x_1.png"'):
            assert shown in text, shown
        assert '<video src="./sample/x_2.mp4" aria-label="as in cat.png, step 4"' in text
        for hidden in ("anna", "wedding", "prompts", "other_run", "plan.toml", "resume", "secret", "disk"):
            assert hidden not in text, hidden
        address = f"{COMPARED_FOLDER}/{compared.name}"
        assert enter(served, TOKEN).ask(served.of("x", address)).status == 200
        assert served.ask(f"{link}{address}").status == 404


def test_a_link_opens_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("SECRET", encoding="utf-8")
    folder = tmp_path / "runs"
    write_run(folder, "x", 10)
    write_run(folder, "y", 10)
    with serve_runs(folder, token=TOKEN) as served:
        link = make_link(served)
        word = link.split("/")[2]
        for method, origin in (("GET", {}), ("POST", {"Origin": served.url})):
            for address in list_addresses(served, method):
                cookie = {"Cookie": f"{COOKIE}={word}"}
                answer = served.ask(address, method, "days=1" * (method == "POST"), **cookie, **origin)
                assert answer.status == 401, (method, address)
        assert served.ask(f"/?token={word}").status == 401
        for name in (
            "y.safetensors",
            "sample/y_1.png",
            "x-history.jsonl",
            "../secret.txt",
            "%2e%2e/secret.txt",
        ):
            answer = served.ask(f"{link}{name}")
            assert answer.status == 404, name
            assert "SECRET" not in answer.text
        assert served.ask(link, "POST", "days=1", Origin=served.url).status == 401
        assert served.ask(f"/shared/{word[:-1]}/").status == 401
        assert served.ask(f"/shared/%ff{word}/").status == 401


def test_links_end_and_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs", "x", 10)
    write_run(tmp_path / "runs", "y", 10)
    with serve_runs(tmp_path / "runs", token=TOKEN) as served:
        first, second, other = make_link(served), make_link(served, days="30"), make_link(served, "y")
        now = time.time()
        with monkeypatch.context() as later:
            later.setattr(shares.time, "time", lambda: now + 8 * DAY)
            assert [served.ask(link).status for link in (first, second, other)] == [401, 200, 401]
        back = enter(served, TOKEN).ask(served.of("x", "share"), "POST", "back=yes", Origin=served.url)
        assert "/shared/" not in back.text
        assert [served.ask(link).status for link in (first, second, other)] == [401, 401, 200]
        assert "ask for a new one" in served.ask(first).text
    with serve_runs(tmp_path / "runs", token=TOKEN) as served:  # they hold when the page is started again
        assert served.ask(other).status == 200


@pytest.mark.parametrize("days", ["0", "366", "-1", "x", "", "9" * 400, "0000000013999"])
def test_days_that_no_link_has_are_refused(days: str, tmp_path: Path) -> None:
    write_run(tmp_path, "x", 10)
    with serve_runs(tmp_path, token=TOKEN) as served:
        refused = enter(served, TOKEN).ask(
            served.of("x", "share"), "POST", f"days={days}&", Origin=served.url
        )
        assert (refused.status, "/shared/" in refused.text) == (422, False)
        assert "A link is valid for 1 to 365 days" in refused.text
        assert 'name="days"' in refused.text  # so that the next try needs no other page
    assert Shares().list_all() == []


LINK = '{"word": "w", "run": "r", "session": 1, "end": '


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", '[{"word": "w"}]', '[{"word": "w", "run": 1, "end": "x", "session": 1}]', "[" * 9000),
        *(f"[{LINK}{end}}}]" for end in ("Infinity", "NaN", "1e999", "9" * 400, "1e300", "-Infinity")),
        *(f"[{LINK}9e9}}]", f"[{LINK}{{}}}}]", f"[{LINK}1e10}}]".replace('"session": 1', '"session": "1"')),
    ],
)
def test_a_damaged_list_of_links_opens_nothing(text: str, tmp_path: Path) -> None:
    Shares().add("run", 1)
    path = tmp_path / "user" / "reelsmith" / shares.FILE
    path.write_text(text, encoding="utf-8")
    assert Shares().list_all() == []
    assert Shares().find("w") is None


def test_a_link_ends_when_another_run_of_this_name_begins(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    write_run(folder, "x", 10)
    with serve_runs(folder, token=TOKEN) as served:
        link = make_link(served)
        history = history_path(folder, "x")
        lines = history.read_text(encoding="utf-8").splitlines()
        history.write_text("\n".join([*lines, *lines[1:]]) + "\n", encoding="utf-8")  # it was resumed
        assert served.ask(link).status == 200
        assert '"session": 1,' in lines[0]
        other = lines[0].replace('"session": 1,', '"session": 2,')
        history.write_text("\n".join([other, *lines[1:]]) + "\n", encoding="utf-8")
        for address in (link, f"{link}sample/x_1.png", f"{link}x.safetensors"):
            answer = served.ask(address)
            assert (answer.status, answer.text) == (401, str(shares.ENDED)), address
        assert "/shared/" not in enter(served, TOKEN).ask(served.of("x")).text
        assert served.ask(make_link(served)).status == 200
        history.unlink()
        assert served.ask(link).status == 401


def test_a_clock_that_is_set_takes_no_link_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Shares().add("one", 7, 1)
    now = time.time()
    for moved in (now + 9 * DAY, now - 900 * DAY):
        with monkeypatch.context() as jump:
            jump.setattr(shares.time, "time", lambda moved=moved: moved)
            Shares().add("two", 7, 1)
            assert Shares().find(first.word) is None
    assert Shares().find(first.word) == first


def test_links_of_two_pages_at_once_are_all_kept(tmp_path: Path) -> None:
    """Each page has its own `Shares`; what one has answered, the other does not take away."""
    made: list[str] = []

    def make() -> None:
        own = Shares()
        made.extend(own.add("run", 1, 1).word for _ in range(10))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {share.word for share in Shares().list_all()} == set(made)
    assert len(made) == 40


def test_a_link_to_another_place_is_not_followed(tmp_path: Path) -> None:
    """Behind a saved file's name may be another run's file, or one below another root."""
    folder = tmp_path / "runs"
    write_run(folder, "x", 10)
    write_run(folder / "other", "y", 10)
    saved = folder / "x.safetensors"
    saved.unlink()
    saved.symlink_to(folder / "other" / "y.safetensors")
    sample = folder / "sample" / "x_1.png"
    sample.unlink()
    sample.symlink_to(folder / "other" / "sample" / "y_1.png")
    with serve_runs(folder, token=TOKEN) as served:
        link = make_link(served)
        assert [served.ask(f"{link}{name}").status for name in ("x.safetensors", "sample/x_1.png")] == [
            404,
            404,
        ]


def test_files_of_another_run_in_the_folder_are_not_shared(tmp_path: Path) -> None:
    write_run(tmp_path, "x", 10)
    write_run(tmp_path, "y", 10)
    history = History(history_path(tmp_path, "x"), 1, 10)
    history.add(11, saved="y.safetensors")
    history.flush()
    with serve_runs(tmp_path, token=TOKEN) as served:
        assert served.ask(f"{make_link(served)}y.safetensors").status == 404


def test_files_and_samples_are_sent_without_what_their_metadata_tell(tmp_path: Path) -> None:
    """The tensors, the frames and the length stay, and what is needed to load a file."""
    write_run(tmp_path, "x", 10)
    texts = {
        **{"ss_network_dim": "4", "ss_network_module": "networks.lora", "modelspec.title": "x"},
        **{"ss_dataset_dirs": '{"anna": 1}', "ss_tag_frequency": "anna", "ss_network_args": "/home/anna/x"},
    }
    tensors = {"a": torch.arange(600_000, dtype=torch.float32), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "x.safetensors", texts)
    history = History(history_path(tmp_path, "x"), 1, 10)
    samples = {"1": "x_1.png", "2": "x_2.mp4", "3": "x_3.wav"}
    history.add(10, samples="000010", files=samples, prompts=dict.fromkeys(samples, "a"))
    history.flush()
    folder = tmp_path / "sample"
    pixels = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    write_png(folder / "x_1.png", pixels, {"parameters": "anna, --dit /home/anna/x", "more": "anna" * 500})
    write_video(folder / "x_2.mp4", iter([pixels] * 4), 8, tags={"comment": "anna", "prompt": "anna"})
    wave = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    wave += (
        b"LIST" + struct.pack("<I", 16) + b"INFOICMT\x04\0\0\0anna" + b"data" + struct.pack("<I", 4) + b"1234"
    )
    (folder / "x_3.wav").write_bytes(b"RIFF" + struct.pack("<I", len(wave)) + wave)

    with serve_runs(tmp_path, token=TOKEN) as served:
        link = make_link(served)
        for name in ("x.safetensors", "sample/x_1.png", "sample/x_2.mp4", "sample/x_3.wav"):
            own = (tmp_path / name).read_bytes()
            assert b"anna" in own or name.endswith("png"), name
            sent = served.ask(f"{link}{name}")
            assert (sent.status, len(sent.body), b"anna" in sent.body) == (200, len(own), False), name
            part = served.ask(f"{link}{name}", Range="bytes=7-60")
            if name.startswith("sample/"):
                assert (part.status, part.body) == (206, sent.body[7:61])
                assert part.headers["content-range"] == f"bytes 7-60/{len(own)}"
            else:  # a training may replace it between two parts
                assert (part.status, part.body, part.headers["accept-ranges"]) == (200, sent.body, "none")
            (tmp_path / f"sent{Path(name).suffix}").write_bytes(sent.body)
    loaded = load_file(tmp_path / "sent.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    kept = {"ss_network_dim": "4", "ss_network_module": "networks.lora", "modelspec.title": "x"}
    assert read_safetensors_texts(tmp_path / "sent.safetensors") == kept
    with Image.open(tmp_path / "sent.png") as image:
        assert (np.asarray(image) == pixels).all()
        assert image.info == {}
    assert len(list(video_frames(tmp_path / "sent.mp4"))) == 4
    assert (tmp_path / "sent.wav").read_bytes().endswith(b"data\x04\0\0\x001234")


def test_a_part_is_sent_only_of_the_version_that_the_friend_has(tmp_path: Path) -> None:
    write_run(tmp_path, "x", 10)
    history = History(history_path(tmp_path, "x"), 1, 10)
    history.add(10, samples="000010", files={"1": "x_1.mp4"}, prompts={"1": "a"})
    history.flush()
    sample = tmp_path / "sample" / "x_1.mp4"
    first, second = (np.full((64, 64, 3), value, np.uint8) for value in (0, 200))
    write_video(sample, iter([first] * 4), 8)
    with serve_runs(tmp_path, token=TOKEN) as served:
        address = f"{make_link(served)}sample/x_1.mp4"
        old = served.ask(address)
        size = len(old.body)
        versions = {name: old.headers[name] for name in ("etag", "last-modified")}
        for version in versions.values():
            part = served.ask(address, Range="bytes=9-", If_Range=version)
            assert (part.status, part.body) == (206, old.body[9:])
        assert served.ask(address, Range="bytes=-5").body == old.body[-5:]
        assert served.ask(address, Range="bytes=9-2").body == old.body
        behind = served.ask(address, Range=f"bytes={size}-")
        assert (behind.status, behind.headers["content-range"]) == (416, f"bytes */{size}")

        write_video(sample, iter([second] * 4), 8)
        os.utime(sample, (2e9, 2e9))
        for version in versions.values():
            whole = served.ask(address, Range="bytes=9-", If_Range=version)
            assert whole.status == 200
            assert whole.body not in (old.body, old.body[9:])
