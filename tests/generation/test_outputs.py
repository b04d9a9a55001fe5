"""Names, latent files, images, videos of every codec and container, their metadata, and the console."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.model_files import load_latents
from generation.outputs import drop_tail, output_stem, reserve_stem, save_latents, save_pixels
from generation.progress import log_job_progress, show_end, show_start
from generation.script_options import OutputOptions
from modules.errors import CheckpointError, OptionError
from modules.media.options import FormatOptions
from modules.media.pixels import pixels_to_uint8
from modules.media.reading import read_image, read_tags, video_frames
from protocols.requests import Request
from tests.generation.toy_family import ToyFamily
from tests.preparing import prepare


def clip(frames: int = 5) -> Iterator[Tensor]:
    """One chunk of one frame, then the rest; frame i has the gray value i / 10."""
    pixels = torch.stack([torch.full((1, 3, 16, 32), index / 10) for index in range(frames)], dim=2)
    yield pixels[:, :, :1]
    if frames > 1:
        yield pixels[:, :, 1:]


def test_names_hold_time_seed_and_origin() -> None:
    when = datetime(2025, 1, 2, 3, 4, 5)
    assert output_stem(when, 7) == "20250102-030405_7"
    assert output_stem(when, 7, Path("a/x_latent.safetensors")) == "20250102-030405_7_x_latent"
    assert output_stem(when, 7, Path("a/20240102-030405_8_cat_latent.safetensors")) == "20240102-030405_8_cat"


def test_a_name_that_a_run_has_is_given_to_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.mkv").touch()
    with reserve_stem(tmp_path, "a") as first:
        with reserve_stem(tmp_path, "a") as second:
            (tmp_path / f"{second}_latent.safetensors").touch()
        with reserve_stem(tmp_path, "a") as third:
            assert (first, second, third) == ("a_", "a__", "a___")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mkv", "a___latent.safetensors"]
    with reserve_stem(tmp_path, "a") as again:
        assert again == "a_"


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1",))


NO_LATENTS: dict[str, Any] = {
    "other tensor": {"weight": torch.zeros(2)},
    "wrong shape": {"latent": torch.zeros(2)},
    "two videos": {"latent": torch.zeros(2, 16, 1, 2, 2)},
    "no frame": {"latent": torch.zeros(16, 0, 2, 2)},
}


@pytest.mark.parametrize("kind", [*NO_LATENTS, "truncated", "code", "text"])
def test_files_without_latents_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x.pt" if kind in {"code", "text"} else "x.safetensors")
    if kind in NO_LATENTS:
        save_file(NO_LATENTS[kind], path)
    elif kind == "truncated":
        save_latents(path, torch.zeros(1, 4, 1, 2, 2), None)
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "code":
        torch.save({"latent": Harmful()}, path)
    else:
        path.write_text("hello")
    with pytest.raises(CheckpointError, match=path.name):
        load_latents(path)


def test_a_single_picture_may_have_a_number_and_lies_in_no_folder(tmp_path: Path) -> None:
    asked = output_options(tmp_path, "images", numbered=True)
    for name in ("a_000.png", "a__000.png"):
        assert save_pixels(asked, "a", clip(1), 16, None) == tmp_path / name


@pytest.mark.parametrize(
    ("output_type", "codec", "trim", "grey"),
    [("images", "h264", 0, 4), ("video", "prores", 0, 4), ("video", "h264", 2, 2)],
)
def test_the_last_frame_is_written_beside_a_video(
    tmp_path: Path, output_type: str, codec: str, trim: int, grey: int
) -> None:
    """As it was decoded, not as the video's codec changed it, and behind what is cut off."""
    said = output_options(tmp_path, output_type, trim=trim, codec=codec, last=True)
    path = save_pixels(said, "a", clip(), 16.0, {"bt_seeds": "7"})
    last = tmp_path / "a_last.png"
    assert {one.name for one in tmp_path.iterdir()} == {path.name, "a_last.png"}
    assert np.array_equal(read_image(last), pixels_to_uint8(torch.full((1, 3, 1, 16, 32), grey / 10))[0])
    assert read_tags(last)["bt_seeds"] == "7"


def test_a_last_frame_takes_nobodys_place(tmp_path: Path) -> None:
    (tmp_path / "a_last.png").touch()
    with reserve_stem(tmp_path, "a") as stem:
        assert stem == "a_"
    save_pixels(output_options(tmp_path, last=True), "a", clip(), 16.0, {})
    assert {path.name for path in tmp_path.iterdir()} == {"a_last.png", "a_.mp4", "a__last.png"}


@pytest.mark.parametrize(("count", "left"), [(0, [0, 1, 2]), (1, [0, 1]), (2, [0]), (5, [0])])
def test_the_tail_is_cut_but_one_frame_stays(count: int, left: list[int]) -> None:
    frames = [np.full((1, 1, 3), index, dtype=np.uint8) for index in range(3)]
    assert [int(frame[0, 0, 0]) for frame in drop_tail(iter(frames), count)] == left


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(OptionError, match="it is a file"):
        output_options(tmp_path / "x")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("../../etc/passwd <b>\x1b[31m NUL:", "etc-passwd-b-31m-NUL"),
        ("one two three four five six seven eight nine ten", "one-two-three-four-five-six-seven-eight"),
        ("漢" * 80, "漢" * 33),
        ("?!", ""),
    ],
)
def test_the_words_of_a_prompt_may_follow_the_known_name(prompt: str, words: str) -> None:
    stem = output_stem(datetime(2030, 1, 2, 3, 4, 5), 7, prompt=prompt)

    assert stem == "20300102-030405_7" + (f"_{words}" if words else "")
    assert len(stem.encode()) < 140


