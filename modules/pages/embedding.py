"""Embed pictures and clips in a page as data, so that the page is one file."""

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from markupsafe import Markup
from PIL import Image

from modules.media.reading import Frame
from modules.media.writing import write_video

CLIP_CRF = 24  # smaller than what is kept: a page holds many clips


def embed_picture(frame: Frame, text: str, largest_side: int = 512, quality: int = 85) -> Markup:
    """Return an image tag with the frame (H W 3) as JPEG; `text` says what it shows.

    A frame with a longer side than `largest_side` pixels is reduced.
    """
    image = Image.fromarray(reduce_frame(frame, largest_side))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=quality)
    return Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(
        _as_url("image/jpeg", data.getvalue()), text, image.width, image.height
    )


def embed_clip(
    frames: Sequence[Frame], fps: float, text: str, largest_side: int = 512, has_controls: bool = True
) -> Markup:
    """Return a tag that plays the frames (each H W 3) in a loop; one frame becomes a picture.

    has_controls: show the browser's buttons, too large for a small clip. Frames with a longer side than
    `largest_side` pixels are reduced. Raises MediaError if there is no frame.
    """
    if len(frames) == 1:
        return embed_picture(frames[0], text, largest_side)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        reduced = (reduce_frame(frame, largest_side) for frame in frames)
        write_video(path, reduced, fps, crf=CLIP_CRF, preset="veryfast")
        data = path.read_bytes()
    controls = Markup(" controls" if has_controls else "")
    return Markup('<video src="{}" aria-label="{}" autoplay loop muted playsinline{}></video>').format(
        _as_url("video/mp4", data), text, controls
    )


def embed_svg(svg: str, text: str) -> Markup:
    """Return an image tag with an SVG drawing: as an image, it can neither run a script nor fetch."""
    return Markup('<img class="chart" src="{}" alt="{}">').format(
        _as_url("image/svg+xml", svg.encode()), text
    )


def reduce_frame(frame: Frame, largest_side: int) -> Frame:
    """Return a frame (H W 3) whose longer side is at most `largest_side` pixels."""
    height, width = frame.shape[:2]
    scale = largest_side / max(height, width)
    if scale >= 1:
        return frame
    size = (max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def _as_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
