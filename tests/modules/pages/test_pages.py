"""Pages are one file, escape every text, and play what is embedded."""

import base64
import math
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import numpy as np
import pytest

from browser.runs.run_views import drop_private, share_page
from modules.errors import UserError
from modules.pages.charts import Chart, Curve, draw_chart, smooth
from modules.pages.page import embed_clip, embed_image, mark_folders, write_page
from tests.chromium import open_page, wait_until

HOSTILE = "$\\frac{ \"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}</style></title>"
SVG = "{http://www.w3.org/2000/svg}"
TEMPLATE = """{% extends "base.html" %}
{% block body %}<p id="text">{{ text }}</p>{{ clip }}{{ picture }}{{ chart }}{% endblock %}
"""


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


def clip(length: int, height: int = 24, width: int = 32) -> list[np.ndarray]:
    return [np.full((height, width, 3), 20 * index, np.uint8) for index in range(length)]


def test_a_page_shows_hostile_text_and_runs_none_of_it(template: Path, tmp_path: Path) -> None:
    chart = draw_chart(Chart([Curve(HOSTILE, [0, 1], [1, 2])], "step", HOSTILE, HOSTILE))
    values = {
        "text": HOSTILE,
        "clip": embed_clip(clip(5), 8, HOSTILE),
        "picture": embed_image(clip(1)[0], HOSTILE),
        "chart": chart,
    }
    report = tmp_path / "report \u00fc.html"
    write_page(report, template, HOSTILE, values)

    with open_page(report) as page:
        assert page.title() == HOSTILE
        assert page.locator("#text").inner_text() == HOSTILE
        assert page.locator("script").count() == 0
        wait_until(page, "document.querySelector('video').readyState >= 2")
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == 2
        assert min(widths) > 0
        assert page.problems == []


def test_a_missing_value_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="text"):
        write_page(template.with_name("never.html"), template, "title", {})


@pytest.mark.parametrize(("size", "shown"), [((24, 32), (32, 24)), ((1000, 500), (256, 512))])
def test_large_pictures_are_reduced(size: tuple[int, int], shown: tuple[int, int]) -> None:
    tag = embed_image(clip(1, *size)[0], "picture")

    assert f'width="{shown[0]}" height="{shown[1]}"' in tag


def test_one_frame_is_a_picture_and_several_are_a_clip() -> None:
    assert embed_clip(clip(1), 8, "still").startswith("<img")
    assert embed_clip(clip(2), 8, "moving").startswith("<video")


def drawing(chart: Chart) -> ElementTree.Element:
    data = re.search('base64,([^"]+)', draw_chart(chart))
    assert data is not None
    return ElementTree.fromstring(base64.b64decode(data[1]))


def test_a_curve_has_round_ticks_a_gap_where_values_are_missing_and_a_mark_at_its_best() -> None:
    loss = [2.0, 1.5, math.nan, 1.0, math.inf, 0.5]
    curves = [Curve("loss", range(6), loss, low=loss, high=loss), Curve("val", [0, 4], [0.9, 0.7], best=1)]
    svg = drawing(Chart(curves, "step", "loss", "Loss"))

    texts = [one.text for one in svg.iter(f"{SVG}text")]
    assert texts[:10] == ["0", "1", "2", "3", "4", "5", "0.5", "1", "1.5", "2"]
    assert texts[10:] == ["\N{BLACK STAR}", "step", "loss", "Loss", "loss", "val"]
    runs = [one.get("points", "").split() for one in svg.iter(f"{SVG}polyline")][-4:]
    assert [len(set(run)) for run in runs] == [2, 1, 1, 2]
    assert len(list(svg.iter(f"{SVG}polygon"))) == 3
    # a step is 410 / (5 * 1.1) pixels, a loss of 0.5 is 220 / (3 * 1.1)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in runs[0])
    assert (x1 - x0, y1 - y0) == pytest.approx((74.5, 66.7), abs=0.2)


@pytest.mark.parametrize("values", [[3e-5], [0.0], [7.0, 7.0], [math.nan]])
def test_curves_of_one_value_or_none_are_drawn(values: list[float]) -> None:
    assert drawing(Chart([Curve("rate", range(len(values)), values)], "step", "rate", "Rate")) is not None


