"""Options of a generation that do something only to reference pictures say so where there are none."""

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from generation.options import read_generation
from generation.request import prepare_line
from protocols.families import FAMILIES
from protocols.requests import Request
from tests.generation.toy_family import ToyFamily

COMMAND = ("--save_path", "out", "--prompt", "a cat")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("krea2", ("--kv_cache", "--match_target_res")),
        ("qwen_image", ("--resize_control_to_image_size", "--append_original_name", "--rcm_threshold=0.1")),
        ("qwen_image", ("--resize_control_to_official_size",)),
        ("qwen_image_21", ("--resize_control_to_image_size",)),
        ("qwen_image_21", ("--resize_control_to_official_size",)),
        ("flux_2", ("--no_resize_control",)),
        ("flux_kontext", ("--no_resize_control",)),
        ("krea2", ()),
    ],
)
def test_options_for_references_do_nothing_without_them_and_say_so(
    family: str, words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    script = importlib.import_module(f"{family}_generate_image")
    record: Any = FAMILIES[family].options_record("Generation")
    options, _ = read_generation("", script.DEFAULTS, record, [*COMMAND, *words])
    names = ", ".join(word.partition("=")[0] for word in words)

    with caplog.at_level(logging.WARNING):
        toy: Any = ToyFamily()
        prepare_line(toy, options, {})
    said = [f"{names}: ignored, as there is no image to edit (--control_image_path)"] if words else []
    assert caplog.messages == said


def test_options_for_references_are_not_remarked_on_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = importlib.import_module("krea2_generate_image")
    record: Any = FAMILIES["krea2"].options_record("Generation")
    options, _ = read_generation("", script.DEFAULTS, record, [*COMMAND, "--kv_cache"])
    prepare = ToyFamily.prepare

    def with_image(self: ToyFamily, request: Request) -> Any:
        prepared = prepare(self, request)
        return replace(prepared, request=replace(request, control_images=(Path("a.png"),)))

    monkeypatch.setattr(ToyFamily, "prepare", with_image)
    toy: Any = ToyFamily()
    prepare_line(toy, options, {})
    assert not caplog.messages
