"""The rows of the page New: files of a folder with captions, files that are left out, and small pictures."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from browser.core.short_names import short_digest
from browser.folders.folder_files import FolderFiles, LeftOut, list_uncaptioned
from browser.folders.thumbnails import Thumbnails
from browser.runs.runs import Runs
from tests.browser.serving import Answer, Served, serve_runs
from tests.chromium import open_page
from tests.data_tools.report.making import save_clip, save_image


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A folder with a captioned picture, one without a caption, a clip and a damaged picture."""
    folder = tmp_path / "roots/set"
    folder.mkdir(parents=True)
    save_image(folder / "a.png", 1, (100, 40), caption="a cat")
    save_image(folder / "b.png", 2, caption=None)
    save_clip(folder / "c.mp4", 3, 9, caption="")
    (folder / "d.png").write_bytes(b"nothing")
    with serve_runs(tmp_path / "roots") as served:
        yield served


def rows(served: Served, folder: Path) -> str:
    return FolderFiles(served.runs, read_only=False).address(folder)


def ask(served: Served, query: str = "count=24") -> dict[str, Any]:
    return dict(served.ask(f"{rows(served, served.runs.roots[0] / 'set')}items?{query}").json())


def post(served: Served, rest: str, **body: str) -> Answer:
    address = rows(served, served.runs.roots[0] / "set") + rest
    return served.ask(address, "POST", json.dumps(body), Origin=served.url)


def test_rows_have_sizes_captions_and_why_a_file_cannot_be_read(served: Served) -> None:
    news = ask(served)

    files = {file["pictures"][0]["name"]: file for file in news["files"]}
    assert list(files) == ["a.png", "b.png", "c.mp4", "d.png"]
    assert news["counts"] == {"": 4, "uncaptioned": 3}
    assert (files["a.png"]["size"], files["a.png"]["caption"]["text"]) == ([100, 40], "a cat")
    assert (files["c.mp4"]["frames"], files["c.mp4"]["caption"]["text"]) == (9, "")
    assert files["d.png"]["faults"] == ["is not an image that can be read, or it is damaged"]
    assert files["d.png"]["pictures"][0]["address"] is None
    image = served.ask(files["c.mp4"]["pictures"][0]["address"])
    assert (image.headers["content-type"], image.body[:3]) == ("image/jpeg", b"\xff\xd8\xff")


def test_filters_and_pages(served: Served) -> None:
    def names(query: str) -> list[str]:
        return [file["pictures"][0]["name"] for file in ask(served, query)["files"]]

    assert names("count=2&from=1") == ["b.png", "c.mp4"]
    assert names("count=9&only=uncaptioned") == ["b.png", "c.mp4", "d.png"]
    assert names("count=9&text=CAT") == ["a.png"]
    assert served.ask(f"{rows(served, served.runs.roots[0] / 'set')}items?from=x").status == 400


def test_a_caption_is_saved_undone_and_never_written_over(served: Served) -> None:
    path = served.runs.roots[0] / "set/b.txt"
    rest = f"caption/{short_digest('b.png')}"

    saved = post(served, rest, what="save", text="a hill", have="").json()
    assert (path.read_text(), saved["file"]["caption"]["text"]) == ("a hill", "a hill")
    refused = post(served, rest, what="save", text="mine", have="")
    assert (refused.status, path.read_text()) == (409, "a hill")
    post(served, rest, what="undo", have=saved["file"]["caption"]["mark"])
    assert not path.exists()
    assert post(served, "caption/0123", what="save", text="x", have="").status == 404


def test_files_without_a_caption_are_found_as_captions_are_read(tmp_path: Path) -> None:
    names = ["a.b.png", "both.png", "empty.png", "link.png", "none.png", "other.png"]
    captions = {"a.b.txt": "x", "both.txt": "", "both.caption": "x", "empty.txt": "", "other.caption": "x"}
    for name, text in captions.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")

    assert list_uncaptioned(tmp_path, names) == ["both.png", "empty.png", "link.png", "none.png"]


@pytest.mark.slow
def test_ten_thousand_captions_scroll_on_the_page_new(served: Served) -> None:
    folder = served.runs.roots[0] / "many"
    folder.mkdir()
    content = save_image(folder / "00000.png", 1, caption=None).read_bytes()
    for number in range(10_000):
        (folder / f"{number:05d}.png").write_bytes(content)
        (folder / f"{number:05d}.txt").write_text(f"picture {number}", encoding="utf-8")
    requests: list[str] = []
    with open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        page.on("request", lambda request: requests.append(request.url))
        page.get_by_role("button", name="Files", exact=True).click()
        page.wait_for_selector("text=00000.png")
        for share in (0.25, 0.5, 0.75, 1, 1):
            page.evaluate(f"scrollTo(0, {share} * document.body.scrollHeight)")
            page.wait_for_timeout(300)
        page.wait_for_selector("text=09999.png")
        assert page.locator(".file").count() < 200
        assert len(requests) < 400
        assert page.get_by_label("Caption of 09999.png").input_value() == "picture 9999"
        assert page.problems == []


