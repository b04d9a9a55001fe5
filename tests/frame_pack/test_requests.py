"""What a request for FramePack asks for, and what cannot be made."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataset.sources.decoding import bucket_of
from frame_pack.family import LATENT, FramePack, family_for_generation, family_for_training
from frame_pack.files import FramePackFiles
from frame_pack.options import FramePackGenerationOptions, FramePackTrainingOptions
from frame_pack.requests import FramePackRequest, prepare_request
from modules.contract.requests import Prepared, Request
from modules.errors import OptionError
from modules.options import read_options
from modules.parser import add_options
from tests.dataset.making import make_table
from tests.golden_cases import read_case
from tests.tiny.framepack import write_siglip
from tests.tiny.framepack_dit import tiny_state, write_dit
from tests.tiny.framepack_encoders import SIGLIP_DIM
from tests.tiny.project import write_image

USUAL = FramePack(FramePackFiles()).defaults
RECORDED = read_case("framepack_schedule")[0]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_image(tmp_path / "start.png", 48, 32)
    return tmp_path / "start.png"


def settle(
    picture: Path | str,
    extra: Mapping[str, str] | None = None,
    window: int = 9,
    f1: bool = False,
    takes_shape: bool = False,
    **said: Any,
) -> Prepared:
    values: dict[str, Any] = {"prompt": "a cat", "seed": 1, "width": 48, "height": 32, **said}
    request = Request(**values, extra={"image_path": str(picture), **(extra or {})})
    return prepare_request(request, USUAL, LATENT, window, f1, "", takes_shape)


def own(prepared: Prepared) -> FramePackRequest:
    assert isinstance(prepared.own, FramePackRequest)
    return prepared.own


def texts(prepared: Prepared) -> list[str]:
    return [prepared.prompts[section].positive.text for section in range(len(prepared.prompts))]


@pytest.mark.parametrize(
    "video", RECORDED["sections"], ids=lambda video: f"{video['total_sections']} sections"
)
def test_a_video_has_the_recorded_length(video: dict[str, Any], picture: Path) -> None:
    extra = {"video_seconds": str(video["video_seconds"])}
    if video["video_sections_option"] is not None:
        extra["video_sections"] = str(video["video_sections_option"])
    window = video["latent_window_size"]
    request = settle(picture, extra, window)
    assert (request.frames, len(own(request).images)) == (
        video["final_pixel_frames"],
        video["total_sections"],
    )
    assert request.own_metadata["video_sections"] == str(video["total_sections"])
    assert float(request.own_metadata["video_seconds"]) == pytest.approx(
        video["final_pixel_frames"] / 30, rel=1e-4
    )


def test_samples_say_frames_which_are_made_whole_sections(
    picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert settle(picture, frames=73).frames == 73
    assert "whole sections" not in caplog.text
    assert settle(picture, frames=85).frames == 73
    assert "85 frames are made 73" in caplog.text
    with pytest.raises(
        OptionError, match="33 frames are less than a section: the least with --latent_window_size 9 are 37"
    ):
        settle(picture, frames=33)


def test_nothing_said_makes_five_seconds_with_the_released_numbers(picture: Path) -> None:
    request = settle(picture)
    assert (request.frames, request.steps, request.fps, request.embedded_guidance) == (145, 25, 30.0, 10.0)
    assert (request.guidance_scale, request.solver) == ((1.0,), "unipc-bh1")


@pytest.mark.parametrize("solver", ["euler", "dpm++", "dpm++sde", "lcm"])
def test_another_solver_follows_the_same_levels(picture: Path, solver: str) -> None:
    request = settle(picture, solver=solver)
    released = settle(picture, solver="unipc")
    assert (request.solver, released.solver) == (solver, "unipc-bh1")
    assert request.flow_shift == released.flow_shift


@pytest.mark.parametrize("image", [(30, 90), (480, 270), (77, 78), (10, 400), (48, 32)], ids=str)
@pytest.mark.parametrize("area", [(64, 64), (640, 640), (832, 480)], ids=str)
def test_one_picture_has_the_size_that_a_data_set_would_give_its_control_image(
    picture: Path, image: tuple[int, int], area: tuple[int, int]
) -> None:
    control = picture.with_name("control.png")
    write_image(control, *image)
    table = make_table(control.parent, "image_directory", resolution=list(area), enable_bucket=True)
    width, height = bucket_of(table, image, LATENT.pixel_step, control)
    said: dict[str, Any] = {"width": area[0], "height": area[1], "takes_shape": True}

    with_control = settle(picture, {"one_frame": "default"}, control_images=(control, picture), **said)
    of_start = settle(control, {"one_frame": "default"}, **said)

    for prepared in (with_control, of_start):
        assert (prepared.width, prepared.height) == (width, height)
        given = settle(picture, {"one_frame": "default"}, width=width, height=height)
        assert prepared.flow_shift == given.flow_shift


def test_a_video_does_not_take_the_shape_of_its_image(
    picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = settle(picture, width=64, height=64, takes_shape=True)
    assert (prepared.width, prepared.height) == (64, 64)
    assert "--one_frame_auto_resize is ignored because a video is made" in caplog.text


def test_texts_and_images_reach_their_sections(picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        request = settle(picture, {"video_sections": "4"}, prompt="0:sits;;;1-2:walks;;;-1:sleeps")
    assert caplog.text == ""
    assert texts(request) == ["sits", "walks", "walks", "sleeps"]
    assert own(request).images == (picture,) * 4


def test_without_a_negative_prompt_a_sample_has_no_guidance_and_a_generation_an_empty_one(
    tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dit = write_dit(tmp_path, tiny_state(image_dim=SIGLIP_DIM))
    words = ["--dit", str(dit), "--image_encoder", str(write_siglip(tmp_path / "siglip.safetensors"))]
    training, generation = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_options(training, FramePackTrainingOptions)
    training.add_argument("--guidance_scale", type=float, default=1.0)
    add_options(generation, FramePackGenerationOptions)
    samples = family_for_training(read_options(FramePackTrainingOptions, training.parse_args(words)))
    videos = family_for_generation(read_options(FramePackGenerationOptions, generation.parse_args(words)))
    asked = Request("a cat", 1, 48, 32, guidance_scale=3.0, extra={"image_path": str(picture)})

    def guided(model: FramePack, request: Request) -> tuple[tuple[float, ...], str]:
        prepared = model.prepare(request)
        return prepared.guidance_scale, prepared.negative_prompt

    assert guided(videos, asked) == ((3.0,), "")
    assert not caplog.text
    assert guided(samples, asked) == ((1.0,), "")
    assert "the guidance scale of 'a cat' is ignored because it has no negative prompt (--n)" in caplog.text
    for model in (samples, videos):
        assert guided(model, replace(asked, negative_prompt="dull")) == ((3.0,), "dull")
