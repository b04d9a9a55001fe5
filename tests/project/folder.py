"""A folder of clips and pictures of mixed formats, as somebody has collected it."""

from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image

from modules.media.reading import Frame
from tests.tiny.project import moving_square

CAPTION = "mrsfluff, a square moves"


def write_folder(folder: Path, seconds: float = 1.5, size: tuple[int, int] = (96, 64)) -> None:
    """Write 12 files: clips of four containers and three rates, animations, pictures; all have captions."""
    folder.mkdir()
    clips = [("a.mp4", 30), ("b.mkv", 24), ("c.webm", 25), ("d.mov", 16), ("e.mp4", 60), ("f.avi", 30)]
    for seed, (name, rate) in enumerate(clips):
        frames = moving_square(round(seconds * rate), *size, seed)
        _write_clip(folder / name, frames, rate, "libvpx" if name.endswith("webm") else "libx264")
    for seed, name in enumerate(("g.gif", "h.webp")):
        first, *others = map(Image.fromarray, moving_square(round(seconds * 20), *size, seed))
        first.save(folder / name, save_all=True, append_images=others, duration=50)
    for seed, name in enumerate(("i.png", "j.jpg", "k.webp", "l.bmp")):
        Image.fromarray(moving_square(1, *size, seed)[0]).save(folder / name)
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"{CAPTION} {path.stem}", encoding="utf-8")


def _write_clip(path: Path, frames: Sequence[Frame], rate: int, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
