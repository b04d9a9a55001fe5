"""Layouts are checked, and their boxes follow the picture to its bucket."""

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from modules.media.buckets import fit_cover
from modules.text_files import looks_like_object
from moss_image.family import MossImage
from moss_image.files import MossImageFiles
from moss_image.layouts import find_layout_errors, fit_layout
from protocols.requests import Request
from tests.faults.messages import run_here, succeed_here
from tests.tiny.families import family_called
from tests.tiny.moss_image import write_tiny_moss_image

ITEM = {"label": "object", "caption": "a cat", "bbox": [-10, -20, 30, 40]}


def layout(*items: Mapping[str, Any], **changes: Any) -> str:
    full = {"summary": {"caption": "Katze auf Gras, grün"}, "items": list(items) or [ITEM]}
    return json.dumps({**full, **changes}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{a cat", "it is not JSON"),
        (layout(summary={}), "summary.caption is missing"),
        (layout(summary={"caption": "a", "canvas": "double"}), "canvas 'double'"),
        (layout(bbox_format="xyxy"), "bbox_format is 'xyxy'"),
        (layout(bbox_coord_space="relative"), "bbox_coord_space is 'relative'"),
        (layout({**ITEM, "label": "thing"}), "item 1: label 'thing'"),
        (layout(ITEM, {**ITEM, "caption": ""}), "item 2: its caption is missing"),
        (layout({**ITEM, "label": "text"}), "item 1: its text is missing"),
        (layout({**ITEM, "bbox": [1, 2, 3]}), "item 1: its bbox is not four numbers"),
        (layout({**ITEM, "bbox": [30, -20, -10, 40]}), "ends before it begins"),
        (layout({**ITEM, "bbox": [-10, -20, 30, 400]}), "extends beyond the image, 200 x 100 pixels"),
        (layout({**ITEM, "bbox": [-60, -20, 30, 40]}), "extends beyond the image"),  # rows are the first
    ],
)
def test_each_fault_of_a_layout_is_told(text: str, fault: str) -> None:
    assert fault in "; ".join(find_layout_errors(text, (200, 100)))


def test_a_right_layout_has_no_fault() -> None:
    assert find_layout_errors(layout(), (200, 100)) == []
    assert find_layout_errors(layout({**ITEM, "label": "text", "text": "Hallo\nWelt"}), (200, 100)) == []
    assert not looks_like_object("a cat {red}")


def test_boxes_are_those_of_the_resized_and_cropped_picture() -> None:
    """A picture of 200 x 100 covers 64 x 64 at 128 x 64, of which 32 pixels are cut on the left and right."""
    fit = fit_cover((200, 100), (64, 64))
    assert (fit.resized, fit.crop) == ((128, 64), (32, 0))
    edge = {**ITEM, "bbox": [-50, -100, 50, -40]}  # its right end is at -26 of -32
    gone = {**ITEM, "bbox": [-50, 60, 50, 100]}  # right of the crop

    fitted = fit_layout(layout(ITEM, edge, gone), (200, 100), fit)

    assert [item["bbox"] for item in json.loads(fitted)["items"]] == [[-6, -13, 19, 26], [-32, -32, 32, -26]]
    assert "grün" in fitted
    assert ", " not in fitted.replace("Katze auf Gras, grün", "")  # compact


def test_a_layout_of_a_picture_that_keeps_its_size_stays_as_it_is_written() -> None:
    text = layout()
    assert fit_layout(text, (64, 64), fit_cover((64, 64), (64, 64))) == text
    assert fit_layout("{a cat", (200, 100), fit_cover((200, 100), (64, 64))) == "{a cat"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a picture of 200 x 100 whose caption is a layout."""
    folder = tmp_path_factory.mktemp("project")
    family_called("moss_image").prepare(folder)
    (captioned,) = sorted((folder / "clips").glob("*.txt"))[:1] or sorted(folder.rglob("*.txt"))[:1]
    for image in captioned.parent.glob(f"{captioned.stem}.*"):
        if image.suffix != ".txt":
            image.unlink()
    Image.new("RGB", (200, 100), (9, 99, 9)).save(captioned.with_suffix(".png"))
    captioned.write_text(layout(), encoding="utf-8")
    return folder


def cached_caption(folder: Path) -> str:
    """Return the caption of a layout that the caches name."""
    for path in folder.rglob("*_moss_te.safetensors"):
        with safe_open(path, "pt") as file:
            caption = str(file.metadata()["caption1"])
        if looks_like_object(caption):
            return caption
    raise AssertionError("no cache has the layout")


def test_caching_encodes_the_boxes_of_the_bucket_and_checks_them(project: Path) -> None:
    folder = project
    family = family_called("moss_image")

    succeed_here(*family.cache_texts, folder=folder)

    recorded = json.loads(cached_caption(folder))
    text = json.loads(recorded["caption"]) if "caption" in recorded else recorded
    assert text["items"][0]["bbox"] != [-10, -20, 30, 40]
    printed = io.StringIO()
    run_here(*family.cache_texts, "--check", folder=folder, printed=printed)
    assert "4 are valid, 0 captions need encoding" in printed.getvalue()
    (caption,) = [path for path in folder.rglob("*.txt") if "grün" in path.read_text(encoding="utf-8")]
    caption.write_text(layout({**ITEM, "bbox": [-20, -10, 40, -30]}), encoding="utf-8")
    printed = io.StringIO()
    code, _ = run_here(*family.cache_texts, "--check", folder=folder, printed=printed)
    assert code
    assert "ends before it begins" in " ".join(printed.getvalue().split())


def test_families_whose_captions_name_no_places_fit_none() -> None:
    from flux_3.family import Flux3
    from flux_3.files import Flux3Files

    assert not Flux3(Flux3Files()).abilities.adjusts_captions
    assert MossImage(MossImageFiles()).abilities.adjusts_captions


def test_a_wrong_layout_of_a_request_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = write_tiny_moss_image(tmp_path)
    model = replace(MossImageFiles(), dit=files.dit, vae=files.vae, text_encoder=files.text_encoder)
    caplog.set_level(logging.WARNING)
    MossImage(model).prepare(Request(layout(), seed=1, width=64, height=64))
    assert "extends beyond the image, 64 x 64 pixels" in caplog.text
