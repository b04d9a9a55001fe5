"""Images of a request as what its sections are given."""

import argparse
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from dataset.sources.frames import find_bucket
from encoders.tiles import posterior_generator
from frame_pack.family import LATENT, FramePack, family_for_generation, family_for_training
from frame_pack.files import FramePackFiles
from frame_pack.inputs import one_frame_inputs, video_inputs
from frame_pack.options import FramePackGenerationOptions, FramePackTrainingOptions, FramePackVideoOptions
from frame_pack.requests import FramePackRequest, prepare_request
from hunyuan_model.spec import LATENT as VAE_LATENT
from modules.errors import OptionError
from modules.media.writing import write_png
from modules.options import read_options
from modules.parser import add_options
from modules.script_options import parse_options
from protocols.data import MediaEncoders
from protocols.one_frame import OneFrame, parse_one_frame, semicolon_hint
from protocols.requests import Prepared, Request
from tests.dataset.making import make_table
from tests.golden_cases import read_case
from tests.preparing import prepare
from tests.tiny.framepack import SIGLIP_DIM, write_siglip
from tests.tiny.framepack_dit import tiny_state, write_dit
from tests.tiny.project import write_image

WIDTH, HEIGHT = 48, 32


class Vae:
    """The mean of every 8 x 8 pixels in all channels, and the first number of the posterior's generator on
    top.
    """

    def __init__(self) -> None:
        self.count = 0

    def encode(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        self.count += 1
        (generator,) = generators
        assert pixels.shape == (1, 3, 1, HEIGHT, WIDTH)
        means = torch.nn.functional.avg_pool3d(pixels.mean(1, keepdim=True), (1, 8, 8))
        return means.repeat(1, 16, 1, 1, 1) + torch.randn((), generator=generator)


class Siglip:
    """What an image looks like on average."""

    def __init__(self) -> None:
        self.seen: Counter[float] = Counter()

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.shape == (1, 3, HEIGHT, WIDTH)
        mean = float(pixels.mean())
        self.seen[round(mean, 4)] += 1
        return torch.full((1, 4, 2), mean)


def encoders() -> MediaEncoders:
    return MediaEncoders(Vae(), Siglip())


def grey(path: Path, value: int, width: int = WIDTH, height: int = HEIGHT) -> Path:
    write_png(path, numpy.full((height, width, 3), value, dtype=numpy.uint8))
    return path


def request(*images: Path, seed: int = 3, end: Path | None = None, **own: tuple[Path, ...]) -> Prepared:
    """images: the start image of each section."""
    asked = Request("a cat", seed, WIDTH, HEIGHT, 37, end_image_path=end)
    return replace(prepare(asked), family_settings=FramePackRequest(images, **own))


def expected(value: int, seed: int = 3) -> float:
    return (
        value / 127.5 - 1 + float(torch.randn((), generator=posterior_generator(seed)))
    ) * VAE_LATENT.scale


def test_each_file_is_encoded_once_and_sections_share_it(tmp_path: Path) -> None:
    first, second = grey(tmp_path / "a.png", 10), grey(tmp_path / "b.png", 200)
    given = encoders()

    inputs = video_inputs(given, request(first, first, first, second, end=second))

    assert given.vae.count == 2
    assert list(given.image_encoder.seen.values()) == [1, 1]
    assert inputs.keys() == {0, 1, 2, 3}
    assert [float(inputs[index]["start_latents"].mean()) for index in range(4)] == pytest.approx(
        [expected(10)] * 3 + [expected(200)], abs=1e-5
    )
    assert inputs[1]["start_latents"] is inputs[0]["start_latents"]
    assert float(inputs[3]["image_embeddings"].mean()) == pytest.approx(200 / 127.5 - 1, abs=1e-5)
    assert float(inputs[0]["end_latents"].mean()) == pytest.approx(expected(200), abs=1e-5)
    assert all("end_latents" not in inputs[index] for index in (1, 2, 3))


# one picture


def test_without_a_mask_the_alpha_channel_is_one(tmp_path: Path) -> None:
    start = grey(tmp_path / "start.png", 50)
    half = numpy.full((HEIGHT, WIDTH, 4), 200, dtype=numpy.uint8)
    half[:, :, 3] = 102
    half[:, : WIDTH // 2, 3] = 255
    write_png(tmp_path / "half.png", half)

    inputs = one_frame_inputs(encoders(), request(start, controls=(tmp_path / "half.png",)))

    controls = inputs[0]["control_latents"]
    assert isinstance(controls, Tensor)
    left, right = controls[..., :2], controls[..., -2:]  # the two columns between are touched by the filter
    torch.testing.assert_close(left, torch.full_like(left, expected(200)), atol=2e-2, rtol=0)
    torch.testing.assert_close(right, torch.full_like(right, 0.4 * expected(200)), atol=2e-2, rtol=0)
    # a video has no masks: the picture is laid on white
    (video,) = video_inputs(encoders(), request(tmp_path / "half.png")).values()
    on_white = video["start_latents"][..., -2:]
    torch.testing.assert_close(on_white, torch.full_like(right, expected(233)), atol=2e-2, rtol=0)


DEFAULT = FramePack(FramePackFiles()).defaults
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
    matches_control_shape: bool = False,
    **said: Any,
) -> Prepared:
    values: dict[str, Any] = {"prompt": "a cat", "seed": 1, "width": 48, "height": 32, **said}
    request = Request(**values, extra={"image_path": str(picture), **(extra or {})})
    return prepare_request(request, DEFAULT, LATENT, window, f1, matches_control_shape)


def own(prepared: Prepared) -> FramePackRequest:
    assert isinstance(prepared.family_settings, FramePackRequest)
    return prepared.family_settings


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
    assert request.extra_metadata["video_sections"] == str(video["total_sections"])
    assert float(request.extra_metadata["video_seconds"]) == pytest.approx(
        video["final_pixel_frames"] / 30, rel=1e-4
    )


def test_samples_say_frames_which_are_made_whole_sections(
    picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert settle(picture, frames=73).frames == 73
    assert "whole sections" not in caplog.text
    assert settle(picture, frames=85).frames == 73
    assert "85 frames are rounded to 73" in caplog.text
    with pytest.raises(
        OptionError,
        match="33 frames do not fill a section, which has at least 37 with --latent_window_size 9",
    ):
        settle(picture, frames=33)


def test_nothing_said_makes_five_seconds_with_the_released_numbers(picture: Path) -> None:
    request = settle(picture)
    assert (request.frames, request.steps, request.fps, request.embedded_guidance) == (145, 25, 30.0, 10.0)
    assert (request.guidance_scale, request.solver) == ((1.0,), "unipc-bh1")


def test_another_solver_follows_the_same_levels(picture: Path) -> None:
    request = settle(picture, solver="euler")
    released = settle(picture, solver="unipc")
    assert (request.solver, released.solver) == ("euler", "unipc-bh1")
    assert request.flow_shift == released.flow_shift


@pytest.mark.parametrize("image", [(30, 90), (480, 270), (10, 400)], ids=str)
@pytest.mark.parametrize("area", [(64, 64), (832, 480)], ids=str)
def test_one_picture_has_the_size_that_a_data_set_would_give_its_control_image(
    picture: Path, image: tuple[int, int], area: tuple[int, int]
) -> None:
    control = picture.with_name("control.png")
    write_image(control, *image)
    table = make_table(control.parent, "image_directory", resolution=list(area), enable_bucket=True)
    width, height = find_bucket(table, image, LATENT.pixel_step, control)
    said: dict[str, Any] = {"width": area[0], "height": area[1], "matches_control_shape": True}

    with_control = settle(picture, {"one_frame": "default"}, control_images=(control, picture), **said)
    of_start = settle(control, {"one_frame": "default"}, **said)

    for prepared in (with_control, of_start):
        assert (prepared.width, prepared.height) == (width, height)
        given = settle(picture, {"one_frame": "default"}, width=width, height=height)
        assert prepared.flow_shift == given.flow_shift


def test_a_video_does_not_take_the_shape_of_its_image(
    picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = settle(picture, width=64, height=64, matches_control_shape=True)
    assert (prepared.width, prepared.height) == (64, 64)
    assert "--one_frame_auto_resize is ignored because a video is generated" in caplog.text


def test_a_length_that_another_one_replaces_is_told(caplog: pytest.LogCaptureFixture) -> None:
    FramePackVideoOptions(video_sections=2)
    assert not caplog.messages
    FramePackVideoOptions(video_sections=2, video_seconds=2.5)
    assert caplog.messages == ["--video_seconds 2.5 is ignored because --video_sections is given"]


FOUR = {"video_sections": "4"}
TWO_MASKS = {"one_frame": "default", "control_image_mask_path": "IMAGE\nIMAGE"}


@pytest.mark.parametrize(
    ("extra", "prompt", "controls", "said"),
    [
        (FOUR, "0:sits;;;1-2:walks;;;-1:sleeps", 0, ""),
        (FOUR, "0:sits;;;4-5:walks", 0, "--prompt: 'walks' for section 4 is ignored: none of"),
        (FOUR, "sits", 1, "--control_image_path is ignored because it is for --one_frame_inference"),
        (TWO_MASKS, "sits", 2, ""),
        (TWO_MASKS, "sits", 1, "of 2 masks the last 1 are ignored"),
    ],
)
def test_only_what_is_ignored_is_warned_of(
    picture: Path,
    extra: dict[str, str],
    prompt: str,
    controls: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {name: text.replace("IMAGE", str(picture)) for name, text in extra.items()}
    settle(picture, given, prompt=prompt, control_images=(picture,) * controls)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def training_family(folder: Path, *more: str) -> FramePack:
    parser = argparse.ArgumentParser()
    add_options(parser, FramePackTrainingOptions)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    return family_for_training(
        read_options(FramePackTrainingOptions, parser.parse_args([*files(folder), *more]))
    )


def files(folder: Path) -> list[str]:
    dit = write_dit(folder, tiny_state(image_dim=SIGLIP_DIM))
    return ["--dit", str(dit), "--image_encoder", str(write_siglip(folder / "siglip.safetensors"))]


def test_a_sample_of_a_training_of_pictures_is_a_picture_by_default(tmp_path: Path, picture: Path) -> None:
    samples = training_family(tmp_path, "--one_frame")

    def asked(**extra: str) -> OneFrame | None:
        request = Request("a cat", 1, 48, 32, extra={"image_path": str(picture), **extra})
        return own(samples.prepare(request)).one_frame

    assert asked() == asked(one_frame="default") == parse_one_frame("default")
    assert (
        asked(one_frame="target_index=5") == parse_one_frame("target_index=5") != parse_one_frame("default")
    )


def test_without_a_negative_prompt_it_is_empty(
    tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = family_for_generation(*parse_options("", files(tmp_path), FramePackGenerationOptions))
    asked = Request("a cat", 1, 48, 32, guidance_scale=3.0, extra={"image_path": str(picture)})
    for model, said in itertools.product((training_family(tmp_path), videos), ("", "dull")):
        prepared = model.prepare(replace(asked, negative_prompt=said or None))
        assert (prepared.guidance_scale, prepared.negative_prompt) == ((3.0,), said)
    assert not caplog.text


@pytest.mark.parametrize("places", ["0;10", "0+10", "0,10", " 0 , 10 "])
def test_places_of_control_images_may_be_separated_in_several_ways(places: str) -> None:
    found = parse_one_frame(f"target_index=1,control_index={places},no_post")

    assert (found.target_index, found.control_indices, found.has_post) == (1, (0, 10), False)


def test_a_text_that_the_shell_may_have_cut_gets_a_hint() -> None:
    assert "the shell ended the command" in semicolon_hint("target_index=1,control_index=0")
    assert semicolon_hint("target_index=1,control_index=0+10,no_post") == semicolon_hint("default") == ""
