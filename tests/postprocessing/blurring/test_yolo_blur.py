"""Blurring from file to file through the script: faces are red dots, missed where they are paler; what is
covered in pictures in which nothing was found.
"""

import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from blissful_tuner.yolo_blur import main
from modules.errors import CheckpointError, NothingFoundError, OptionError
from modules.media.encoding import OutputFrame
from modules.media.reading import read_image, read_tags, video_frames
from modules.media.writing import write_png, write_video
from postprocessing.blurring.stage import clamp_boxes, cover_boxes, make_blur
from postprocessing.blurring.tracks import Box, Tracks
from postprocessing.chain_options import parse_tool
from postprocessing.contract import Clip
from postprocessing.faces.boxes import FoundFace
from postprocessing.options import BlurOptions, ToolNetworkOptions
from tests.tiny.onnx_files import write_yolo, write_yunet
from tests.tiny.post_faces import write_red_detector

HEIGHT, WIDTH, COUNT = 64, 96, 24
PALE = 125  # this red is missed (score 0.15), and can still be seen well
SEEN = 75  # at most so red is what is left of a dot under the blur


def frame(*dots: tuple[int, int, int]) -> np.ndarray:
    """Fine gray lines, and dots of 8 x 8 pixels around x, y in that red."""
    pixels = np.full((HEIGHT, WIDTH, 3), 70, np.uint8)
    pixels[::2] = 50
    for x, y, red in dots:
        pixels[max(0, y - 4) : y + 4, max(0, x - 4) : x + 4] = (red, 0, 0)
    return pixels


def moving_dot(missed: Sequence[int]) -> list[np.ndarray]:
    """A dot that moves to the right; it is paler in the frames in which it is to be missed."""
    return [frame((16 + 2 * index, 32, PALE if index in missed else 255)) for index in range(COUNT)]


def redness(pixels: np.ndarray) -> float:
    values = pixels.astype(float)
    return float((values[..., 0] - values[..., 1:].mean(axis=2)).max())


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_red_detector(tmp_path_factory.mktemp("detector") / "red.safetensors")


def blur(folder: Path, detector: Path, frames: Sequence[np.ndarray], *options: str) -> list[np.ndarray]:
    write_video(folder / "clip.mp4", frames, 12)
    output = folder / "out.mkv"
    words = ["--model", str(detector), "--input", str(folder / "clip.mp4"), "--output", str(output)]
    main([*words, "--device", "cpu", "--codec", "h264", *options])
    return list(video_frames(output))


def test_a_face_that_is_missed_in_some_frames_is_never_seen(
    tmp_path: Path, detector: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missed = [0, 1, 2, *range(11, 16), 22, 23]
    frames = moving_dot(missed)
    with caplog.at_level(logging.INFO):
        made = blur(tmp_path, detector, frames)

    assert len(made) == COUNT
    assert max(redness(each) for each in made) < SEEN
    assert (
        f"of {COUNT} frames, {COUNT - len(missed)} with something found, {len(missed)} blurred" in caplog.text
    )
    assert "Tracks: 1, the longest gap in one: 5 frames" in caplog.text


def test_below_conf_nothing_is_blurred(tmp_path: Path, detector: Path) -> None:
    frames = [frame((30, 32, 175)), frame((30, 32, 160))]  # of scores 0.85 and 0.67

    for conf, seen in (("0.5", []), ("0.8", [1])):
        made = blur(tmp_path, detector, frames, "--conf", conf, "--hold", "0", "--lookback", "0", "-y")
        assert [index for index, each in enumerate(made) if redness(each) > SEEN] == seen


def test_two_faces_that_cross_and_one_at_the_edge(tmp_path: Path, detector: Path) -> None:
    frames = [
        frame((16 + 3 * index, 30, 255), (85 - 3 * index, 34, 255), (3, 58, 255)) for index in range(COUNT)
    ]

    made = blur(tmp_path, detector, frames)

    for each in made:
        assert redness(each[:50]) < SEEN
        assert redness(each[50:, :12]) < 0.55 * 255  # a mean: half of what is left of it in the corner is red
        assert redness(each[50:, 12:]) < SEEN


def test_a_video_without_a_face_is_an_error_of_its_own(tmp_path: Path, detector: Path) -> None:
    with pytest.raises(NothingFoundError, match=r"no file was written(.|\n)*--conf(.|\n)*--allow_none"):
        blur(tmp_path, detector, [frame()] * 3)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]

    made = blur(tmp_path, detector, [frame()] * 3, "--allow_none")
    assert len(made) == 3


