"""The sections of FramePack against recorded tables, their documented numbers, and a video that is cut into
sections.
"""

from typing import Any

import pytest
import torch

from frame_pack.sections import (
    ANTI_DRIFTING,
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
)
from modules.flow.schedule import make_schedule
from tests.golden_cases import read_case

DESCRIPTION, TENSORS = read_case("framepack_schedule")


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
