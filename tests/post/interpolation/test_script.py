"""GIMMVFI.py from file to file, with narrow networks of both modes."""

from pathlib import Path

import av
import numpy as np
import pytest

from blissful_tuner.GIMMVFI import main
from modules.errors import CheckpointError, MediaError
from modules.media.reading import timed_frames, video_frames, video_info
from modules.media.writing import write_video
from tests.post.interpolation.test_stage import moving, plain
from tests.post.stages_here import kept_frames
from tests.tiny.post_flowformer import write_flowformer
from tests.tiny.post_interpolation import write_gimm_f, write_gimm_r


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of both modes."""
    folder = write_gimm_f(write_gimm_r(tmp_path_factory.mktemp("gimm")))
    write_flowformer(folder / "flowformer_sintel_fp32.safetensors")
    return folder


def write_odd(path: Path, count: int = 5) -> Path:
    """A clip of odd sides that holds its pixels exactly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 145, 129, "bgr0"
        for pixels in moving(count, width=145, height=129):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("mode", "factor", "count"), [("gimmvfi_r", 2, 5), ("gimmvfi_r", 3, 5), ("gimmvfi_f", 2, 3)]
)
def test_a_clip_gets_pictures_between(
    folder: Path, tmp_path: Path, mode: str, factor: int, count: int
) -> None:
    clip = write_odd(tmp_path / "clip.mkv", count)
    words = f"--input {clip} --model {folder} --mode {mode} --factor {factor} --device cpu"

    main([*words.split(), "--codec", "h264", "--container", "mp4", "--keep_pngs"])

    output = tmp_path / "clip_VFI.mp4"
    info = video_info(output)
    assert (info.width, info.height, info.fps) == (144, 128, 24 * factor)
    after = list(timed_frames(output))
    starts = [index / (24 * factor) for index in range((count - 1) * factor + 1)]
    assert [start for _, start, _ in after] == pytest.approx(starts, abs=0.001)

    sources = list(video_frames(clip))
    made = iter(plain(folder, sources, tuple(n / factor for n in range(1, factor)), mode))
    expected = [
        sources[index // factor] if index % factor == 0 else next(made) for index in range(len(after))
    ]
    for found, frame in zip(kept_frames(tmp_path), expected, strict=True):
        assert np.array_equal(found, frame)


def test_what_does_not_fit_is_refused_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.mkv"
    write_video(small, moving(3, width=64, height=64), 24, "prores")
    with pytest.raises(MediaError, match="needs at least 97 pixels"):
        main(f"--input {small} --model {folder} --mode gimmvfi_r --device cpu".split())
    single = write_odd(tmp_path / "single.mkv", count=1)
    with pytest.raises(MediaError, match="one picture"):
        main(f"--input {single} --model {folder} --mode gimmvfi_r --device cpu".split())
    with pytest.raises(CheckpointError, match="no file of gimmvfi_f"):
        main(f"--input {single} --model {tmp_path} --device cpu".split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["single.mkv", "small.mkv"]
