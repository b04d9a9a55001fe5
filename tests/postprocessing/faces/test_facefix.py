"""The stage of facefix, made from files by its options: what it changes, and what it leaves alone."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modules.errors import CheckpointError
from modules.media.encoding import OutputFrame, Pixels
from modules.media.reading import video_frames
from modules.media.writing import write_video
from postprocessing.chain_options import parse_tool
from postprocessing.contract import Clip
from postprocessing.faces.stage import Facefix, check_facefix, make_facefix
from tests.faults.messages import succeed_here
from tests.postprocessing.stages_here import kept_frames
from tests.tiny import post_restorers as tiny
from tests.tiny.onnx_files import write_yolo, write_yunet
from tests.tiny.post_faces import write_red_detector

WIDTH, HEIGHT, FACE = 96, 64, 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of both modes; a red dot is a face, and all of it is skin."""
    path = tmp_path_factory.mktemp("models")
    tiny.write_model(path / "GFPGANv1.4.pth", tiny.gfpgan_weights(), "params_ema")
    tiny.write_model(path / "codeformer.safetensors", tiny.codeformer_weights())
    tiny.write_model(path / "parsing_parsenet.pth", tiny.parsenet_weights(part=1))
    write_red_detector(path / "detection_Resnet50_Final.pth", FACE)
    return path


def _pixels(*dots: tuple[int, int], dtype: type = np.uint8) -> Pixels:
    """A dark wave with red dots of 8 x 8 pixels, given by their left and top."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    gray = (40 + 20 * np.sin(x / 9) * np.cos(y / 7)).astype(np.uint8)
    pixels = np.stack([gray] * 3, axis=-1)
    for left, top in dots:
        pixels[top : top + 8, left : left + 8] = (255, 0, 0)
    return pixels if dtype == np.uint8 else pixels.astype(np.uint16) * np.uint16(257)


def _images(frames: Sequence[Pixels]) -> Iterator[OutputFrame]:
    for index, pixels in enumerate(frames):
        yield OutputFrame(pixels, Fraction(index, 10), Fraction(1, 10))


def _linked(folder: Path, to: Path, *absent: str) -> Path:
    """All files but some in another folder, which is returned."""
    for path in folder.iterdir():
        if path.name not in absent:
            (to / path.name).symlink_to(path)
    return to


def _options(model: Path, *words: object) -> Any:
    return parse_tool(["facefix", "--model", str(model), *map(str, words)], "--then")[1]


def _stage(model: Path, *words: object) -> Facefix:
    options = _options(model, *words)
    check_facefix(options)
    stage = make_facefix(options, CPU)
    assert isinstance(stage, Facefix)
    return stage


def _run(stage: Facefix, frames: Sequence[Pixels], is_deep: bool = False) -> list[Pixels]:
    clip = Clip(Path("clip.mkv"), WIDTH, HEIGHT, Fraction(10), None, is_deep)
    made = list(stage.run(_images(frames), clip))
    assert [image.start for image in made] == [Fraction(i, 10) for i in range(len(frames))]
    size = stage.plan_output(clip)
    assert all(image.pixels.shape == (size.height, size.width, 3) for image in made)
    return [image.pixels for image in made]


def _changed(before: Pixels, after: Pixels) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom of what differs; nothing for equal pictures."""
    rows, columns = np.nonzero((before != after).any(axis=2))
    return [(columns.min(), rows.min(), columns.max(), rows.max())] if len(rows) else []


# what a face of 24 pixels at a dot may change: the 32 pixels of the template are 39 of the picture
def _lies_around(dot: tuple[int, int], box: tuple[int, int, int, int]) -> bool:
    left, top, right, bottom = box
    x, y = dot[0] + 4, dot[1] + 4
    return x - 32 < left < x < right < x + 32 and y - 32 < top < y < bottom < y + 32


@pytest.fixture(scope="module")
def usual(folder: Path) -> Facefix:
    return _stage(folder)


@pytest.mark.slow_cases("gfpgan")
@pytest.mark.parametrize("mode", ["gfpgan", "codeformer"])
def test_only_faces_change(folder: Path, mode: str) -> None:
    plain, faced = _pixels(), _pixels((40, 24))
    before = faced.copy()

    first, second, third = _run(_stage(folder, "--mode", mode), [plain, faced, plain])

    assert first is plain
    assert third is plain
    (box,) = _changed(faced, second)
    assert _lies_around((40, 24), box)
    assert np.array_equal(faced, before)  # the picture that was given is not written to