def test_a_file_is_left_out_with_its_caption_and_put_back(served: Served) -> None:
    root = served.runs.roots[0]
    before = sorted(os.listdir(root / "set"))

    assert post(served, "move", what="out", name="a.png").json() == {"error": "", "left_out": ["a.png"]}
    assert sorted(os.listdir(root / "set")) == [name for name in before if not name.startswith("a.")]
    [kept] = (root / "reelsmith-bin/left out").iterdir()
    assert sorted(os.listdir(kept)) == ["a.png", "a.txt"]
    assert "1 left out" in served.ask(f"/new?folder={quote(str(root / 'set'))}").text
    save_image(root / "set/a.png", 5, caption=None)
    assert "already exists" in post(served, "move", what="back", name="a.png").json()["error"]
    (root / "set/a.png").unlink()
    assert post(served, "move", what="back", name="a.png").status == 200
    assert sorted(os.listdir(root / "set")) == before
    for name in ("../set/a.png", "/etc/passwd", "", "nothing.png"):
        assert post(served, "move", what="out", name=name).status == 422


@pytest.mark.parametrize(
    "linked", ["reelsmith-bin", "reelsmith-bin/left out", "reelsmith-bin/left out/{set}"]
)
def test_files_are_not_left_out_through_a_link_that_came_with_the_folder(
    served: Served, tmp_path: Path, linked: str
) -> None:
    root = served.runs.roots[0]
    (tmp_path / "elsewhere").mkdir()
    outside = save_image(tmp_path / "elsewhere/hid7x2.png", 7, caption=None)
    name = LeftOut(served.runs).find_storage(root / "set").name
    link = root / linked.replace("{set}", name)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside.parent)

    refused = post(served, "move", what="out", name="a.png")
    back = post(served, "move", what="back", name="hid7x2.png")

    assert (refused.status, back.status) == (422, 422)
    assert "is a link, or below one. Remove the link" in refused.json()["error"]
    assert os.listdir(outside.parent) == ["hid7x2.png"]
    assert (root / "set/a.png").is_file()
    assert "hid7x2" not in served.ask(f"/new?folder={quote(str(root / 'set'))}").text


def test_nothing_outside_the_roots_is_shown(served: Served, tmp_path: Path) -> None:
    outside = save_image(tmp_path / "secret.png", 7, caption="a secret")
    link = served.runs.roots[0] / "set/link.png"
    link.symlink_to(outside)
    (served.runs.roots[0] / "set/b.txt").symlink_to(tmp_path / "secret.txt")

    for path in (outside, link, served.runs.roots[0] / "set/../../secret.png"):
        assert served.ask(f"/new/picture?path={quote(str(path))}").status == 404
    assert "a secret" not in json.dumps(ask(served))
    [row] = [file for file in ask(served)["files"] if file["pictures"][0]["name"] == "link.png"]
    assert row["faults"] == ["it does not exist, or is outside the folders that are shown"]
    assert post(served, f"caption/{short_digest('b.png')}", what="save", text="x", have="").status == 400
    assert (tmp_path / "secret.txt").read_text() == "a secret"
    place = FolderFiles(Runs((tmp_path,)), read_only=False).address(tmp_path)
    assert served.ask(f"{place}items").json()["state"] == "gone"
    assert served.ask("/new/rows/zz/items").json()["state"] == "gone"
    assert served.ask("/new/picture?path=/etc/passwd").status == 404


def test_captions_in_another_encoding_are_not_edited_here(served: Served) -> None:
    (served.runs.roots[0] / "set/b.txt").write_bytes("Café".encode("cp1252"))
    [row] = [file for file in ask(served)["files"] if file["pictures"][0]["name"] == "b.png"]
    assert (row["caption"]["can_edit"], "not UTF-8" in row["caption"]["where"]) == (False, True)


def test_a_small_picture_of_a_transparent_one_is_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 30), (10, 20, 30, 0)).save(tmp_path / "clear.png")

    jpeg = Thumbnails().make({"path": str(tmp_path / "clear.png")}, 1)

    small = Image.open(io.BytesIO(jpeg))
    assert (small.mode, small.getextrema()) == ("RGB", ((255, 255),) * 3)


def test_a_picture_that_cannot_be_read_is_drawn_as_that(served: Served) -> None:
    for path in ("set/d.png", "set/c.mp4"):
        place = served.runs.roots[0] / path
        place.write_bytes(b"nothing")
        image = served.ask(f"/new/picture?path={quote(str(place))}")
        assert (image.status, image.headers["content-type"]) == (200, "image/svg+xml")
        assert "cannot be read" in image.text
        assert image.headers["cache-control"] == "no-store"
        chinese = served.ask(f"/new/picture?path={quote(str(place))}", Accept_Language="zh")
        assert "无法读取" in chinese.text
