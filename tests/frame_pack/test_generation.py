"""What the transformer is given in every section of a video, in both orders of making, and in one picture."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from frame_pack.family import FramePack
from frame_pack.files import FramePackFiles
from frame_pack.one_frame import parse_one_frame
from frame_pack.sections import video_frames
from generation.denoise import SeededNoise
from tests.frame_pack.stubs import (
    START,
    Call,
    family,
    frame_values,
    golden_videos,
    images,
    make,
    plain,
    request,
    texts,
)
from tests.tiny.framepack_dit import tiny_state, write_dit

WINDOW = 9
HISTORY = ("clean_latents", "clean_latents_2x", "clean_latents_4x")


def seen(call: Call) -> list[float]:
    """The start image and the history, nearest to farthest in kind: 1x, 2x, 4x."""
    return [value for name in HISTORY for value in call.values(name)]


@pytest.mark.parametrize("video", golden_videos(), ids=lambda video: f"{video['total_sections']} sections")
def test_places_are_those_of_the_recorded_system(video: dict[str, Any]) -> None:
    count, window = video["total_sections"], video["latent_window_size"]

    made = make(family(window=window), request(video["final_pixel_frames"]), images(count))

    assert made.latents.shape[2] == video["final_latent_frames"]
    assert len(made.calls) == count
    for expected in video["sections"]:  # of long videos some
        call = made.calls[expected["order"]]
        assert call.image.unique().tolist() == [float(expected["section_index"])]
        first, last = expected["latent_indices_first_last"]
        assert call.indices.tolist() == [list(range(first, last + 1))]
        assert call.places("clean_latent_indices") == expected["clean_indices"]
        assert call.places("clean_latent_2x_indices") == list(_run(expected["clean_2x_first_last"]))
        assert call.places("clean_latent_4x_indices") == list(_run(expected["clean_4x_first_last"]))


@pytest.mark.parametrize("video", golden_videos(), ids=lambda video: f"{video['total_sections']} sections")
def test_places_of_f1_are_those_of_the_recorded_system(video: dict[str, Any]) -> None:
    model = family(is_f1=True, window=video["latent_window_size"])
    made = make(model, request(video["final_pixel_frames"]), images(video["total_sections"]))
    expected = video["f1"]

    assert len(made.calls) == video["total_sections"]
    for call in made.calls:
        assert call.indices.tolist() == [list(_run(expected["latent_indices_first_last"]))]
        assert call.places("clean_latent_indices") == expected["clean_indices"]
        assert call.places("clean_latent_2x_indices") == list(_run(expected["clean_2x_first_last"]))
        assert call.places("clean_latent_4x_indices") == list(_run(expected["clean_4x_first_last"]))


def _run(ends: list[int]) -> range:
    return range(ends[0], ends[1] + 1)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("end", [None, -1.0])
def test_the_video_is_made_from_its_end_and_sees_what_follows(count: int, end: float | None) -> None:
    made = make(family(), request(video_frames(count, WINDOW)), images(count, end))

    history = [0.0 if end is None else end, *[0.0] * 18]
    for number, call in enumerate(made.calls, start=1):
        section = count - number
        assert seen(call) == [START + section, *history[:19]]
        assert call.image.unique().tolist() == [float(section)]
        assert call.llama.unique().tolist() == [float(section)]
        history = [float(number)] * WINDOW + history
    # the start image of the first section stands in front; the last window made is played first
    playing = [START] + [float(number) for number in range(count, 0, -1) for _ in range(WINDOW)]
    assert frame_values(made.latents) == playing
    assert made.latents.shape[2] == WINDOW * count + 1


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("end", [None, -1.0])
def test_f1_makes_the_video_in_playing_order(count: int, end: float | None) -> None:
    made = make(family(is_f1=True, paddings=(3,)), request(video_frames(count, WINDOW)), images(count, end))

    history = [*[0.0] * 19, START]
    for section, call in enumerate(made.calls):
        assert seen(call) == [START + section, history[-1], *history[-3:-1], *history[-19:-3]]
        assert call.image.unique().tolist() == [float(section)]
        history += [float(section + 1)] * WINDOW
    assert frame_values(made.latents) == [START] + [
        float(number) for number in range(1, count + 1) for _ in range(WINDOW)
    ]


def test_paddings_of_the_first_sections_may_be_given() -> None:
    made = make(family(paddings=(0, 5)), request(video_frames(3, WINDOW)), images(3))
    assert [call.indices[0, 0].item() for call in made.calls] == [1, 1 + 5 * WINDOW, 1]


def test_noise_continues_one_generator_of_the_cpu_from_section_to_section() -> None:
    made = make(family(), request(video_frames(2, WINDOW), seed=31), images(2))
    generator = torch.Generator().manual_seed(31)
    for call in made.calls:
        assert torch.equal(call.noisy, torch.randn(call.noisy.shape, generator=generator))
        assert call.noisy.shape[2] == WINDOW


def test_guidance_and_timesteps_are_rounded_to_what_the_transformer_computes_in(tmp_path: Path) -> None:
    """As the released code; a file in bfloat16 has steps of 16 at 3300 and of 4 at 750."""
    model = FramePack(FramePackFiles(dit=write_dit(tmp_path, tiny_state(dtype=torch.bfloat16))))
    made = make(model, request(video_frames(1, WINDOW), embedded_guidance=3.3, steps=2), images(1))
    assert [call.guidance.item() for call in made.calls] == [3296.0, 3296.0]
    assert [call.timesteps.item() for call in made.calls] == [1000.0, 752.0]


@pytest.mark.parametrize("is_f1", [False, True])
def test_each_section_adds_a_piece_to_what_can_be_watched(is_f1: bool) -> None:
    model, asked, inputs = family(is_f1=is_f1), request(video_frames(3, WINDOW)), images(3)
    sections = model.sections(
        asked, {index: texts(0.0) for index in inputs}, inputs, SeededNoise(0, torch.device("cpu"))
    )
    section, pieces, labels = next(sections), [], []
    for number in (1.0, 2.0, 3.0):
        pieces.append(section.made)
        labels.append(section.label)
        with contextlib.suppress(StopIteration):
            section = sections.send(plain(number, WINDOW))
    assert labels == ["section 1 of 3", "section 2 of 3", "section 3 of 3"]
    assert pieces[0] is None
    found = [
        (frame_values(piece.latents), piece.overlap, piece.in_front)
        for piece in pieces[1:]
        if piece is not None
    ]
    ones, twos = [1.0] * WINDOW, [2.0] * WINDOW
    if is_f1:
        assert found == [([START, *ones], 0, False), (ones + twos, 33, False)]
    else:
        assert found == [(ones, 0, True), (twos + ones, 33, True)]


# one picture


def one_frame(settings: str, controls: int, **more: Any) -> Call:
    given = {"image_embeddings": torch.zeros(1, 4, 2)}
    if controls:
        given["control_latents"] = torch.cat([plain(10.0 + index) for index in range(controls)], dim=2)
    made = make(family(**more), request(1, one_frame=parse_one_frame(settings)), {0: given})
    (call,) = made.calls
    assert made.latents.shape == call.noisy.shape == (1, 16, 1, 2, 4)
    return call


BLACK_2X, BLACK_4X = [11, 12], [*range(13, 29)]


@pytest.mark.parametrize(
    ("settings", "controls", "target", "clean", "values", "coarse"),
    [
        ("default", 0, 9, [0, 10], [0.0, 0.0], [BLACK_2X, BLACK_4X]),
        ("default", 1, 9, [0, 10], [10.0, 0.0], [BLACK_2X, BLACK_4X]),
        ("no_2x,no_4x,no_post,target_index=9,control_index=0", 1, 9, [0], [10.0], [[], []]),
        # kisekaeichi
        ("target_index=1,control_index=0;10,no_post,no_2x,no_4x", 2, 1, [0, 10], [10.0, 11.0], [[], []]),
        # 1f-mc
        ("target_index=9,control_index=0;1", 2, 9, [0, 1, 10], [10.0, 11.0, 0.0], [BLACK_2X, BLACK_4X]),
        ("no_4x,target_index=40", 1, 40, [0, 10], [10.0, 0.0], [BLACK_2X, []]),
    ],
)
def test_the_documented_command_lines_of_one_picture(
    settings: str, controls: int, target: int, clean: list[int], values: list[float], coarse: list[list[int]]
) -> None:
    call = one_frame(settings, controls)

    assert call.indices.tolist() == [[target]]
    assert call.places("clean_latent_indices") == clean
    assert call.values("clean_latents") == values
    assert [call.places("clean_latent_2x_indices"), call.places("clean_latent_4x_indices")] == coarse
    for name, places in (("clean_latents_2x", coarse[0]), ("clean_latents_4x", coarse[1])):
        assert (name in call.history) == bool(places)
        if places:
            assert call.values(name) == [0.0] * len(places)
