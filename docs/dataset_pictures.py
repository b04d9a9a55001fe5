"""Make docs/dataset_page.png, a page of tools/dataset_report.py.

    python docs/dataset_pictures.py

The clips of the page are drawn. It is photographed in a headless Chromium, which tests/chromium.py finds.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from modules.media.reading import Frame  # noqa: E402
from modules.media.writing import write_video  # noqa: E402
from modules.parser import Parser  # noqa: E402
from tests.chromium import open_page  # noqa: E402
from tests.data_tools.cutting.films import landscape  # noqa: E402
from tests.pictures import picture  # noqa: E402
from tools import dataset_report  # noqa: E402

CONFIG = """[general]
resolution = [480, 272]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
video_directory = "clips"
target_frames = [25]

[[datasets]]
video_directory = "portraits"
target_frames = [17]
num_repeats = 2
"""
CLIPS = (  # name, seed, frames, width, height, caption
    ("harbour", 3, 49, 480, 270, "a harbour at dusk, the camera moves slowly to the right"),
    ("hills", 5, 33, 480, 270, "green hills under a low sun, seen from a train"),
    ("hills again", 5, 33, 480, 270, "green hills under a low sun"),
    ("market", 8, 41, 480, 360, "a market in the rain, people with umbrellas"),
    ("square", 13, 29, 360, 360, "a square at night, lights in the windows"),
    ("coast", 21, 60, 640, 270, "a coast with high waves, the camera moves to the right"),
)
# parts of the page that are shown: from one heading to another
PARTS = (
    ("h1", "h3:has-text('All tables together')"),
    ("#table-1", "h3:has-text('Files and captions')"),
    ("#copies", "#faults"),
    ("#files", ".card >> nth=2"),
)
WIDTH, HEIGHT, COLOURS = 1180, 900, 200
MARGIN = 12  # pixels above each part


def main() -> None:
    """Write a small dataset, make its report, and save the parts of the page that the document shows."""
    Parser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        draw_clips(folder)
        (folder / "dataset.toml").write_text(CONFIG, encoding="utf-8")
        dataset_report.main(["--dataset_config", "dataset.toml", "--output", "page.html"])
        with open_page(folder / "page.html", WIDTH, HEIGHT) as page:
            places = [[_top_of(page, name) for name in part] for part in PARTS]
            page.screenshot(path=folder / "page.png", full_page=True)
        full = np.asarray(Image.open(folder / "page.png").convert("RGB"))
        shown = np.concatenate([full[top:bottom] for top, bottom in places])
        image = Image.fromarray(shown).quantize(COLOURS, dither=Image.Dither.NONE)
        image.save(ROOT / "docs" / "dataset_page.png", optimize=True)


def _top_of(page: Any, name: str) -> int:
    """Where the first element of this name begins, less a margin."""
    return max(0, round(page.locator(name).first.bounding_box()["y"]) - MARGIN)


def draw_clips(folder: Path) -> None:
    """Two folders of clips with captions; one clip is black, one stands still, one is a copy."""
    for place in ("clips", "portraits"):
        (folder / place).mkdir()
    for name, seed, frames, width, height, caption in CLIPS:
        write_clip(folder / "clips" / f"{name}.mp4", _pan(seed, frames, width, height), caption)
    still = _pan(34, 1, 270, 480)[0]
    write_clip(folder / "portraits" / "waiting.mp4", [still] * 25, "a man waits")
    write_clip(folder / "portraits" / "walking.mp4", _pan(55, 25, 270, 480), "a woman walks by")
    black = np.zeros((480, 270, 3), np.uint8)
    write_clip(folder / "portraits" / "night.mp4", [black] * 25, "")


def write_clip(path: Path, frames: list[Frame], caption: str) -> None:
    """Write a video at 24 frames per second and its caption next to it."""
    write_video(path, iter(frames), 24, crf=14, preset="veryfast")
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def _pan(seed: int, frames: int, width: int, height: int) -> list[Frame]:
    """A camera that moves over a drawn landscape, 3 pixels a frame."""
    size = (width + 3 * frames, height)
    colors = cv2.resize(landscape(seed) * 255, size, interpolation=cv2.INTER_CUBIC)
    wide = (0.7 * colors + 0.3 * picture(seed, size)).clip(0, 255).astype(np.uint8)
    return [np.ascontiguousarray(wide[:, 3 * index : 3 * index + width]) for index in range(frames)]


if __name__ == "__main__":
    main()
