"""Captions of Ideogram 4 are read as they are; boxes follow their image."""

import json
from typing import Any

import pytest

from ideogram4.captions import find_caption_errors, fit_caption
from modules.media.buckets import Fit

PHOTO = {"aesthetics": "calm", "lighting": "sun", "photo": "50 mm", "medium": "photograph"}
ART = {"aesthetics": "calm", "lighting": "sun", "medium": "painting", "art_style": "ink"}


def element(**changes: Any) -> dict[str, Any]:
    return {"type": "obj", "bbox": [100, 200, 300, 400], "desc": "a cat", **changes}


def caption(*elements: dict[str, Any], style: Any = None, **changes: Any) -> str:
    composition = {"background": "grass", "elements": list(elements)}
    parts = {"style_description": style} if style else {}
    return json.dumps({**parts, "compositional_deconstruction": composition, **changes})


@pytest.mark.parametrize(
    "text",
    [
        caption(),
        caption(element(), style=PHOTO),
        caption(element(color_palette=["#1A2B3C"]), style={**ART, "color_palette": ["#FFFFFF"]}),
        caption({"type": "text", "text": "SALE", "desc": "red letters"}),
    ],
)
def test_captions_of_the_training_have_no_errors(text: str) -> None:
    assert find_caption_errors(text) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ('{"high_level_description": "a cat"}', "compositional_deconstruction is missing"),
        (caption(high_level_description="a cat"), "another order"),
        (caption(hight_level_description="a cat"), "high_level_description is meant"),
        (caption(style={**PHOTO, "art_style": "ink"}), "photo is not among"),
        (caption(style={name: PHOTO[name] for name in reversed(PHOTO)}), "another order"),
        (caption(style={**PHOTO, "color_palette": ["#1a2b3c"]}), "capital letters"),
        (caption(style={**PHOTO, "color_palette": ["#1A2B3C"] * 17}), "at most 16"),
        (caption(element(type="object")), "element 1: type 'object', which is one of obj, text"),
        (caption(element(), {"type": "text", "desc": "letters"}), "element 2: text is missing"),
        (caption(element(bbox=[300, 200, 100, 400])), "ends before it begins"),
        (caption(element(bbox=[0, 0, 100, 1200])), "leaves the image"),
        (caption(element(bbox=[0.1, 0.2, 0.3, 0.4])), "not four whole numbers"),
        (json.dumps({"compositional_deconstruction": {"background": "é", "elements": []}}), r"\u"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    assert any(words in error for error in find_caption_errors(text)), find_caption_errors(text)


def boxes_of(text: str) -> list[Any]:
    elements = json.loads(text)["compositional_deconstruction"]["elements"]
    return [element.get("bbox") for element in elements]


def test_boxes_follow_their_image_to_its_crop() -> None:
    """Of 200 x 100 pixels the middle square: left and right of it 50 pixels are cut."""
    outside, without = element(bbox=[0, 0, 1000, 200]), {"type": "obj", "desc": "a sky"}
    text = caption(element(bbox=[100, 250, 500, 750]), outside, without)
    fit = Fit(resized=(200, 100), crop=(50, 0), bucket=(100, 100), interpolation="none")

    fitted = fit_caption(text, (200, 100), fit)

    # the second element is cut away
    assert boxes_of(fitted) == [[100, 0, 500, 1000], None]


def test_a_caption_whose_image_is_only_resized_stays_to_the_character() -> None:
    text = '{ "compositional_deconstruction":{"background":"grass",  "elements":[]}}'
    fit = Fit(resized=(64, 32), crop=(0, 0), bucket=(64, 32), interpolation="area")
    assert fit_caption(text, (200, 100), fit) == text


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_spaces_between_the_parts_stay(separators: tuple[str, str]) -> None:
    """The model reads them."""
    fit = Fit(resized=(200, 100), crop=(50, 0), bucket=(100, 100), interpolation="none")
    content = json.loads(caption(element(desc="ein Käfer")))
    text = json.dumps(content, separators=separators, ensure_ascii=False)

    fitted = fit_caption(text, (200, 100), fit)

    assert fitted != text
    assert fitted == json.dumps(json.loads(fitted), separators=separators, ensure_ascii=False)


def test_texts_that_are_no_captions_stay() -> None:
    fit = Fit(resized=(200, 100), crop=(50, 0), bucket=(100, 100), interpolation="none")
    for text in ("a cat", '{"a": 1}', "{broken"):
        assert fit_caption(text, (200, 100), fit) == text