def test_what_is_not_part_of_the_face_stays(folder: Path, tmp_path: Path) -> None:
    models = _linked(folder, tmp_path, "parsing_parsenet.pth")
    tiny.write_model(models / "parsing_parsenet.pth", tiny.parsenet_weights(part=18))
    faced = _pixels((40, 24))

    (made,) = _run(_stage(models), [faced])

    assert np.array_equal(made, faced)


def test_several_faces_change_and_only_center_keeps_one(folder: Path, usual: Facefix) -> None:
    faced = _pixels((40, 24), (80, 8), (0, 48))

    (all_of_them,) = _run(usual, [faced])
    (central,) = _run(_stage(folder, "--only_center"), [faced])

    (box,) = _changed(faced, central)
    assert _lies_around((40, 24), box)
    (wide,) = _changed(faced, all_of_them)
    assert wide[0] < 8
    assert wide[2] > 84


@pytest.mark.parametrize(("dtype", "is_deep"), [(np.uint8, False), (np.uint8, True), (np.uint16, False)])
def test_sixteen_bits_stay_and_are_made_where_they_are_wanted(
    usual: Facefix, dtype: type, is_deep: bool
) -> None:
    plain, faced = _pixels(dtype=dtype), _pixels((40, 24), dtype=dtype)

    first, second = _run(usual, [plain, faced], is_deep)

    assert first is plain
    deep = is_deep or dtype == np.uint16
    assert second.dtype == (np.uint16 if deep else np.uint8)
    (in_bytes,) = _run(usual, [_pixels((40, 24))])  # faces of bytes are cut out as bytes
    np.testing.assert_allclose(second.astype(float) / (257 if deep else 1), in_bytes, atol=1)


@pytest.mark.slow
def test_noise_is_the_same_in_all_pictures_and_follows_the_seed(folder: Path, usual: Facefix) -> None:
    faced = _pixels((40, 24))
    stages = (usual, *(_stage(folder, "--seed", seed) for seed in ("1", "1", "blue")))
    stored, one, again, other = (_run(stage, [faced, faced]) for stage in stages)

    for first, second in (stored, one, other):
        assert np.array_equal(first, second)
    assert np.array_equal(one[0], again[0])
    assert not np.array_equal(stored[0], one[0])
    assert not np.array_equal(one[0], other[0])


def test_codeformer_says_that_it_has_no_use_for_a_seed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _stage(folder, "--mode", "codeformer", "--seed", "1")

    assert "--seed is ignored because CodeFormer" in caplog.text


@pytest.mark.slow_cases("0")
@pytest.mark.parametrize("smooth", [0, 0.5])
def test_faces_are_steadied_within_a_clip_only(folder: Path, smooth: float) -> None:
    stage = _stage(folder, "--smooth", smooth)

    class Trembling:
        """Its landmarks are off by as many hundredths of a pixel as the picture's first value says."""

        def find(self, pixels: Any, least_score: float) -> list[Any]:
            off = np.float32(pixels[0, 0, 0] / 100)
            found = stage.detector.find(pixels, least_score)
            return [replace(face, landmarks=face.landmarks + off) for face in found]

    trembling = replace(stage, detector=Trembling())
    first, second = (_pixels((40, 24)) for _ in range(2))
    first[0, 0, 0], second[0, 0, 0] = 0, 60

    together = _run(trembling, [first, second])[1]

    alone = _run(trembling, [second])[0]
    assert np.array_equal(together, alone) == (smooth == 0)
    assert np.array_equal(alone, _run(trembling, [second])[0])


