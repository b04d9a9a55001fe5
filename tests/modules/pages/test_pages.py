"""Pages are one file, escape every text, and play what is embedded."""

import math
from pathlib import Path

import jinja2
import numpy as np
import pytest

from modules.errors import UserError
from modules.pages.charts import Chart, Curve, draw_chart, smooth
from modules.pages.page import embed_clip, embed_picture, render_page, share_page, write_page
from tests.browser import open_page

HOSTILE = "$\\frac{ \"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}</style></title>"
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
        "picture": embed_picture(clip(1)[0], HOSTILE),
        "chart": chart,
    }
    report = tmp_path / "report \u00fc.html"
    write_page(report, template, HOSTILE, values)

    with open_page(report) as page:
        assert page.title() == HOSTILE
        assert page.locator("#text").inner_text() == HOSTILE
        assert page.locator("script").count() == 0
        page.wait_for_function("document.querySelector('video').readyState >= 2")
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == 2
        assert min(widths) > 0
        assert page.problems == []


def test_a_missing_value_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render_page(template, "title", {})


@pytest.mark.parametrize(("height", "width", "shown"), [(24, 32, (32, 24)), (1000, 500, (256, 512))])
def test_large_pictures_are_reduced(height: int, width: int, shown: tuple[int, int]) -> None:
    tag = embed_picture(clip(1, height, width)[0], "picture")

    assert f'width="{shown[0]}" height="{shown[1]}"' in tag


def test_one_frame_is_a_picture_and_several_are_a_clip() -> None:
    assert embed_clip(clip(1), 8, "still").startswith("<img")
    assert embed_clip(clip(2), 8, "moving").startswith("<video")


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
