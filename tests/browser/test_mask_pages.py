"""The page of masks: what it shows, what its keys do, what is undone, and what it refuses."""

import io
import json
import shutil
import struct
import sys
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.core.server_state import Site
from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import open_queue
from browser.jobs.render_worker import RenderWorker
from browser.pages.masks.mask_making import MaskMakingPages
from browser.pages.masks.mask_pages import DRAWN_ADDRESS, MAX_DRAWN_MASK_BYTES
from browser.pages.masks.mask_review import MaskConflictError, MaskReview
from browser.runs.runs import Runs
from data_tools.masks.places import METHOD_TEXT, find_mask_entry
from data_tools.masks.run import MaskOptions
from dataset.config import load_dataset_config
from dataset.sources.left_out import TableFolders
from modules.media.reading import read_mask
from modules.media.writing import write_png, write_video
from modules.script_options import parse_options
from project.files import write_project
from project.media import read_mask_folders
from project.new_options import NewOptions
from tests.browser.described_folders import describe
from tests.browser.serving import Answer, Served, serve_runs
from tests.chromium import open_page
from tests.commands import MAX_SECONDS
from tests.waiting import wait_for

WIDTH, HEIGHT = 64, 48


def save_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def save_mask(path: Path, is_made: bool = True) -> None:
    """Write a mask whose left half is white, as a program or a person would."""
    gray = np.zeros((HEIGHT, WIDTH), np.uint8)
    gray[:, : WIDTH // 2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, gray, {METHOD_TEXT: "the left"} if is_made else None)


def as_png(pixels: np.ndarray[Any, Any]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    return png.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures with masks, by a program and by a person, and one without, in a place with a blank."""
    folder = tmp_path / "root" / "a b ü"
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        save_image(folder / name, shade=60 + 60 * number)
    save_mask(folder / "masks" / "a.png")
    save_mask(folder / "masks" / "b.png", is_made=False)
    return folder


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serve_runs(folder.parent) as served:
        yield served


def item(served: Served, at: int = 0, folder: str = "a b ü") -> dict[str, Any]:
    return served.ask(f"/masks/item?{urlencode({'folder': folder, 'at': at})}").json()


def press(served: Served, what: str, shown: dict[str, Any], **changes: str) -> Answer:
    """Press a key at a picture. shown: as the page knows it."""
    body = {"folder": "a b ü", "id": shown.get("id", ""), "have": shown.get("mark", ""), **changes}
    return served.ask(f"/masks/{what}", "POST", json.dumps(body), Origin=served.url)


def draw(served: Served, shown: dict[str, Any], png: bytes, **changes: str) -> Answer:
    """Send a drawn mask."""
    query = urlencode({"folder": "a b ü", "id": shown["id"], "have": shown["mark"], **changes})
    return served.send(f"{DRAWN_ADDRESS}?{query}", png)


def pixels_of(folder: Path, name: str) -> np.ndarray[Any, Any]:
    return read_mask(folder / "masks" / name)[..., 0]


def test_each_picture_is_shown_with_its_mask_and_its_state(served: Served) -> None:
    items = [item(served, at) for at in range(4)]

    assert [(one["name"], one["state"], one["total"]) for one in items] == [
        ("a.png", "made", 3),
        ("b.png", "drawn", 3),
        ("c.png", "none", 3),
        ("c.png", "none", 3),  # behind the last one
    ]
    assert (items[0]["size"], items[2]["shots"][0]["mask"], items[0]["can_undo"]) == ([64, 48], "", False)
    [shot] = items[0]["shots"]
    image = Image.open(io.BytesIO(served.ask(shot["picture"]).body))
    mask = Image.open(io.BytesIO(served.ask(shot["mask"]).body))
    assert (image.format, image.size) == ("JPEG", (64, 48))
    assert mask.mode == "LA"
    assert np.asarray(mask)[0, [0, 31, 32, 63], 1].tolist() == [255, 255, 0, 0]


def test_without_scripts_the_page_has_pictures_masks_and_a_next_page(tmp_path: Path) -> None:
    for number in range(26):
        save_image(tmp_path / "many" / f"{number:02}.png")
    save_mask(tmp_path / "many" / "masks" / "25.png")
    with serve_runs(tmp_path) as served:
        first = served.ask("/masks?folder=many").text
        second = served.ask("/masks?folder=many&from=24").text

    assert (first.count("<li>"), first.count('class="mask"'), "from=24" in first) == (24, 0, True)
    assert (second.count("<li>"), second.count('class="mask"'), "from=" in second) == (2, 1, False)
    assert "made by a program" in second


def test_keys_accept_invert_and_throw_away_and_each_is_undone(served: Served, folder: Path) -> None:
    before = (folder / "masks" / "a.png").read_bytes()
    states, shares = [], []
    for what in ("accept", "invert", "remove"):
        changed = press(served, what, item(served)).json()
        states.append(changed["state"])
        if changed["mark"]:
            shares.append(pixels_of(folder, "a.png")[0, [0, 63]].tolist())
        assert press(served, "undo", {}).json()["state"] == "made"
        assert (folder / "masks" / "a.png").read_bytes() == before

    assert states == ["accepted", "drawn", "removed"]
    assert shares == [[255, 0], [0, 255]]
    refused = press(served, "undo", {})
    assert (refused.status, refused.json()["error"]) == (422, "There is nothing to undo.")


def test_undo_leads_back_to_the_picture_that_was_changed_last(served: Served, folder: Path) -> None:
    press(served, "remove", item(served, 0))
    press(served, "invert", item(served, 1))

    first = press(served, "undo", {}).json()
    second = press(served, "undo", {}).json()

    assert [(one["name"], one["state"]) for one in (first, second)] == [("b.png", "drawn"), ("a.png", "made")]
    assert pixels_of(folder, "b.png")[0, 0] == 255


def test_a_mask_that_has_changed_meanwhile_is_shown_and_not_touched(served: Served, folder: Path) -> None:
    shown = item(served)
    save_mask(folder / "masks" / "a.png", is_made=False)
    before = (folder / "masks" / "a.png").read_bytes()

    answer = press(served, "remove", shown)

    assert (answer.status, answer.json()["state"]) == (409, "drawn")
    assert "has changed since" in answer.json()["error"]
    press(served, "invert", item(served))
    (folder / "masks" / "a.png").write_bytes(before)
    assert press(served, "undo", {}).status == 422
    assert (folder / "masks" / "a.png").read_bytes() == before


def test_a_drawn_mask_is_the_pixels_that_were_sent_and_counts_as_drawn(served: Served, folder: Path) -> None:
    gray = np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH).astype(np.uint8)
    opaque = np.dstack([gray, gray, gray, np.full_like(gray, 255)])

    for at, pixels in ((0, gray), (2, opaque)):
        answer = draw(served, item(served, at), as_png(pixels))
        assert (answer.status, answer.json()["state"]) == (200, "drawn"), answer.text

    assert np.array_equal(pixels_of(folder, "a.png"), gray)
    assert np.array_equal(pixels_of(folder, "c.png"), gray)
    press(served, "undo", {})
    press(served, "undo", {})
    assert (item(served)["state"], item(served, 2)["state"]) == ("made", "none")


def claim_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    end = b"\x00\x00\x00\x00IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk
    return start + struct.pack(">I", zlib.crc32(chunk)) + end


WHITE = as_png(np.full((HEIGHT, WIDTH), 255, np.uint8))


@pytest.mark.parametrize(
    ("png", "message"),
    [
        (
            as_png(np.full((WIDTH, HEIGHT), 255, np.uint8)),
            "The mask has 48 × 64 pixels, the image 64 × 48.",
        ),
        (claim_size(60_000, 60_000), "not a readable PNG"),
        (claim_size(9000, 9000), "The mask has 9000 × 9000 pixels"),
        (WHITE[:-30], "not a readable PNG"),
        (b"\xff\xd8\xff\xe0 a JPEG", "not a readable PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable PNG"),
        (b"", "not a readable PNG"),
        (as_png(np.zeros((HEIGHT, WIDTH), np.uint8)), "nothing would be learned"),
    ],
    ids=["other size", "bomb", "large", "cut off", "JPEG", "SVG", "empty", "black"],
)
def test_what_is_no_mask_of_the_picture_is_refused(
    served: Served, folder: Path, png: bytes, message: str
) -> None:
    before = (folder / "masks" / "a.png").read_bytes()

    answer = draw(served, item(served), png)

    assert (answer.status, message in answer.json()["error"]) == (422, True), answer.text
    assert (folder / "masks" / "a.png").read_bytes() == before
    assert item(served)["can_undo"] is False


def test_requests_from_elsewhere_and_for_other_files_are_refused(served: Served, folder: Path) -> None:
    shown = item(served)
    files = sorted(path.name for path in folder.rglob("*"))
    for changes in (
        {"folder": ".."},
        {"folder": "a b ü/../.."},
        {"id": "../a"},
        {"id": ""},
        {"folder": "/etc"},
    ):
        assert press(served, "remove", shown, **changes).status == 404
        assert draw(served, shown, WHITE, **changes).status == 404
        query = urlencode({"folder": "a b ü", "id": shown["id"], "number": 0, **changes})
        assert served.ask(f"/masks/mask?{query}").status == 404
    for body in ("", "[]", "{", "null", '{"folder": 1}'):
        answer = served.ask("/masks/remove", "POST", body, Origin=served.url)
        assert answer.status in (400, 404)
    assert press(served, "other", shown).status == 404
    query = urlencode({"folder": "a b ü", "id": shown["id"], "have": shown["mark"]})
    assert served.send(f"{DRAWN_ADDRESS}?{query}", WHITE, Origin="http://evil.example").status == 403
    assert served.send(f"{DRAWN_ADDRESS}?{query}", bytes(MAX_DRAWN_MASK_BYTES + 1)).status == 413
    assert sorted(path.name for path in folder.rglob("*")) == files


def test_with_read_only_masks_are_shown_and_none_changes(folder: Path) -> None:
    with serve_runs(folder.parent, read_only=True) as served:
        page = served.ask(f"/masks?{urlencode({'folder': 'a b ü'})}").text
        assert "made by a program" in page
        assert 'data-key="a"' not in page
        assert press(served, "remove", item(served)).status == 403
        assert draw(served, item(served), WHITE).status == 403


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["masks", "masks/a.png", "masks/.before", "a.png"])
def test_what_leads_outside_is_neither_shown_nor_changed(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (outside / "place").mkdir(parents=True)
    save_mask(outside / "place" / "a.png")
    target = outside / "place" if "." not in name[1:] or name.endswith(".before") else outside / "place/a.png"
    path = folder / name
    if path.is_dir():
        path.rename(tmp_path / "away")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = {path: path.read_bytes() for path in outside.rglob("*.png")}

    with serve_runs(folder.parent) as served:
        shown = item(served)
        assert shown["shots"] == []
        assert "is outside the folders" in shown["fault"]
        for what in ("accept", "invert", "remove"):
            assert press(served, what, shown).status == 404
        assert draw(served, shown, WHITE).status == 404

    assert {path: path.read_bytes() for path in outside.rglob("*.png")} == before


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_no_mask_is_kept_behind_a_link_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "masks" / ".before").symlink_to(outside)
    with serve_runs(folder.parent) as served:
        shown = item(served)
        assert "is outside the folders" in shown["fault"]
        assert press(served, "remove", shown).status == 404
        assert draw(served, shown, WHITE).status == 404
    assert list(outside.iterdir()) == []


def test_a_clip_shows_its_first_middle_and_last_frame(folder: Path, served: Served) -> None:
    frames = [np.full((HEIGHT, WIDTH, 3), 20 * number, np.uint8) for number in range(10)]
    write_video(folder / "0.mp4", iter(frames), fps=8)
    for number in range(10):
        path = folder / "masks" / "0" / f"{number:06}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(
            path, np.full((HEIGHT, WIDTH), 25 * number, np.uint8), {METHOD_TEXT: "x"} if not number else None
        )

    shown = item(served)
    images = [Image.open(io.BytesIO(served.ask(one["picture"]).body)) for one in shown["shots"]]
    masks = [Image.open(io.BytesIO(served.ask(one["mask"]).body)) for one in shown["shots"]]

    assert (shown["name"], shown["state"], [one["number"] for one in shown["shots"]]) == (
        "0.mp4",
        "made",
        [0, 5, 9],
    )
    assert [np.asarray(one).mean() for one in images] == pytest.approx([0, 100, 180], abs=4)
    assert [np.asarray(one)[0, 0, 1] for one in masks] == [0, 125, 225]
    assert "not the mask of a clip" in draw(served, shown, WHITE).json()["error"]
    assert press(served, "accept", shown).json()["state"] == "accepted"
    assert press(served, "invert", item(served)).json()["state"] == "drawn"
    assert read_mask(folder / "masks" / "0" / "000009.png")[0, 0, 0] == 30


def test_masks_lie_where_the_dataset_says(folder: Path, served: Served) -> None:
    text = '[[datasets]]\nimage_directory = "."\nmask_directory = "others"\n'
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    save_mask(folder / "others" / "c.png")
    assert [item(served, at)["state"] for at in range(3)] == ["none", "none", "made"]
    (folder / "dataset.toml").unlink()
    save_mask(folder / "b-masklabel.png")
    assert [item(served, at)["state"] for at in range(3)] == ["none", "made", "none"]


def wait_on(page: Any, holds: Callable[[], bool]) -> None:
    wait_for(holds, page.locator("#review").inner_text, lambda seconds: page.wait_for_timeout(seconds * 1000))


def test_keys_and_brush_of_the_page(folder: Path, served: Served) -> None:
    with open_page(f"{served.url}/masks?{urlencode({'folder': 'a b ü'})}") as page:
        stands = page.locator("#mask-stands")
        done = page.locator("#mask-done")

        def shows(text: str) -> None:
            wait_on(page, lambda: text in stands.inner_text())

        shows("1 / 3 · a.png · made by a program")
        assert page.locator("#mask-list").count() == 0
        page.keyboard.press("a")
        shows("2 / 3 · b.png · drawn by hand")
        assert find_mask_entry(folder / "a.png").read_texts().keys() == {METHOD_TEXT, "mask_accepted"}
        page.keyboard.press("i")
        wait_on(page, lambda: "inverted 1" in done.inner_text())
        assert pixels_of(folder, "b.png")[0, 0] == 0
        page.keyboard.press("u")
        wait_on(page, lambda: "undone 1" in done.inner_text())
        assert pixels_of(folder, "b.png")[0, 0] == 255
        page.keyboard.press("ArrowRight")
        shows("3 / 3 · c.png · no mask")
        assert page.locator('[data-key="x"]').get_attribute("aria-disabled") == "true"
        said = page.locator("#mask-said")
        page.keyboard.press("a")
        assert said.inner_text().startswith("It has no mask: draw one with the brush (b)")
        page.keyboard.press("ArrowLeft")
        shows("2 / 3 · b.png")
        assert said.inner_text() == ""
        page.keyboard.press("ArrowRight")
        shows("3 / 3 · c.png")
        page.locator('[data-key="x"]').click(force=True)
        wait_on(page, lambda: said.inner_text().startswith("It has no mask"))
        page.locator("#mask-view").click()

        page.keyboard.press("b")
        canvas = page.locator("canvas.drawn")
        page.locator("#brush-size").fill("10")
        box = canvas.bounding_box()
        scale = box["width"] / WIDTH
        page.mouse.move(box["x"] + 10 * scale, box["y"] + 24 * scale)
        page.mouse.down()
        page.mouse.move(box["x"] + 50 * scale, box["y"] + 24 * scale, steps=3)
        page.mouse.up()
        canvas.focus()
        page.keyboard.press("Space")  # a dot where the brush is
        page.keyboard.press("Space")
        page.keyboard.press("z")
        page.keyboard.press("s")
        shows("3 / 3 · c.png · drawn by hand")

        drawn = pixels_of(folder, "c.png")
        assert drawn[24, [2, 10, 30, 50, 60]].tolist() == [0, 255, 255, 255, 0]
        assert drawn[[17, 31], 30].tolist() == [0, 0]

        page.keyboard.press("b")
        page.locator("#brush-erase").check()
        page.locator("canvas.drawn").focus()
        page.keyboard.press("Space")  # in the middle: 32, 24
        page.keyboard.press("Space")
        page.keyboard.press("Control+s")
        wait_on(page, lambda: "saved 2" in done.inner_text())
        assert pixels_of(folder, "c.png")[24, [20, 32, 45]].tolist() == [255, 0, 255]
        assert done.inner_text() == "accepted 1, inverted 1, undone 1, saved 2"
        assert page.problems == []


# --- the form that has masks made


def press_form(served: Served, button: str, **fields: str) -> Answer:
    body = urlencode({"folder": "a b ü", **fields})
    return served.ask(f"/new/masks/{button}", "POST", body, Origin=served.url)


@pytest.mark.slow
def test_masks_of_a_colour_are_made_in_the_queue_and_hand_drawn_ones_stay(
    folder: Path, served: Served
) -> None:
    save_image(folder / "c.png")
    Image.new("RGB", (20, 20), "#00ff00").save(folder / "green.png")
    drawn = (folder / "masks" / "b.png").read_bytes()
    assert press_form(served, "write", finder="colour", colour="00ff00", expand_pixels="0").status == 200
    end = time.monotonic() + MAX_SECONDS
    text = ""
    while '<span class="state">finished</span>' not in text and time.monotonic() < end:
        time.sleep(0.1)
        text = served.ask(f"/new/masks?{urlencode({'folder': 'a b ü', 'part': 'progress'})}").text

    assert "job 1 of the queue" in text
    assert pixels_of(folder, "green.png").min() == 255
    assert not (folder / "masks" / "c.png").exists()
    assert (folder / "masks" / "b.png").read_bytes() == drawn
    assert [item(served, at)["state"] for at in range(4)] == ["made", "drawn", "none", "made"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"what": "the cat; a  dog;"}, ["--what", "the cat", "--what", "a dog", "--model", "M/clipseg"]),
        ({"what": "--faces"}, ["--what=--faces", "--model", "M/clipseg"]),
        ({"finder": "watermark"}, ["--watermark", "--model", "M/clipseg"]),
        ({"finder": "background", "model": "x.onnx"}, ["--background", "x.onnx"]),
        ({"finder": "colour", "colour": "ff0000", "invert": "yes"}, ["--invert", "--colour", "ff0000"]),
        ({"finder": "colour", "mode": "add", "colour": "0000ff"}, ["--mode", "add", "--colour", "0000ff"]),
    ],
)
def test_the_form_of_masks_becomes_the_words_of_the_command(
    folder: Path, fields: dict[str, str], words: list[str]
) -> None:
    runs = Runs((folder.parent,))
    queue = open_queue(runs, read_only=True)
    site = Site(runs, queue, BackgroundJobs(queue), RenderWorker(queue), models=Path("M"))

    typed = MaskMakingPages(site).make_argv(folder, fields, is_dry_run=False)

    shown = [word.replace(f"{Path('M').absolute()}", "M").replace("\\", "/") for word in typed]
    assert shown == ["python", "tools/mask.py", ".", *words]
    parse_options("", [str(folder), *typed[3:]], MaskOptions)


def test_what_the_form_of_masks_cannot_do_is_said(served: Served) -> None:
    for what, fields, message in (
        ("write", {}, "Type what to find"),
        ("write", {"what": "a cat"}, "load the model first"),
        ("write", {"finder": "colour"}, "Type the color to find"),
        ("write", {"finder": "colour", "colour": "green"}, "in six hexadecimal digits"),
        (
            "write",
            {"finder": "colour", "colour": "00ff00", "threshold": "2"},
            "Found above 2: use a number from 0 to 1.",
        ),
        ("write", {"finder": "sky"}, "sky is not a way to find masks"),
        ("try", {"finder": "colour", "colour": "0f0f0f", "mode": "blend"}, "choose from the list"),
        ("go_on", {}, "There is nothing to continue."),
    ):
        answer = press_form(served, what, **fields)
        assert (answer.status, message in answer.text) == (422, True), answer.text
    assert press_form(served, "other").status == 404
    assert press_form(served, "write", folder="..").status == 404


def test_a_described_folder_offers_the_folders_of_its_dataset(folder: Path, served: Served) -> None:
    outer = describe(folder.parent / "outer")
    for name in ("one", "two"):
        save_image(outer / name / "a.png")
    tables = [f'[[datasets]]\nimage_directory = "{name}"\n' for name in ("one", "two")]
    (outer / "dataset.toml").write_text("".join(tables), encoding="utf-8")

    form = served.ask(f"/new/masks?{urlencode({'folder': outer})}").text
    chosen = served.ask(f"/new/masks?{urlencode({'folder': outer / 'two', 'outer': outer})}").text
    page = served.ask(f"/masks?{urlencode({'folder': outer})}").text

    assert [text.count(f'<option value="{outer / "two"}" selected') for text in (form, chosen)] == [0, 1]
    assert "Choose one of its folders" in page
    assert "learn by these masks" not in chosen  # there are none yet
    save_mask(outer / "two" / "a-masklabel.png")
    again = served.ask(f"/new/masks?{urlencode({'folder': outer / 'two', 'outer': outer})}").text
    assert "learn by these masks (1 of 1)" in again


SUBSETS = '[general]\nresolution = 64\n\n[[datasets]]\n\n[[datasets.subsets]]\nimage_dir = "."\n'
TABLES = '[[datasets]]\nimage_directory = "."\n'


@pytest.mark.parametrize("form", [TABLES, SUBSETS])
def test_a_tick_says_whether_the_training_learns_by_the_masks(
    form: str, folder: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(folder)
    monkeypatch.chdir(folder)  # where `run` works
    (folder / "cat.png").unlink()
    (folder / "dataset.toml").write_text(form, encoding="utf-8")
    shown = served.ask(f"/new/masks?{urlencode({'folder': folder})}").text
    assert "learn by these masks (2 of 3)" in shown
    assert 'name="learns" value="yes" checked' not in shown

    assert press_form(served, "learn", learns="yes").status == 200

    masks = {table.source.mask_directory for table in load_dataset_config(folder / "dataset.toml").datasets}
    assert [path.resolve() for path in masks if path] == [folder / "masks"]
    again = served.ask(f"/new/masks?{urlencode({'folder': folder})}").text
    assert 'name="learns" value="yes" checked' in again
    assert press_form(served, "learn").status == 200
    assert (folder / "dataset.toml").read_text(encoding="utf-8") == form


def test_the_first_drawn_mask_is_learned(folder: Path, served: Served) -> None:
    shutil.rmtree(folder / "masks")
    describe(folder)
    (folder / "cat.png").unlink()
    assert draw(served, item(served, 0), WHITE).status == 200
    assert 'mask_directory = "masks"' in (folder / "dataset.toml").read_text(encoding="utf-8")
    assert press_form(served, "learn").status == 200
    assert draw(served, item(served, 1), WHITE).status == 200
    assert "mask_directory" not in (folder / "dataset.toml").read_text(encoding="utf-8")  # as was chosen


def test_masks_that_a_job_has_made_are_learned(folder: Path, served: Served) -> None:
    shutil.rmtree(folder / "masks")
    describe(folder)
    for path in folder.glob("*.png"):
        path.unlink()
    Image.new("RGB", (20, 20), "#00ff00").save(folder / "green.png")
    with open_page(f"{served.url}/new?{urlencode({'folder': folder})}") as page:
        page.get_by_role("button", name="Masks", exact=True).click()
        page.locator("#mask-find").select_option("colour")
        page.locator("#mask-rgb").fill("00ff00")
        page.get_by_role("button", name="Make the masks").click()
        page.get_by_label("learn by these masks (1 of 1)").wait_for(timeout=60_000)
        wait_on_text(page, lambda: 'mask_directory = "masks"' in (folder / "dataset.toml").read_text("utf-8"))
        assert page.get_by_label("learn by these masks (1 of 1)").is_checked()
        page.get_by_label("learn by these masks (1 of 1)").uncheck()
        wait_on_text(page, lambda: "mask_directory" not in (folder / "dataset.toml").read_text("utf-8"))
        page.wait_for_timeout(500)
        assert not page.get_by_label("learn by these masks (1 of 1)").is_checked()
        assert page.problems == []


def wait_on_text(page: Any, holds: Callable[[], bool]) -> None:
    wait_for(holds, page.locator("#masks").inner_text, lambda seconds: page.wait_for_timeout(seconds * 1000))


def test_a_check_names_masks_that_nobody_uses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "dataset.toml").write_text(TABLES, encoding="utf-8")
    config = load_dataset_config(folder / "dataset.toml")
    (line,) = TableFolders(config).left_out_folders(config.datasets)
    assert 'its masks are not used. mask_directory = "masks" in the table of' in line


def test_a_new_description_keeps_the_masks(folder: Path) -> None:
    assert read_mask_folders(folder) == {}
    (folder / "dataset.toml").write_text(f'{TABLES}mask_directory = "masks"\n', encoding="utf-8")
    assert read_mask_folders(folder) == {folder: folder / "masks"}
    (folder / "dataset.toml").write_text(f'{SUBSETS}mask_directory = "masks"\n', encoding="utf-8")
    assert read_mask_folders(folder) == {folder: folder / "masks"}


def test_masks_that_were_drawn_before_the_first_description_are_learned(folder: Path, served: Served) -> None:
    shutil.rmtree(folder / "masks")
    assert draw(served, item(served, 0), WHITE).status == 200
    options = NewOptions.from_defaults(
        folder=folder,
        family="stable_diffusion",
        task="1.5",
        memory=12,
        trigger_word="ohwx",
        models=folder.parent,
    )
    write_project(options)
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    assert 'mask_directory = "masks"' in text
    assert read_mask_folders(folder) == {folder: folder / "masks"}

    (folder / "dataset.toml").write_text(text.replace('mask_directory = "masks"', ""), encoding="utf-8")
    assert read_mask_folders(folder) == {}  # as was chosen since


def test_masks_of_others_and_thrown_away_ones_are_left_to_their_owner(folder: Path) -> None:
    assert read_mask_folders(folder) == {}
    shutil.rmtree(folder / "masks")
    (folder / "masks" / ".before" / "cat.png").mkdir(parents=True)
    assert read_mask_folders(folder) == {}


class OneAtATime(OrderedDict[Any, Any]):
    """A dictionary that notices when a second thread changes it before the first one is done."""

    is_busy = False
    overlaps = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        type(self).overlaps += self.is_busy
        self.is_busy = True
        time.sleep(0.01)
        super().__setitem__(key, value)
        self.is_busy = False


def test_two_pages_that_load_pictures_at_once_change_the_kept_ones_in_turn(folder: Path) -> None:
    review = MaskReview(Runs([folder.parent]), _jpegs=OneAtATime())
    places = review.list_media(folder)
    assert len(places) > 1
    threads = [threading.Thread(target=review.read_picture, args=(place, 0)) for place in places * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert OneAtATime.overlaps == 0
    assert len(review._jpegs) == len(places)


def test_a_mask_that_another_server_has_drawn_first_is_not_replaced(folder: Path) -> None:
    """Both pages were shown a picture without a mask."""
    servers = [MaskReview(Runs([folder.parent])) for _ in range(2)]
    (place, *_) = [place for place in servers[0].list_media(folder) if place.mask is None]
    png = as_png(np.full((HEIGHT, WIDTH), 255, np.uint8))
    servers[0].draw(folder, place, png, "")
    with pytest.raises(MaskConflictError):
        servers[1].draw(folder, place, png, "")
    assert not (folder / ".masks.lock").exists()


def test_a_typed_color_stays_while_the_form_is_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    save_image(folder / "a.png")
    query = urlencode({"folder": folder, "part": "form", "finder": "colour", "colour": "12ab34"})
    with serve_runs(tmp_path) as served:
        assert 'name="colour" value="12ab34"' in served.ask(f"/new/masks?{query}").text


def test_a_job_that_waits_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "pictures" / "a.png")
    queue = open_queue(Runs([tmp_path]), read_only=False)
    monkeypatch.setattr(queue, "begin_work", lambda *_, **__: None)
    fields = {"folder": str(tmp_path / "pictures"), "finder": "colour", "colour": "00ff00"}
    asked = f"/new/masks?{urlencode({'folder': fields['folder'], 'part': 'progress'})}"
    with serve_runs(tmp_path, queue=queue) as served:
        assert served.ask("/new/masks/write", "POST", urlencode(fields), Origin=served.url).status == 200
        assert "the queue is paused" in served.ask(asked).text
        with monkeypatch.context() as changed:
            changed.setattr(type(queue), "worker", "here")
            assert "starts when the jobs before it have ended" in served.ask(asked).text
            queue.problem = "Generate is generating result 7: the job begins after it"
            shown = served.ask(asked).text
    assert "Generate is generating result 7: the job begins after it" in shown
    assert "the queue is paused" not in shown
