"""The sections of FramePack against recorded tables, their documented numbers, and a video that is cut into
sections.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from frame_pack.sections import (
    ANTI_DRIFTING,
    F1,
    HISTORY,
    Indices,
    Order,
    blend_overlaps,
    count_sections,
    count_tokens,
    decoding_slices,
    entry_for,
    flow_shift_for,
    parse_paddings,
    pixel_frames,
    section_frames,
    sections_in,
    video_frames,
    video_latents,
)
from modules.flow.schedule import make_schedule
from tests.golden_cases import read_case

DESCRIPTION, TENSORS = read_case("framepack_schedule")
TABLES = [
    pytest.param(
        table,
        id=f"{table['total_sections']} of {table['latent_window_size']}, {table['video_sections_option']}",
    )
    for table in DESCRIPTION["sections"]
]


def ends(indices: tuple[int, ...]) -> list[int]:
    """First and last of indices that have to be a run."""
    assert indices == tuple(range(indices[0], indices[-1] + 1))
    return [indices[0], indices[-1]]


def as_recorded(indices: Indices) -> dict[str, list[int]]:
    return {
        "clean_indices": list(indices.clean),
        "latent_indices_first_last": ends(indices.target),
        "clean_2x_first_last": ends(indices.clean_2x),
        "clean_4x_first_last": ends(indices.clean_4x),
    }


@pytest.mark.parametrize("table", TABLES)
def test_lengths_are_those_recorded(table: dict[str, Any]) -> None:
    window = table["latent_window_size"]
    sections = count_sections(table["video_seconds"], window, table["video_sections_option"])
    assert sections == table["total_sections"]
    assert section_frames(window) == table["frames_per_section_arg"]
    assert video_latents(sections, window) == table["final_latent_frames"]
    assert video_frames(sections, window) == table["final_pixel_frames"]
    assert sections_in(table["final_latent_frames"], window) == sections
    assert (
        len(ANTI_DRIFTING.plan(sections, window, ())[0].indices.target)
        == table["generated_latent_frames_per_section"]
    )


@pytest.mark.parametrize("table", TABLES)
def test_anti_drifting_sections_are_those_recorded(table: dict[str, Any]) -> None:
    plan = ANTI_DRIFTING.plan(table["total_sections"], table["latent_window_size"], ())
    assert [section.padding for section in plan] == table["latent_paddings"]
    assert [section.index for section in plan] == list(reversed(range(table["total_sections"])))
    for recorded in table["sections"]:
        section = plan[recorded["order"]]
        assert section.index == recorded["section_index"]
        assert section.padding == recorded["latent_padding"]
        assert as_recorded(section.indices).items() <= recorded.items()


@pytest.mark.parametrize("table", TABLES)
def test_f1_sections_are_those_recorded(table: dict[str, Any]) -> None:
    # paddings mean nothing to it
    plan = F1.plan(table["total_sections"], table["latent_window_size"], (3, 2))
    assert [section.padding for section in plan] == table["f1"]["latent_paddings"]
    assert [section.index for section in plan] == list(range(table["total_sections"]))
    assert all(as_recorded(section.indices).items() <= table["f1"].items() for section in plan)


@pytest.mark.parametrize(
    ("sections", "given", "paddings"),
    [(4, "0,0", [0, 0, 1, 0]), (5, "1", [1, 2, 2, 1, 0]), (2, " 3, 2 ,1,0", [3, 2]), (3, "0,0,0", [0, 0, 0])],
)
def test_given_paddings_replace_the_first(sections: int, given: str, paddings: list[int]) -> None:
    assert [section.padding for section in ANTI_DRIFTING.plan(sections, 9, parse_paddings(given))] == paddings


@pytest.mark.parametrize(
    ("seconds", "sections"), [(5.0, 4), (1.0, 1), (0.01, 1), (10.0, 8), (60.0, 50), (3.0, 2)]
)
def test_seconds_become_the_nearest_number_of_sections(seconds: float, sections: int) -> None:
    assert count_sections(seconds, 9) == sections


def test_a_training_video_shorter_than_a_section_has_none() -> None:
    assert [sections_in(frames, 9) for frames in (1, 9, 10, 18, 19)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({0: "first"}, ["first", "first", "first"]),
        ({0: "first", 1: "second"}, ["first", "second", "first"]),
        ({0: "first", -1: "end"}, ["first", "first", "end"]),
        # the index from the end wins
        ({0: "first", 2: "third", -1: "end", -3: "start"}, ["start", "first", "end"]),
    ],
)
def test_each_section_finds_its_entry(entries: dict[int, str], found: list[str]) -> None:
    assert [entry_for(entries, index, 3) for index in range(3)] == found


# The history


def frames(*values: int) -> Tensor:
    """Latents whose frames are known by their value."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1)


