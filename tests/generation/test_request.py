"""From options and prompt lines to requests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blissful_tuner.guidance import check_guidance
from blissful_tuner.video_to_video_options import SourceOptions
from generation.request import make_request, seed_of
from generation.script_options import RequestOptions
from modules.errors import OptionError
from tests.preparing import prepare

OPTIONS = RequestOptions.usual(
    prompt="a cat", video_size=(480, 832), fps=16.0, guidance_scale=5.0, source=SourceOptions()
)


def test_a_line_wins_over_the_command_line() -> None:
    line = {
        "prompt": "a dog",
        "video_size_width": 64,
        "video_length": 9,
        "seed": 3,
        "infer_steps": 4,
        "guidance_scale": 2.0,
        "flow_shift": 1.5,
        "image_path": "~/x.png",
        "cfg_schedule": "1-2",
    }
    request = make_request(replace(OPTIONS, seed="9", control_path=Path("c.mp4")), line)
    said = (request.prompt, request.width, request.height, request.frames, request.seed)
    assert said == ("a dog", 64, 480, 9, 3)
    assert (request.steps, request.guidance_scale, request.flow_shift) == (4, 2.0, 1.5)
    assert request.cfg_schedule == "1-2"
    assert request.image_path == Path("~/x.png").expanduser()
    assert request.control_path == Path("c.mp4")


def test_references_of_a_line_replace_those_of_the_command_line() -> None:
    options = replace(OPTIONS, control_image_path=("a.png", "b.png"))
    assert make_request(options).control_images == (Path("a.png"), Path("b.png"))
    assert make_request(options, {"control_image_path": ["c.png"]}).control_images == (Path("c.png"),)
    assert make_request(OPTIONS).control_images == ()


EXTRAS = {
    "image_path": ("image_path", "a.png"),
    "seconds": ("length", 5.0),
    "one": ("one", None),
    "controls": ("controls", ["a", "b"]),
}


def test_what_only_the_family_reads_goes_there_as_text() -> None:
    """It is no path here even where it looks like one; of a list each has a line of its own."""
    request = make_request(replace(OPTIONS, extras=EXTRAS, image_path=Path("a.png")))
    assert request.extra == {"image_path": "a.png", "length": "5.0", "controls": "a\nb"}
    assert request.image_path is None


def test_a_given_seed_is_kept_or_hashed_and_then_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert seed_of(" 42 ") == 42
        assert not caplog.messages
        assert make_request(replace(OPTIONS, seed="hello")).seed == 2475399061
    assert caplog.messages == ["Seed of the text 'hello': 2475399061"]


@pytest.mark.parametrize(
    "line",
    [
        {"video_length": 0},
        {"infer_steps": -1},
        {"infer_steps": 10**11},
        {"video_size_width": 0},
        {"video_size_height": 16 * 10**8},
        {"guidance_scale": float("nan")},
        {"flow_shift": 0.0},
        {"seed": 2**70},
    ],
)
def test_numbers_that_make_no_sense_are_refused(line: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make_request(OPTIONS, line)


def test_a_negative_prompt_without_guidance_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    check_guidance(prepare(make_request(replace(OPTIONS, guidance_scale=5.0, negative_prompt="bad"))))
    # the family's own is no matter of the user's
    check_guidance(prepare(make_request(replace(OPTIONS, guidance_scale=1.0))))
    assert "ignored" not in caplog.text
    check_guidance(prepare(make_request(replace(OPTIONS, guidance_scale=1.0, negative_prompt="bad"))))
    assert "'bad' is ignored" in caplog.text


def test_a_prompt_that_is_no_text_is_refused_before_the_work(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OptionError, match="the prompt .* is not UTF-8 text"):
        make_request(OPTIONS, {"prompt": "d\udcffog"})
    assert make_request(OPTIONS, {"prompt": "d\u00f6g", "seed": None}).prompt == "dög"
