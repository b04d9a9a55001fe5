"""What outputs say about themselves."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from blissful_tuner.metadata import TUNER_VERSION, as_tags, frame_rate_in, output_metadata, seed_in
from modules.records import Request

REQUEST = Request("a\ncat ä", 7, 832, 480, 81, 50, 5.0, None, 5.0, "unipc", 16.0, "bad")


def test_metadata_has_the_known_keys_and_the_sizes() -> None:
    found = output_metadata(REQUEST, {"model_type": "wan", "task": "t2v-14B"}, [("style.safetensors", 0.8)])
    assert found == {
        "bt_model_type": "wan",
        "bt_task": "t2v-14B",
        "bt_tunerver": TUNER_VERSION,
        "bt_seeds": "7",
        "bt_prompt": "a\ncat ä",
        "bt_negative_prompt": "bad",
        "bt_infer_steps": "50",
        "bt_guidance_scale": "5.0",
        "bt_cfg_schedule": "N/A",
        "bt_flow_shift": "5.0",
        "bt_height": "480",
        "bt_width": "832",
        "bt_video_length": "81",
        "bt_fps": "16",
        "bt_lora_0": "style.safetensors: 0.8",
    }


def test_what_only_the_family_reads_is_said_too_but_for_where_files_lie() -> None:
    extra = {"video_sections": "4", "one_frame": "default", "image_path": "a.png", "control_image_path": "b.png"}
    found = output_metadata(replace(REQUEST, extra=extra), {})
    assert (found["bt_video_sections"], found["bt_one_frame"]) == ("4", "default")
    assert not any(name.endswith("_path") for name in found)


def test_the_known_names_without_prefix_are_read() -> None:
    assert seed_in({"seeds": "12"}) == 12
    assert frame_rate_in({"fps": "24"}) == 24.0
    assert seed_in({"bt_seeds": "3", "seeds": "12"}) == 3


def test_tags_are_one_line_and_keep_their_letters() -> None:
    assert as_tags({"bt_prompt": "a\r\nb\nä"}) == {"bt_prompt": "a\\nb\\nä"}


@pytest.mark.parametrize(
    ("text", "rate"), [("24", 24.0), ("23.976", 23.976), ("N/A", None), ("nan", None), ("inf", None), ("-1", None)]
)
def test_a_frame_rate_that_is_none_is_not_used(text: str, rate: float | None) -> None:
    assert frame_rate_in({"bt_fps": text}) == rate
    assert frame_rate_in({}) is None


@pytest.mark.parametrize(("text", "seed"), [("9007199254740993", 9007199254740993), ("-5", -5), ("N/A", 0), ("nan", 0), ("1.5", 0)])
def test_a_seed_is_read_to_the_last_digit(text: str, seed: int) -> None:
    assert seed_in({"bt_seeds": text}) == seed
    assert seed_in({}) == 0


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"reelsmith {project['version']}" == TUNER_VERSION