def seen(
    order: Order, sections: int, window: int, end: Tensor | None = None
) -> tuple[list[list[list[int]]], list[int]]:
    """Frames that each section sees as (clean, 2x, 4x), and the video, where its frames are 100 (start), 101,
    102, ...
    """
    start = frames(100)
    history, found = order.begin(start, end), []
    for section in order.plan(sections, window, ()):
        sees = order.seen(start, history)
        found.append(
            [latents.flatten().int().tolist() for latents in (sees.clean, sees.clean_2x, sees.clean_4x)]
        )
        assert [len(part) for part in found[-1]] == [
            len(part) for part in (section.indices.clean, section.indices.clean_2x, section.indices.clean_4x)
        ]
        first = 101 + section.index * window
        history = order.grown(history, frames(*range(first, first + window)))
    return found, order.video(start, history, sections * window).flatten().int().tolist()


@pytest.mark.parametrize("end", [None, 7])
@pytest.mark.parametrize("sections", [1, 2, 5])
def test_anti_drifting_sections_see_the_start_and_what_follows_them(sections: int, end: int | None) -> None:
    found, video = seen(ANTI_DRIFTING, sections, 9, None if end is None else frames(end))
    for made, (clean, half, quarter) in enumerate(found):
        index = sections - 1 - made
        later = [*range(101 + (index + 1) * 9, 101 + sections * 9), end or 0, *[0] * (HISTORY - 1)][:HISTORY]
        assert clean == [100, later[0]]
        assert half == later[1:3]
        assert quarter == later[3:19]
    assert video == list(range(100, 101 + sections * 9))


@pytest.mark.parametrize("sections", [1, 2, 5])
def test_f1_sections_see_the_start_and_what_came_before(sections: int) -> None:
    found, video = seen(F1, sections, 9, frames(7))  # an end image means nothing to it
    for index, (clean, half, quarter) in enumerate(found):
        before = [*[0] * HISTORY, *range(100, 101 + index * 9)][-HISTORY:]
        assert clean == [100, before[-1]]
        assert half == before[-3:-1]
        assert quarter == before[:16]
    assert video == list(range(100, 101 + sections * 9))


# The flow shift


@pytest.mark.parametrize(
    ("size", "shift"),
    [
        ((9, 60, 104), 7.0),
        ((9, 80, 80), 7.0),
        ((9, 20_000, 20_000), 7.0),  # whose exponential no number holds
        ((9, 32, 32), 2.33186),
        ((1, 64, 96), 2.0476),
        ((1, 80, 80), 2.0699),
    ],
)
def test_flow_shift_follows_the_number_of_tokens(size: tuple[int, int, int], shift: float) -> None:
    # as many digits as are documented
    assert flow_shift_for(count_tokens(*size)) == pytest.approx(shift, rel=5e-5)


@pytest.mark.parametrize("case", DESCRIPTION["sampler_cases"], ids=lambda case: str(case["latent"]))
def test_noise_levels_are_those_recorded(case: dict[str, Any]) -> None:
    tokens = count_tokens(*case["latent"])
    assert tokens == case["seq_len"]
    assert torch.tensor(flow_shift_for(tokens)).log().item() == pytest.approx(case["mu"], abs=1e-6)

    sigmas = make_schedule("unipc-bh1", case["steps"], flow_shift_for(tokens)).sigmas

    name = f"lat{'x'.join(map(str, case['latent']))}_steps{case['steps']}.sigmas"
    assert (sigmas - TENSORS[name]).abs().max() <= DESCRIPTION["tolerance"]["sigmas"]["atol"]


# Decoding


def decoded(latents: Tensor) -> Tensor:
    """A VAE that repeats frames: the first once, the others four times."""
    return torch.cat([latents[:, :, :1], latents[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("sections", [1, 2, 5, 50])
def test_decoding_by_sections_is_as_long_as_at_once(sections: int, window: int) -> None:
    latents = torch.zeros(1, 1, video_latents(sections, window), 1, 1)
    clips = [decoded(latents[:, :, part]) for part in decoding_slices(sections, window)]
    video = torch.cat(list(blend_overlaps(clips, section_frames(window))), dim=2)
    assert (
        video.shape[2]
        == decoded(latents).shape[2]
        == video_frames(sections, window)
        == 4 * window * sections + 1
    )


def test_clips_are_joined_as_the_released_code_does_from_the_end() -> None:
    overlap, generator = section_frames(2), torch.Generator().manual_seed(0)
    clips = [
        torch.randn(1, 3, pixel_frames(part.stop - part.start), 2, 2, generator=generator)
        for part in decoding_slices(4, 2)
    ]
    weights = torch.linspace(1, 0, overlap).view(1, 1, -1, 1, 1)
    whole = clips[-1]
    for clip in reversed(clips[:-1]):
        middle = weights * clip[:, :, -overlap:] + (1 - weights) * whole[:, :, :overlap]
        whole = torch.cat([clip[:, :, :-overlap], middle, whole[:, :, overlap:]], dim=2)

    joined = torch.cat(list(blend_overlaps(clips, overlap)), dim=2)

    assert torch.equal(joined, whole)  # each frame is the same sum


def test_clips_are_taken_one_by_one_and_given_on_before_the_next() -> None:
    taken: list[int] = []

    def clips() -> Any:
        for number in range(3):
            taken.append(number)
            yield torch.zeros(1, 1, 5, 1, 1)

    pieces = blend_overlaps(clips(), 2)
    next(pieces)
    assert taken == [0]
    next(pieces)
    assert taken == [0, 1]
