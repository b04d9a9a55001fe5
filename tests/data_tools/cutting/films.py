"""Films made of moving landscapes, with changes of scene at known frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.media.writing import write_timed_video

HEIGHT, WIDTH = 72, 128

Frame = NDArray[np.uint8]
Light = NDArray[np.float32]  # H W 3, 0..1


def landscape(seed: int) -> Light:
    """Soft random shapes in the colors of a random palette, twice as wide as a frame."""
    random = np.random.default_rng(seed)
    width = 2 * WIDTH
    shade = np.zeros((HEIGHT, width), np.float32)
    for cells in (3, 6, 12):
        small = random.random((cells, cells * width // HEIGHT)).astype(np.float32)
        shade += cv2.resize(small, (width, HEIGHT), interpolation=cv2.INTER_CUBIC) * cells**-0.5
    shade = (shade - shade.min()) / (shade.max() - shade.min())
    dark, light = 0.4 * random.random(3), 0.6 + 0.4 * random.random(3)
    return np.asarray(0.1 + 0.8 * (dark + (light - dark) * shade[..., None]), np.float32)


def scene(seed: int, frames: int, speed: float = 1.0) -> list[Light]:
    """A camera that moves over a landscape, `speed` pixels a frame."""
    wide = landscape(seed)
    places = [min(round(speed * number), WIDTH) for number in range(frames)]
    return [wide[:, place : place + WIDTH] for place in places]


def plain(value: float, frames: int) -> list[Light]:
    """Pictures of one gray."""
    return [np.full((HEIGHT, WIDTH, 3), value, np.float32)] * frames


def dissolve(first: Sequence[Light], second: Sequence[Light]) -> list[Light]:
    """Mix two scenes of equal length: the first frame is nearly the first scene, the last the second."""
    count = len(first)
    return [
        one + (other - one) * ((number + 1) / (count + 1))
        for number, (one, other) in enumerate(zip(first, second, strict=True))
    ]


def fade(frames: Sequence[Light], begin: float, end: float) -> list[Light]:
    """Change the brightness of a scene evenly."""
    steps = np.linspace(begin, end, len(frames))
    return [frame * np.float32(step) for frame, step in zip(frames, steps, strict=True)]


def to_bytes(light: Light) -> Frame:
    return np.asarray((light.clip(0, 1) * 255).round(), np.uint8)


def find_frame(frame: Frame, film: Sequence[Frame]) -> int:
    """Return which frame of a film this one is most like."""
    differences = [np.abs(frame.astype(np.int16) - one).mean() for one in film]
    return int(np.argmin(differences))


@dataclass(frozen=True)
class Shown:
    pixels: Frame
    start: Fraction
    seconds: Fraction


def write_film(path: Path, lights: Sequence[Light], times: Fraction | Sequence[Fraction]) -> Path:
    """Write frames at a rate, or from times on: those of all frames and of the end."""
    frames = [to_bytes(light) for light in lights]
    if isinstance(times, Fraction):
        rate, starts = times, [number / times for number in range(len(frames) + 1)]
    else:
        starts = list(times)
        rate = len(frames) / (starts[-1] - starts[0])
    shown = (
        Shown(frame, start, after - start)
        for frame, start, after in zip(frames, starts[:-1], starts[1:], strict=True)
    )
    write_timed_video(path, shown, rate, "h264", crf=8, preset="ultrafast")
    return path