STREAMS = {"h264": ("h264", "yuv420p"), "h265": ("hevc", "yuv420p"), "prores": ("prores", "yuv422p10le")}
PROMPT = 'käfer 漢字 🐞 "quoted" = a; b # c\\d ' + "long " * 1000
METADATA = {"bt_prompt": PROMPT + "\nsecond line", "bt_seeds": "7", "bt_cfg_schedule": "1-3, e~2"}
AS_ONE_LINE = {**METADATA, "bt_prompt": PROMPT + "\\nsecond line"}


def save(
    folder: Path, codec: str, container: str, width: int = 96, height: int = 64, frames: int = 5
) -> Path:
    pixels = torch.linspace(-1, 1, frames).view(1, 1, -1, 1, 1).expand(1, 3, frames, height, width)
    asked = output_options(folder, codec=codec, container=container)
    return save_pixels(asked, "a", iter([pixels]), 16.0, METADATA)


def tags_by_av(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return {name.lower(): text for name, text in container.metadata.items()}


@pytest.mark.parametrize(("codec", "container"), [("h264", "mp4"), ("h265", "mkv"), ("prores", "mp4")])
def test_every_codec_and_container_keeps_frames_and_metadata(
    codec: str, container: str, tmp_path: Path
) -> None:
    path = save(tmp_path, codec, container)
    assert path.suffix == (".mkv" if codec == "prores" else f".{container}")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == STREAMS[codec]
        assert stream.average_rate == 16
    gray = np.stack(list(video_frames(path))).astype(int)
    assert gray.shape == (5, 64, 96, 3)
    assert abs(gray.mean((1, 2, 3)) - [0, 64, 128, 191, 255]).max() < 3
    assert np.ptp(gray, axis=3).max() <= 3  # no color
    for found in (read_tags(path), tags_by_av(path)):
        assert {key: found[key] for key in METADATA} == AS_ONE_LINE


@pytest.mark.parametrize(("width", "height", "codec"), [(62, 64, "h264"), (64, 48, "hevc")])
def test_pictures_too_small_for_h265_are_written_as_h264(
    width: int, height: int, codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "h265", "mkv", width, height)
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == codec
    assert ("--codec h265 is written as h264" in caplog.text) == (codec == "h264")
    assert {key: read_tags(path)[key] for key in METADATA} == AS_ONE_LINE


def output_options(
    folder: Path,
    output_type: str = "video",
    trim: int = 0,
    codec: str = "h264",
    container: str = "mp4",
    pngs: bool = False,
    numbered: bool = False,
    last: bool = False,
) -> OutputOptions:
    return OutputOptions(
        save_path=folder,
        output_type=output_type,
        no_metadata=False,
        trim_tail_frames=trim,
        no_progressive_save=False,
        prompt_in_name=False,
        save_last_frame=last,
        numbers_single=numbered,
        pictures=False,
        naming="",
        format=FormatOptions(codec=codec, container=container, keep_pngs=pngs),
    )


PREPARED = prepare(Request("a [red]cat[/]\nruns", 7, 48, 32, 5, 10, 5.0, None, 5.0, "unipc", 16.0, "bad"))


def test_a_file_of_prompts_says_where_it_is_and_how_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    requests = [PREPARED, replace(PREPARED, frames=10), PREPARED]

    for begun, (line, seconds) in enumerate([(1, 0.0), (2, 120.0), (4, 360.0)]):
        log_job_progress(f"line {line}", requests, begun, seconds)

    size = "48 x 32 (width x height), 5 frames, 10 steps, seed 7: a [red]cat[/] runs"
    assert caplog.messages[0] == f"1 of 3 (line 1): {size}"
    assert caplog.messages[1].startswith("2 of 3, about 6 min left (line 2): 48 x 32")
    assert caplog.messages[2] == f"3 of 3, about 2 min left (line 4): {size}"


def test_boxes_name_loras_and_count_the_files_of_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "frames").mkdir()
    for index in range(3):
        (tmp_path / "frames" / f"{index}.png").write_bytes(b"12")

    show_start(ToyFamily(), [PREPARED] * 2, {"": [("a.safetensors", 0.8)]}, tmp_path, torch.device("cpu"))
    show_end([tmp_path / "frames"], 3, torch.device("cpu"))

    assert "  LoRAs:  a.safetensors, strength 0.8\n  clips:  2; the first: 48 x 32" in caplog.text
    assert f"  result:      {tmp_path / 'frames'} (6 bytes)" in caplog.text

    show_start(ToyFamily(), [replace(PREPARED, frames=1)] * 2, {}, tmp_path, torch.device("cpu"))

    assert "  images: 2; the first: 48 x 32" in caplog.text