def test_smoothing_removes_the_bias_of_its_start_and_skips_nan() -> None:
    smoothed = smooth([1.0, math.nan, 3.0], 0.5)

    assert smoothed[0] == 1.0
    assert math.isnan(smoothed[1])
    assert smoothed[2] == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/max muster/clips/cat 1.mp4: cannot be read", "cat 1.mp4: cannot be read"),
        (r"wrote D:\films\x.mp4 at step 5 / 10", "wrote x.mp4 at step 5 / 10"),
        ("~/clips/<b>/x.mp4", "&lt;b&gt;/x.mp4"),
        ("https://host/a/b/c.mp4 and/or ./sample/x.png", "https://host/a/b/c.mp4 and/or ./sample/x.png"),
    ],
)
def test_a_shared_copy_keeps_names_but_no_folders(
    template: Path, tmp_path: Path, text: str, left: str
) -> None:
    page = tmp_path / "page.html"
    write_page(page, template, "title", {"text": text, "clip": "", "picture": "", "chart": ""})

    share_page(page, tmp_path / "shared.html")

    assert f'<p id="text">{left}</p>' in (tmp_path / "shared.html").read_text(encoding="utf-8")


def test_only_own_pages_are_shared(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>a</p>", encoding="utf-8")
    for name in ("a.html", "missing.html"):
        with pytest.raises(UserError, match=f"{name}"):
            share_page(tmp_path / name, tmp_path / "b.html")
    with pytest.raises(UserError, match="is a folder. Pass a page"):
        share_page(tmp_path, tmp_path / "b.html")


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        (
            "python /a/b/reelsmith.py new own --name x/y",
            "python <!--private-->/a/b/<!--/private-->reelsmith.py new own --name x/y",
        ),
        ("python /a/b.py new x/y", "python <!--private-->/a/<!--/private-->b.py new x/y"),
        ("python '/a b/c.py' new x/y", "python &#39;<!--private-->/a b/<!--/private-->c.py&#39; new x/y"),
        ("/music/a - b/c d/e.wav", "<!--private-->/music/a - b/c d/<!--/private-->e.wav"),
        ("/a/x -o /b/y", "<!--private-->/a/<!--/private-->x -o <!--private-->/b/<!--/private-->y"),
        ("http://host/home/a/b", "http://host/home/a/b"),
        ("~5 GB, a~b, x.~y, ~~x~~", "~5 GB, a~b, x.~y, ~~x~~"),
        ("either and/or, 1/2/3, a/b/c.png, 16:9, 3.5/4", "either and/or, 1/2/3, a/b/c.png, 16:9, 3.5/4"),
    ],
)
def test_folders_end_where_a_command_goes_on(text: str, marked: str) -> None:
    assert mark_folders(text) == marked


@pytest.mark.parametrize(
    "text",
    [
        *("file:///home/anna/wedding/x.png", "file:/home/anna/x.png", "file://nas/anna/x.png"),
        *("file:///C:/Users/anna/x.png", "FILE:///home/anna/x.png", "image:/home/anna/x.png"),
        *("image:/srv9/anna/x.png", "a:/anna/wedding/x.png", "1/home/anna/x.png", "v2/Users/anna/x.png"),
        *("-/home/anna/x.png", "--lora-/anna/wedding/x.png", "--image=/home/anna/x.png"),
        *("x./home/anna/x.png", "image://home/anna/x.png", "x_/tmp/anna/x.png"),
        *("../../home/anna/x.png", "~anna/wedding/x.png", "~/anna/x.png", "image:~/anna/x.png"),
        *("~anna", "~anna/x.png", "saved in ~anna.", "--output_dir=~anna", "(~anna/)", r"~anna\x.png"),
        *(r"image:C:\Users\anna\x.png", r"atC:\Users\anna\x.png", "C:/Users/anna/x.png", r"\\nas\anna\x.png"),
        *(r"\\?\C:\Users\anna\x.png", r"\\?\UNC\nas\anna\x.png", "//nas/anna/x.png", r"-\\nas\anna\x.png"),
        *("/home/anna", "saved in /Users/anna, then", r"C:\Users\anna", "(/home/anna)", "'/home/anna' x"),
        *("/home/anna/my pictures/x.png", "(file:///home/anna/x.png)", "/mnt/c/Users/anna/x.png"),
        *(
            "cat ../anna/x.png",
            "--i ../../my anna/x.png",
            r"..\\anna\x.png",
            "$HOME/anna/x",
            "${HOME}/anna/x",
        ),
    ],
)
def test_no_folder_stays_in_a_shared_text(text: str) -> None:
    assert "anna" not in drop_private(str(mark_folders(text)))
    assert "anna" in str(mark_folders(text))


@pytest.mark.parametrize(
    "unit", ["/a", "~", "\\", "../", "$a/", "$", "x:", "file:", "a ", "/a b ", "a/", "/a.py "]
)
def test_folders_of_a_long_text_are_found_in_its_length(unit: str) -> None:
    """Twice the text takes about twice the time; it took four times that of backslashes."""
    start = time.process_time()
    mark_folders(f"/home/{unit * 20_000}")
    mark_folders(f"{unit * 20_000}/")
    assert time.process_time() - start < 5
