"""Captions of Fibo 2.0 are cleaned as in diffusers' pipeline, and their faults are found."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import BriaFibo2Pipeline
from diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2 import (
    DEFAULT_NEGATIVE_PROMPT,
    TEXT_ENCODER_OUT_LAYERS,
)
from PIL import Image

from fibo_2.captions import NULL, find_caption_errors, write_caption, write_edit
from fibo_2.configs import BUNDLES
from modules.errors import OptionError
from tests.faults.messages import run_here
from tests.tiny.fibo_2 import write_text_encoder

NESTED = {
    "short_description": "Ein Rad, grün",
    "objects": [{"description": 'a "red" wheel', "location": "", "more": {"a": None}}, {}, []],
    "lighting": {"conditions": "sun", "aesthetic_score": 3, "direction": float("nan")},
    "aesthetics": {"preference_score": 1},
    "aesthetic_score": 0.5,
    "context": "",
    "text_render": [],
    "own_key": [1, 0, False],
}
CAPTIONS: list[dict[str, Any]] = [
    NESTED,
    {"short_description": "a", "text_render": []},
    {"text_render": [{"text": "SALE"}], "short_description": ""},
    {"objects": [{}]},
    {},
]
EDITS: list[dict[str, Any]] = [
    {"edit_instruction": "add a hat"},
    {"short_description": "a", "objects": [], "edit_instruction": "add a hat"},
    {"structured_caption": {"context": "", "short_description": "b"}, "edit_instruction": "x"},
    {"edit_instruction": "x", "structured_caption": "a cat"},
]


def written_there(text: str) -> str:
    """A generation's prompt as the pipeline encodes it."""
    caption, _ = BriaFibo2Pipeline._parse_prompt(text)
    if isinstance(caption, str):
        return caption
    return json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("caption", CAPTIONS, ids=range(len(CAPTIONS)))
def test_a_caption_is_cleaned_as_there(caption: dict[str, Any]) -> None:
    text = json.dumps(caption, indent=2)
    assert write_caption(text).text == written_there(text)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("edit", [*map(json.dumps, EDITS), 'Make it "blue"'], ids=range(len(EDITS) + 1))
def test_an_edit_is_written_as_there(edit: str, count: int) -> None:
    """Ours begins behind the pictures."""
    expected = BriaFibo2Pipeline._get_edit_prompt(edit, count)
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    names = ["image"] if count == 1 else [f"image_{number}" for number in range(1, count + 1)]
    assert expected == "{" + "".join(f'"{name}":"{marker}",' for name in names) + write_edit(edit).text


def test_the_null_caption_and_the_layers_are_the_released_ones() -> None:
    assert NULL == DEFAULT_NEGATIVE_PROMPT
    assert write_caption(" ").text == NULL
    assert BUNDLES == TEXT_ENCODER_OUT_LAYERS


def test_a_plain_caption_becomes_json() -> None:
    assert json.loads(write_caption('a "red" cat\n').text) == {"short_description": 'a "red" cat\n'}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"short_description": "a",}', "double quotes|last entry"),
        ("{a cat", "it is not JSON"),
    ],
)
def test_broken_json_is_refused_where_it_breaks(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        write_caption(text)
    with pytest.raises(OptionError, match="char 1|char 2"):
        write_edit(text)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"short_description": "a"}, "no edit_instruction"),
        ({"structured_caption": 3, "edit_instruction": "x"}, "neither an object nor a text"),
        ({"structured_caption": {}, "edit_instruction": "x", "objects": []}, "it has objects"),
    ],
)
def test_an_edit_without_what_it_needs_is_refused(edit: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        write_edit(json.dumps(edit))
    assert any(words in error for error in find_caption_errors(json.dumps(edit))) != (
        "edit_instruction" not in edit
    )


@pytest.mark.parametrize(
    ("caption", "faults"),
    [
        ({"short_description": "a", "lighting": {"conditions": "sun"}}, []),
        ({"objects": [{"description": "a"}]}, ["short_description is missing"]),
        (
            {"short_description": "a", "lightning": {}, "mood": "calm"},
            ["lightning is not a key of a caption: lighting is meant", "mood is not a key of a caption"],
        ),
        (
            {"short_description": "a", "objects": "a cat", "lighting": ["sun"]},
            ["objects is a text, not a list", "lighting is a list, not an object"],
        ),
        (
            {"short_description": "a", "objects": [{"location": "left"}], "text_render": [{"text": " "}]},
            ["objects, entry 1: description is missing", "text_render, entry 1: text is missing"],
        ),
        (
            {"edit_instruction": "x", "short_descripton": "a"},
            ["short_descripton is not a key of a caption: short_description is meant"],
        ),
    ],
)
def test_the_check_tells_what_is_missing_and_what_is_misspelt(
    caption: dict[str, Any], faults: list[str]
) -> None:
    assert find_caption_errors(json.dumps(caption)) == faults


def test_captions_that_are_broken_json_are_named_and_all_others_cached(tmp_path: Path) -> None:
    encoder = write_text_encoder(tmp_path / "text_encoder")
    captions = {"a": '{"short_description": "a",', "b": '{"short_description": "b"}', "ü": '{"a": 1}}'}
    for name, caption in captions.items():
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    config = '[[datasets]]\nimage_directory = "."\ncache_directory = "cache"\ncaption_extension = ".txt"\n'
    (tmp_path / "data.toml").write_text(f"{config}resolution = [64, 64]\n", encoding="utf-8")
    words = ["--dataset_config", "data.toml", "--text_encoder", encoder, "--text_encoder_dtype", "float32"]
    script = "fibo_2_cache_text_encoder_outputs.py"
    printed = io.StringIO()

    code, said = run_here(script, *words, "--check", folder=tmp_path, printed=printed)
    assert code == 1
    for name in ("a", "ü"):
        assert f"{name}.txt: it is not JSON" in printed.getvalue() + said
    assert "Faults: 2" in printed.getvalue() + said

    code, said = run_here(script, *words, "--device", "cpu", folder=tmp_path)
    assert code == 1
    for name in ("a", "ü"):
        assert f"{name}.txt: the caption {captions[name]}: it is not JSON" in said
    assert [path.name for path in (tmp_path / "cache").glob("*_te.safetensors")] == ["b_fibo_te.safetensors"]
