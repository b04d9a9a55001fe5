"""The page of the report: it shows the numbers of the JSON and runs nothing of what it shows."""

import re
from pathlib import Path
from typing import Any

import pytest

from modules.pages.page import share_page
from tests.browser import open_page
from tests.data_tools.report.making import (
    report,
    save_clip,
    save_copy,
    save_picture,
    save_still_clip,
    write_config,
)


def make_set(folder: Path) -> Path:
    for name in ("pictures", "clips"):
        (folder / name).mkdir()
    for seed in range(6):
        save_picture(folder / f"pictures/{seed}.png", seed, caption=f"a cat, {'red ' * seed}")
    save_copy(folder / "pictures/0.png", folder / "pictures/copy.jpg", (64, 48), caption="a cat,")
    (folder / "pictures/bad.png").write_bytes(b"damaged")
    save_clip(folder / "clips/a.mp4", 8, 11)
    save_still_clip(folder / "clips/night.mp4", 0, 9, caption=None)
    return write_config(
        folder,
        "image_directory = '{folder}/pictures'\nnum_repeats = 3",
        "video_directory = '{folder}/clips'\ntarget_frames = [5, 9]",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page, and the JSON written with it."""
    folder = tmp_path_factory.mktemp("set")
    path = folder / "page.html"
    return path, report(make_set(folder), "--output", str(path))


def test_a_shared_copy_of_the_page_names_no_folder(made: tuple[Path, dict[str, Any]]) -> None:
    path, _ = made
    share_page(path, path.with_name("shared.html"))

    given = path.with_name("shared.html").read_text(encoding="utf-8")
    assert str(path.parent) in path.read_text(encoding="utf-8")
    assert str(path.parent) not in given


def test_the_page_shows_the_numbers_of_the_json(made: tuple[Path, dict[str, Any]]) -> None:
    path, found = made
    with open_page(path) as page:
        assert page.problems == []
        tiles = page.locator(".tile b").all_inner_texts()
        keys = ("sources", "items", "items_per_epoch", "batches_per_epoch")
        assert tiles[:4] == [str(found[key]) for key in keys]
        assert tiles[5] == str(len(found["broken"])) == "1"
        rows = [row.split("\t") for row in page.locator(".tables tbody tr").all_inner_texts()]
        assert [[row[3], row[4], row[5], row[6], row[8]] for row in rows] == [
            [
                str(table[key])
                for key in ("sources", "items", "num_repeats", "items_per_epoch", "batches_per_epoch")
            ]
            for table in found["tables"]
        ]
        assert [float(row[7].split()[0]) for row in rows] == [
            round(table["share_percent"], 1) for table in found["tables"]
        ]
        items = [
            re.findall(r"(\d+) items?, (\d+) batch", text)
            for text in page.locator(".bucket").all_inner_texts()
        ]
        buckets = [bucket for table in found["tables"] for bucket in table["buckets"]]
        assert [(int(one), int(other)) for pairs in items for one, other in pairs] == [
            (bucket["items"], bucket["batches_per_epoch"]) for bucket in buckets
        ]
        notes = dict(
            line.rsplit("\n", 1) if "\n" in line else line.rsplit(" ", 1)
            for line in page.locator(".notes li").all_inner_texts()
        )
        captions = found["captions"]
        assert notes["captions"] == str(captions["total"])
        assert notes["captions missing"] == notes["missing"] == str(captions["missing"]) == "2"
        assert notes["captions empty"] == notes["empty"] == str(captions["empty"]) == "0"
        assert notes["captions that repeat another"] == str(captions["duplicates"]) == "1"
        assert notes["groups of near-duplicates"] == str(len(found["near_duplicates"])) == "1"
        assert notes["black"] == str(len(found["black"])) == "1"
        words = page.locator(".words .rows").all_inner_texts()
        assert [(text.split()[0], int(text.split()[-1])) for text in words] == [
            (one["word"], one["captions"]) for one in captions["frequent_words"]
        ]
        shown = page.locator("main, body").first.inner_text()
        for one in found["broken"]:
            assert one["reason"] in shown


@pytest.mark.parametrize(("most", "cards"), [(0, 0), (3, 3), (200, 10)])
def test_thumbnails_are_bounded_and_faults_come_first(tmp_path: Path, most: int, cards: int) -> None:
    path = tmp_path / "page.html"
    report(make_set(tmp_path), "--output", str(path), "--items", str(most))

    text = path.read_text(encoding="utf-8")

    assert text.count("<article") == cards
    assert ("Shown are 3 of 10" in text) == (most == 3)
    assert [name in re.findall(r"<h4>(\S+)</h4>", text) for name in ("bad.png", "night.mp4")] == [
        most > 0
    ] * 2
