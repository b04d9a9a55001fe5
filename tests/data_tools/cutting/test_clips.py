"""Clips: lengths in seconds and in frames, equal pieces, and what is left out."""

from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_tools.cutting.clips import BLURRED, SHORT, PictureMeasures, PlannedClip, VideoLook, plan_clips
from data_tools.cutting.options import ChoiceOptions, LengthOptions
from modules.media.measures import BLACK_PIXEL, STATIC_CHANGE
from modules.media.measures import BLURRED as BLURRED_BELOW

CHOICE = ChoiceOptions.usual(
    static_threshold=STATIC_CHANGE, black_threshold=BLACK_PIXEL, blur_threshold=BLURRED_BELOW
)


def lengths(**changes: Any) -> LengthOptions:
    usual = LengthOptions(min_seconds=0.0, max_seconds=0.0, min_frames=0, max_frames=0, trim_frames=0)
    return replace(usual, **changes)


def look_of(times: list[float], *cuts: int | tuple[int, int], **sample: Any) -> VideoLook:
    """A video whose frames begin at these times, the last of which is its end."""
    changes = [(one, one) if isinstance(one, int) else one for one in cuts]
    look = VideoLook(64, 48, array("d", times[:-1]), times[-1], changes=changes)
    for number in range(0, len(times) - 1, 6):
        cells = np.full((4, 4, 3), number % 200, np.uint8)
        look.samples.append(PictureMeasures(**{**USUAL, "cells": cells, **sample, "number": number}))
    return look


USUAL = {"number": 0, "brightness": 0.5, "sharpness": 0.1, "is_black": False, "is_flat": False}


def at_rate(rate: float, frames: int) -> list[float]:
    return [number / rate for number in range(frames + 1)]


def spans(clips: list[PlannedClip]) -> list[tuple[int, int]]:
    return [(clip.first, clip.end) for clip in clips if not clip.dropped]


def test_scenes_are_parted_at_cuts_and_lose_dissolves_and_what_is_trimmed() -> None:
    look = look_of(at_rate(25, 100), 30, (60, 70))

    assert spans(plan_clips(look, lengths(), CHOICE)) == [(0, 30), (30, 60), (70, 100)]
    assert spans(plan_clips(look, lengths(trim_frames=2), CHOICE)) == [(2, 28), (32, 58), (72, 98)]


@pytest.mark.parametrize("limit", [{"min_seconds": 1.0}, {"min_frames": 25}])
def test_short_scenes_are_left_out_and_counted(limit: dict[str, Any]) -> None:
    clips = plan_clips(look_of(at_rate(25, 100), 25, 49), lengths(**limit), CHOICE)

    assert spans(clips) == [(0, 25), (49, 100)]
    assert [clip.dropped for clip in clips] == ["", SHORT, ""]
    # of a scene nothing may be left
    clips = plan_clips(look_of(at_rate(25, 100), 4), lengths(trim_frames=2), CHOICE)
    assert [clip.dropped for clip in clips] == [SHORT, ""]


@pytest.mark.parametrize("limit", [{"max_seconds": 1.0}, {"max_frames": 25}])
def test_long_scenes_are_cut_into_equal_pieces(limit: dict[str, Any]) -> None:
    clips = plan_clips(look_of(at_rate(25, 90), 30), lengths(**limit), CHOICE)

    assert spans(clips) == [(0, 15), (15, 30), (30, 50), (50, 70), (70, 90)]


def test_pieces_of_a_variable_rate_are_equal_in_time() -> None:
    times = [*at_rate(20, 40)[:-1], *(2 + number / 5 for number in range(11))]  # 2 s at 20, 2 s at 5 a second

    clips = plan_clips(look_of(times), lengths(max_seconds=1.0), CHOICE)

    assert spans(clips) == [(0, 20), (20, 40), (40, 45), (45, 50)]
    assert [clip.seconds for clip in clips] == pytest.approx([1, 1, 1, 1])


def test_blurred_clips_are_left_out_on_demand() -> None:
    look = look_of(at_rate(25, 60), sharpness=0.0001)

    assert [clip.dropped for clip in plan_clips(look, lengths(), CHOICE)] == [""]
    choice = replace(CHOICE, drop_blurred=True)
    assert [clip.dropped for clip in plan_clips(look, lengths(), choice)] == [BLURRED]
