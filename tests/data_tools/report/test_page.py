"""The page of the report: it shows the numbers of the JSON and runs nothing of what it shows."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser.runs.run_views import share_page
from data_tools.report.check import check_caching
from data_tools.report.findings import TableFindings
from data_tools.report.looks import draw_crop, inspect_and_draw
from data_tools.report.page import CHECK_SIZES, select_sources, write_check_page
from dataset.config import DatasetConfig
from dataset.listing import find_sources
from dataset.sources.media_source import Fault, MediaSource
from modules.media.buckets import fit_cover
from tests.chromium import open_page
from tests.data_tools.report.making import (
    report,
    save_clip,
    save_copy,
    save_image,
    save_still_clip,
    write_config,
)
from tests.dataset.making import make_clip, make_image, make_table
from tests.dataset.toy_family import LATENT, ToyFamily


def make_set(folder: Path) -> Path:
    for name in ("pictures", "clips"):
        (folder / name).mkdir()
    for seed in range(6):
        save_image(folder / f"pictures/{seed}.png", seed, caption=f"a cat, {'red ' * seed}")
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
        keys = ("sources", "items", "num_repeats", "items_per_epoch", "batches_per_epoch")
        rows = [row.split("\t") for row in page.locator(".tables tbody tr").all_inner_texts()]
        for row, table in zip(rows, found["tables"], strict=True):
            assert [row[place] for place in (3, 4, 5, 6, 8)] == [str(table[key]) for key in keys]
            assert float(row[7].split()[0]) == round(table["share_percent"], 1)
        shown = "\n".join(page.locator(".bucket").all_inner_texts())
        buckets = [bucket for table in found["tables"] for bucket in table["buckets"]]
        assert re.findall(r"(\d+) items?, (\d+) batch", shown) == [
            (str(bucket["items"]), str(bucket["batches_per_epoch"])) for bucket in buckets
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


def test_thumbnails_are_bounded_and_faults_come_first(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    full, path = made[0].read_text(encoding="utf-8"), tmp_path / "page.html"
    report(made[0].with_name("data.toml"), "--output", str(path), "--items", "3")

    text = path.read_text(encoding="utf-8")

    assert (text.count("<article"), full.count("<article")) == (3, 10)
    assert ("Shown are 3 of 10" in text, "Shown are" in full) == (True, False)
    assert {"bad.png", "night.mp4"} < set(re.findall(r"<h4>(\S+)</h4>", text))


HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=alert(2)> {{ 7 * 7 }} </p></style> \u202e"


def write_page(folder: Path, config: DatasetConfig, maximum: int = 500) -> Path:
    family = ToyFamily()
    result = check_caching(family, config, 1, False, parts=["media", "latents", "texts"])
    path = folder / "check.html"
    write_check_page(path, config, result, LATENT, 16.0, maximum, workers=1)
    return path


def make_config(folder: Path, **changes: object) -> DatasetConfig:
    table = make_table(folder, caption_extension=".txt", target_frames=(5, 9), **changes)
    return DatasetConfig(table.config_path, (table,))


def test_the_page_says_what_is_cut_off_and_left_out_and_runs_nothing(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(3)>'\"&{{1}}"
    make_clip(tmp_path / f"{name}.mp4", 7, (64, 32))
    (tmp_path / f"{name}.txt").write_text(HOSTILE + " and more", encoding="utf-8")
    make_clip(tmp_path / "bad\u202e.mp4", 9)
    (tmp_path / "bad\u202e.txt").write_bytes("<b>девушка на улице</b>".encode("cp1251"))
    make_image(tmp_path / "cover.png")

    with open_page(write_page(tmp_path, make_config(tmp_path, resolution=(32, 32)))) as page:
        assert page.problems == []
        assert page.locator("script, iframe, article b > b").count() == 0
        assert page.locator(".card h4").nth(1).inner_text() == f"{name}.mp4"
        caption = page.locator(".caption").nth(1).inner_text()
        assert caption.startswith("<script>alert(1)</script>")
        assert "\\u202e" in caption
        assert page.locator(".lost").last.inner_text().strip().endswith("and more")
        text = page.locator("body").inner_text()
        assert "\u202e" not in text
        for part in (
            "of 4 tokens",
            "bad\\u202e.txt: this caption is not UTF-8",
            "7 frames, too few for 9 of target_frames",
            "50.0 % of the image",
            "images, for which a table with image_directory is needed",
            "at 0.67 times its speed",  # 24 frames a second, for a model of 16
        ):
            assert part in text
        assert "<b>де" in page.locator(".problems").first.inner_text()
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == 2
        assert min(widths) > 0


@pytest.mark.parametrize(("maximum", "shown"), [(2, [3, 7]), (5, [3, 7, 5, 0, 9])])
def test_files_with_faults_are_shown_first_then_an_even_choice(
    tmp_path: Path, maximum: int, shown: list[int]
) -> None:
    table = make_table(tmp_path)
    sources = [MediaSource(Path(f"{i}.mp4"), str(i), "", None, (), table) for i in range(10)]
    found = TableFindings(table, "", sources, Counter())
    found.errors = [Fault("cannot be read", name, name) for name in ("3", "7")]
    found.warnings = [Fault("have an empty caption", "5", "5")]

    assert select_sources([found], maximum)[0] == list(shown)


def test_the_crop_is_drawn_where_the_model_cuts() -> None:
    frame = np.full((60, 100, 3), 200, np.uint8)

    drawn = draw_crop(frame, fit_cover((100, 60), (30, 30)))  # keeps columns 20 to 80

    assert (drawn[:, :20] == 60).all()
    assert (drawn[:, 80:] == 60).all()
    assert (drawn[2:58, 22:78] == 200).all()
    assert (drawn[:, 20] == (255, 140, 0)).all()


def test_a_damaged_clip_shows_what_could_be_read(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", 60)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 2 // 3])
    (source,) = find_sources(make_table(tmp_path, resolution=(32, 32), target_frames=(57,)))

    inspection = inspect_and_draw(source, 16.0, LATENT, CHECK_SIZES)

    assert inspection.strip is not None
    assert inspection.read_error is not None
    assert "a.mp4" in inspection.read_error
