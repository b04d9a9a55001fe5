"""The upscaler's script: what it writes is what a plain computation of the whole clip gives."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from modules.media.reading import read_image, video_frames
from tests.faults.messages import succeed_here
from tests.post.upscaling.plain_clips import FRAMES, HEIGHT, WIDTH, WRITERS, pictures, whole_clip

SCRIPT = "blissful_tuner/upscaler.py"


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """As in the script's process here, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_lossless(path: Path) -> Path:
    """A clip of odd size whose pixels come back as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("kind", "scale"), [("swinir", 3), ("esrgan", 4)])
def test_the_frames_of_a_video_are_those_of_a_plain_loop_to_the_bit(
    tmp_path: Path, kind: str, scale: int
) -> None:
    model, source = WRITERS[kind](tmp_path / "x.pth"), write_lossless(tmp_path / "clip.mkv")
    assert np.array_equal(np.stack(list(video_frames(source))), [each.pixels for each in pictures()])
    words = ["--model", model, "--input", source, "--mode", kind, "--scale", scale, "--device", "cpu"]

    succeed_here(SCRIPT, *words, "--codec", "h264", "--container", "mp4", "--keep_pngs", folder=tmp_path)

    expected = whole_clip(model, pictures(), scale, 255).numpy().astype(np.uint8)
    kept = [read_image(path) for path in sorted((tmp_path / "frames").iterdir())]
    assert np.array_equal(np.stack(kept), expected)
    shown = np.stack(list(video_frames(tmp_path / f"clip_{kind.upper()}.mp4")))
    assert len(shown) == FRAMES
    height, width = shown.shape[1:3]  # 4:2:0 takes even sizes only
    assert (height, width) == (HEIGHT * scale // 2 * 2, WIDTH * scale // 2 * 2)
    # colours are blurred by 4:2:0, brightness is not
    weights = np.array([0.2126, 0.7152, 0.0722])
    assert np.abs(shown @ weights - expected[:, :height, :width] @ weights).mean() < 3