def test_what_was_done_is_said_at_the_end(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _run(_stage(folder), [_pixels(), _pixels((40, 24), (80, 8))])
    _run(_stage(folder), [_pixels()])

    assert "clip.mkv: 2 faces restored in 1 of 2 images" in caplog.text
    assert "clip.mkv: no face was found with a score of 0.97 or more" in caplog.text
    assert "non-commercial use only" in caplog.text


def test_a_detector_that_says_it_has_no_landmarks_is_refused_before_anything_loads(
    folder: Path, tmp_path: Path
) -> None:
    boxes = write_yolo(tmp_path / "a.onnx", notes={"names": "{0: 'face'}"})
    with pytest.raises(CheckpointError, match="--detection_model .*a.onnx says where faces are, but not"):
        check_facefix(_options(folder, "--detection_model", str(boxes)))

    full = write_yolo(tmp_path / "b.onnx", notes={"names": "{0: 'face'}", "kpt_shape": "[5, 3]"})
    check_facefix(_options(folder, "--detection_model", str(full)))


@pytest.mark.parametrize(
    ("absent", "words", "said"),
    [
        ("GFPGANv1.4.pth", (), "no GFPGANv1.4.pth is in"),
        ("parsing_parsenet.pth", (), "no parsing_parsenet.pth is in"),
        ("detection_Resnet50_Final.pth", (), "no detection_Resnet50_Final.pth is in"),
        ("", ("--detection_model", "retinaface_mobile0.25"), "no detection_mobilenet0.25_Final.pth is in"),
        ("", ("--detection_model", "yunet"), "no .onnx file with yunet in its name is in"),
        (
            "",
            ("--detection_model", "my.pth"),
            "there is no such file. Pass the path of one, or one of retinaface_resnet50",
        ),
    ],
)
def test_a_missing_file_is_named_with_its_folder(
    folder: Path, tmp_path: Path, absent: str, words: tuple[str, ...], said: str
) -> None:
    models = _linked(folder, tmp_path, absent)

    with pytest.raises(CheckpointError) as error:
        check_facefix(_options(models, *words))

    assert said in str(error.value)
    assert "my.pth" in words or str(models) in str(error.value)


def test_helpers_lie_beside_a_file_too_and_may_be_safetensors(
    folder: Path, usual: Facefix, tmp_path: Path
) -> None:
    (tmp_path / "faces.pth").symlink_to(folder / "GFPGANv1.4.pth")
    (tmp_path / "Detection_resnet50_final.PTH").symlink_to(folder / "detection_Resnet50_Final.pth")
    tiny.write_model(tmp_path / "parsing_parsenet.safetensors", tiny.parsenet_weights(part=1))
    faced = _pixels((40, 24))

    (made,) = _run(_stage(tmp_path / "faces.pth"), [faced])

    assert np.array_equal(made, _run(usual, [faced])[0])


def test_networks_of_sizes_that_do_not_go_together_are_refused(folder: Path, tmp_path: Path) -> None:
    models = _linked(folder, tmp_path, "GFPGANv1.4.pth", "parsing_parsenet.pth")
    config = replace(tiny.GFPGAN, body=tiny.GFPGAN.body[:2], decoder=(8, 8), modulated_channels=(4,))
    tiny.write_model(models / "GFPGANv1.4.pth", tiny.gfpgan_weights(config))
    tiny.write_model(models / "parsing_parsenet.pth", tiny.parsenet_weights())

    check_facefix(_options(models))  # 8 pixels are enough for the two halvings of the tiny ParseNet
    parts = replace(tiny.PARSENET, down=(4, 6, 6, 8), up=(8, 6, 6, 4))
    tiny.write_model(models / "parsing_parsenet.pth", tiny.parsenet_weights(config=parts))
    with pytest.raises(CheckpointError, match="do not fit together"):
        check_facefix(_options(models))


def test_a_yunet_is_found_and_has_a_threshold_of_its_own(folder: Path, tmp_path: Path) -> None:
    write_yunet(_linked(folder, tmp_path) / "face_YuNet.onnx")
    stage = _stage(tmp_path, "--detection_model", "yunet")
    faced = _pixels((44, 28))

    assert stage.least_score == 0.8
    assert len(stage.detector.find(faced, 0.8)) == 1
    assert _run(stage, [faced])[0] is faced  # the tiny YuNet says that both eyes are at one place


def test_the_script_gives_what_the_whole_clip_at_once_gives(folder: Path, tmp_path: Path) -> None:
    clip, words = tmp_path / "a.mkv", ("--mode", "codeformer", "-s", 2)
    dots = [(), ((40, 24),), ((42, 25), (80, 8)), ((43, 25),), ()]
    write_video(clip, (_pixels(*each) for each in dots), 10, codec="h264", preset="ultrafast")

    files = ("--model", folder, "--input", clip, "--output", tmp_path / "b.mkv", "--codec", "h264")
    succeed_here("blissful_tuner/facefix.py", *files, "--keep_pngs", *words, folder=tmp_path)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script has it: sums of more threads round differently
    try:
        full = _run(_stage(folder, *words), list(video_frames(clip)))
    finally:
        torch.set_num_threads(threads)
    made = kept_frames(tmp_path)
    assert len(made) == len(dots) == len(list(video_frames(tmp_path / "b.mkv")))
    assert made[0].shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert all(np.array_equal(one, other) for one, other in zip(made, full, strict=True))
    assert np.abs(made[1].astype(int) - made[0]).max() > 40