def test_pictures_of_a_folder_are_blurred_and_one_without_a_face_is_told(
    tmp_path: Path, detector: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_png(folder / "a.png", frame((40, 32, 255)))
    write_png(folder / "b.png", frame())
    words = ["--model", str(detector), "--input", str(folder), "--output", str(tmp_path / "out"), "-y"]

    with pytest.raises(Exception, match=r"b\.png(.|\n)*nothing was blurred") as raised:
        main([*words, "--device", "cpu"])

    assert raised.value.exit_code == 3  # type: ignore[attr-defined]
    (made,) = (tmp_path / "out").iterdir()
    assert redness(read_image(made)) < SEEN
    outside = changed(read_image(made), frame((40, 32, 255)))
    assert not outside[:20].any()
    assert not outside[:, :28].any()


def test_pictures_of_the_source_stay_behind_and_the_rest_is_kept(
    tmp_path: Path, detector: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = io.BytesIO()
    Image.fromarray(frame((40, 32, 255))).save(shown, format="PNG")
    write_video(tmp_path / "plain.mkv", [frame((40, 32, 255))] * 2, 12)
    with av.open(str(tmp_path / "plain.mkv")) as source, av.open(str(tmp_path / "clip.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        target.add_attachment("cover.png", "image/png", shown.getvalue())
        target.add_attachment("letters.ttf", "application/x-truetype-font", b"a font")
        target.metadata.update({"title": "At home", "xmp": "<x>", "note": "QUJD" * 200})
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)

    words = ["--model", str(detector), "--device", "cpu", "--codec", "h264", "--container", "mkv"]
    main([*words, "--input", str(tmp_path / "clip.mkv")])

    with av.open(str(tmp_path / "clip_blur.mkv")) as made:
        assert [each.type for each in made.streams] == ["video", "attachment"]
        assert made.streams[1].metadata["filename"] == "letters.ttf"
        tags = {name.lower(): text for name, text in made.metadata.items()}
        assert tags["title"] == "At home"
        assert not tags.keys() & {"xmp", "note"}
    assert caplog.text.count("is left out: ") == 1
    assert "left out, because it may contain an image: " in caplog.text


def test_texts_of_a_picture_that_may_hold_a_small_copy_stay_behind(tmp_path: Path, detector: Path) -> None:
    texts = {
        "prompt": "a face, " * 100,
        "XML:com.adobe.xmp": "<xmpGImg:image>",
        "Raw profile type exif": "\nexif\n  8\n",
        "workflow": "QUJD\n" + ("0f" * 36 + "\n") * 20,
    }
    write_png(tmp_path / "a.png", frame((40, 32, 255)), texts)

    main(["--model", str(detector), "--device", "cpu", "--input", str(tmp_path / "a.png")])

    assert read_tags(tmp_path / "a_blur.png").keys() == {"prompt", "post_1"}


def test_onnx_detectors_blur_too(tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "detector.onnx")
    frames = [frame((42, 28, 255))] * 3

    assert max(redness(each) for each in blur(tmp_path, path, frames)) < SEEN


def options(detector: Path, *words: str) -> BlurOptions:
    made: BlurOptions = parse_tool(["yolo_blur", "--model", str(detector), *words], "--then")[1]
    return made


def pictures(frames: Sequence[np.ndarray]) -> Iterator[OutputFrame]:
    for index, pixels in enumerate(frames):
        yield OutputFrame(pixels, Fraction(index, 12), Fraction(1, 12))


def clip_of(frames: Sequence[np.ndarray]) -> Clip:
    return Clip(Path("clip.mp4"), WIDTH, HEIGHT, Fraction(12), len(frames), True)


def test_pictures_keep_their_times_their_depth_and_all_other_pixels(detector: Path) -> None:
    frames = [each.astype(np.uint16) * 257 for each in moving_dot([3, 4])]
    stage = make_blur(options(detector), torch.device("cpu"))

    made = list(stage.run(pictures(frames), clip_of(frames)))

    assert [(each.start, each.seconds) for each in made] == [
        (Fraction(index, 12), Fraction(1, 12)) for index in range(COUNT)
    ]
    for index, each in enumerate(made):
        assert each.pixels.dtype == np.uint16
        touched = changed(each.pixels, frames[index])
        x = 16 + 2 * index
        assert touched[29:35, x - 3 : x + 3].all()
        assert not touched[:12].any()
        assert not touched[52:].any()
    assert not changed(made[0].pixels, frames[0])[:, 50:].any()


def test_a_bounded_number_of_pictures_waits(detector: Path) -> None:
    frames = moving_dot([])
    stage = make_blur(options(detector, "--hold", "4", "--lookback", "6"), torch.device("cpu"))
    taken: list[OutputFrame] = []

    def noted() -> Iterator[OutputFrame]:
        for image in pictures(frames):
            taken.append(image)
            yield image

    for given, _ in enumerate(stage.run(noted(), clip_of(frames)), 1):
        assert len(taken) <= given + 6
    assert given == COUNT


def test_a_box_that_is_no_number_covers_the_whole_picture() -> None:
    found = [
        FoundFace((float("nan"), 0, 5, 5), 0.9, None),
        FoundFace((float("-inf"), 1, 5, float("inf")), 0.9, None),
    ]

    assert clamp_boxes(found, 20, 30) == [(0, 0, 30, 20), (-30, 1, 5, 40)]
    assert clamp_boxes([FoundFace((9, 1, 5, 5), 0.9, None)], 20, 30) == []


def test_a_file_that_is_no_detector_is_refused_before_the_video_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")

    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        blur(tmp_path, tmp_path / "model.onnx", [frame()])
    with pytest.raises(OptionError, match="--compile"):
        blur(tmp_path, write_yunet(tmp_path / "yunet.onnx"), [frame()], "--compile")


HOLD, LOOKBACK = 6, 4


def at(x: float, y: float = 50, size: float = 20) -> Box:
    return x - size / 2, y - size / 2, x + size / 2, y + size / 2


def followed(found: Mapping[int, Sequence[Box]], pictures: int) -> tuple[list[list[Box]], Tracks]:
    """What is covered in each picture, asked for as late as the stage does."""
    tracks, box_to_cover = Tracks(HOLD, LOOKBACK), []
    delay = max(HOLD, LOOKBACK)
    for index in range(pictures + delay):
        if index < pictures:
            tracks.add_detections(index, found.get(index, []))
        if index >= delay:
            box_to_cover.append(tracks.boxes(index - delay))
            tracks.forget(index - delay)
    return box_to_cover, tracks


def holds(boxes: Sequence[Box], box: Box) -> bool:
    """Whether one of the boxes covers all of a box."""
    left, top, right, bottom = np.array(boxes).reshape(-1, 4).T
    is_around = (left <= box[0] + 1e-6) & (top <= box[1] + 1e-6)
    return bool((is_around & (right >= box[2] - 1e-6) & (bottom >= box[3] - 1e-6)).any())


def test_something_that_stands_still_is_covered_before_and_after_it_is_found() -> None:
    box_to_cover, _ = followed({10: [at(50)], 11: [at(50)]}, 30)

    held = [index for index, boxes in enumerate(box_to_cover) if boxes]
    assert held == list(range(10 - LOOKBACK, 11 + HOLD + 1))
    assert all(holds(boxes, at(50)) for boxes in box_to_cover if boxes)


def test_something_that_moves_is_expected_to_move_on() -> None:
    path = {index: at(100 + 5 * index) for index in range(30)}

    box_to_cover, _ = followed({index: [path[index]] for index in range(10, 15)}, 30)

    for index in range(10 - LOOKBACK, 15 + HOLD):
        assert holds(box_to_cover[index], path[index])


def test_a_jump_without_overlap_covers_where_it_was_and_the_way_from_there() -> None:
    box_to_cover, tracks = followed({5: [at(50)], 8: [at(75)]}, 20)

    assert holds(box_to_cover[6], at(50))
    assert holds(box_to_cover[6], at(50 + 25 / 3))
    assert holds(box_to_cover[5 + HOLD], at(50))  # it may have been another one
    assert tracks.num_objects == 1


def test_things_that_are_far_apart_are_not_one() -> None:
    box_to_cover, tracks = followed({5: [at(50)], 7: [at(150)]}, 30)

    assert tracks.num_objects == 2
    assert tracks.longest_gap == 0
    assert holds(box_to_cover[5 + HOLD], at(50))
    assert holds(box_to_cover[7 + HOLD], at(150))


def test_what_is_covered_grows_with_the_time_since_something_was_seen() -> None:
    box_to_cover, _ = followed({10: [at(50)]}, 30)

    for index in (10 - LOOKBACK, 10 + HOLD):
        grown = 20 * (1 + 2 * 0.02 * abs(index - 10))
        assert holds(box_to_cover[index], at(50, size=grown))
    assert box_to_cover[10] == [at(50)]


OLD = BlurOptions(network=ToolNetworkOptions(model=Path("detector.onnx")), margin=0.0, hold=0, lookback=0)


def noise(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype, endpoint=True)


def changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one != other).any(axis=2)


@pytest.mark.parametrize(("dtype", "method"), [(np.uint8, "blur"), (np.uint16, "blur"), (np.uint8, "fill")])
def test_pixels_outside_are_the_same_to_the_bit(dtype: type, method: str) -> None:
    pixels = noise(80, 120, dtype)
    before = pixels.copy()

    result = cover_boxes(pixels, [(30.4, 20.2, 69.5, 59.8)], dataclasses.replace(OLD, method=method))

    assert (pixels == before).all()
    assert result.dtype == dtype
    inside = np.zeros((80, 120), bool)
    inside[20:60, 30:70] = True
    assert not changed(result, pixels)[~inside].any()
    assert changed(result, pixels)[inside].mean() > 0.9


def test_a_box_of_usual_size_gets_the_blur_that_was_asked_for_mixed_with_its_surroundings() -> None:
    pixels = noise(200, 200)

    result = cover_boxes(pixels, [(60, 60, 140, 140)], OLD)

    expected = cv2.GaussianBlur(pixels, (51, 51), 40)
    assert (result[60:140, 60:140] == expected[60:140, 60:140]).all()


@pytest.mark.parametrize(("size", "dtype"), [(6, np.uint8), (24, np.uint16), (380, np.uint8)])
def test_detail_is_gone_whatever_the_size_of_the_box(size: int, dtype: type) -> None:
    """A pattern of eight squares across the box, about as coarse as an eye in a face."""
    side = 400
    cells = (np.arange(side) * 8 // size) % 2
    board = (cells[:, None] ^ cells[None]).astype(dtype) * np.iinfo(dtype).max
    pixels = board[..., None].repeat(3, axis=2)
    low = (side - size) // 2
    box = (low, low, low + size, low + size)

    result = cover_boxes(pixels, [box], OLD)[low : low + size, low : low + size].astype(float)

    assert np.ptp(result) / np.iinfo(dtype).max < (0.6 if size == 6 else 0.3)


def test_a_soft_edge_is_outside_of_the_box() -> None:
    pixels = np.full((100, 100, 3), 200, np.uint8)

    result = cover_boxes(pixels, [(30, 30, 70, 70)], dataclasses.replace(OLD, feather=0.1, method="fill"))

    assert (result[30:70, 30:70] == 0).all()
    row = result[50, 25:31, 0].astype(int)
    assert row[0] == 200
    assert (np.diff(row) < 0).all()
    assert (result[:, :26] == 200).all()


def test_an_ellipse_leaves_the_corners() -> None:
    pixels = noise(100, 100)

    result = cover_boxes(pixels, [(30, 40, 70, 60)], dataclasses.replace(OLD, ellipse=True, method="fill"))

    touched = changed(result, pixels)
    assert touched[40:60, 30:70].mean() == pytest.approx(np.pi / 4, abs=0.03)
    assert not touched[41, 31]
    assert touched[50, 30:70].all()
