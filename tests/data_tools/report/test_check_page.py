"""The page of --check: what it shows of hostile names and captions, and how it is bounded."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.report.check import check_caching
from data_tools.report.findings import TableFindings
from data_tools.report.looks import draw_crop, show
from data_tools.report.page import CHECK_STRIP, choose_sources, write_check_page
from dataset.config import DatasetConfig
from dataset.sources.listing import find_sources
from dataset.sources.media_source import Fault, MediaSource
from modules.media.buckets import fit_cover
from tests.browser import open_page
from tests.dataset.making import make_clip, make_image, make_table
from tests.dataset.toy_family import LATENT, ToyFamily

HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=alert(2)> {{ 7 * 7 }} </p></style> \u202e"


def write_page(folder: Path, config: DatasetConfig, most: int = 500) -> Path:
    family = ToyFamily()
    result = check_caching(family, config, 1, False, parts=["media", "latents", "texts"])
    path = folder / "check.html"
    write_check_page(path, config, result, LATENT, 16.0, most, workers=1)
    return path


def make_config(folder: Path, **changes: object) -> DatasetConfig:
    table = make_table(folder, caption_extension=".txt", target_frames=(5, 9), **changes)
    return DatasetConfig(table.config_path, (table,))


def test_the_page_says_what_is_cut_off_and_left_out_and_runs_nothing(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(3)>'\"&{{1}}"
    make_clip(tmp_path / f"{name}.mp4", 7, (64, 32))
    (tmp_path / f"{name}.txt").write_text(HOSTILE + " and more", encoding="utf-8")
    make_clip(tmp_path / "bad\u202e.mp4", 9)
    (tmp_path / "bad\u202e.txt").write_bytes("<b>Käse</b>".encode("cp1252"))
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
            "50.0 % of the picture",
            "images: give them a table with image_directory",
            "at 0.67 times its speed",  # 24 frames a second, for a model of 16
        ):
            assert part in text
        assert "<b>K" in page.locator(".problems").first.inner_text()
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == 2
        assert min(widths) > 0


@pytest.mark.parametrize(("most", "shown"), [(2, [3, 7]), (3, [3, 7, 5]), (5, [3, 7, 5, 0, 9])])
def test_files_with_faults_are_shown_first_then_an_even_choice(
    tmp_path: Path, most: int, shown: list[int]
) -> None:
    table = make_table(tmp_path)
    sources = [MediaSource(Path(f"{i}.mp4"), str(i), "", None, (), table) for i in range(10)]
    found = TableFindings(table, "", sources, Counter())
    found.faults = [Fault("cannot be read", name, name) for name in ("3", "7")]
    found.remarks = [Fault("have an empty caption", "5", "5")]

    assert choose_sources([found], most)[0] == list(shown)


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

    look = show(source, 16.0, LATENT, CHECK_STRIP)

    assert look.strip is not None
    assert look.problem is not None
    assert "a.mp4" in look.problem
