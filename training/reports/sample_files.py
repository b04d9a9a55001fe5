"""Find the samples of a run by their names, and read them reduced: for the page, sheets and trackers."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modules.media.reading import Frame, read_image, video_frames, video_info
from modules.pages.embedding import reduce_frame

FOLDER = "sample"  # of samples, in the output folder
SIDE = 256  # pixels of the longer side
MOST_FRAMES = 96  # of a clip; longer ones keep every second frame, or fewer, at the same speed
GAP = 4  # pixels between the frames of a strip


@dataclass(frozen=True)
class ReducedClip:
    """Hold the frames of a sample, small and few."""

    frames: list[Frame]  # each H W 3
    fps: float

    @property
    def strip(self) -> list[Frame]:
        """Return the first, the middle and the last frame, or the only one."""
        last = len(self.frames) - 1
        return [self.frames[index] for index in dict.fromkeys((0, last // 2, last))]


def results_pattern(name: str) -> re.Pattern[str]:
    """Return what the names of all samples and sheets of a run match, and no others."""
    return re.compile(rf"{re.escape(name)}_(e?\d{{6,}})_(sheet\.png|\d{{2,9}}_\d{{14}}[\w.-]*)")


def find_samples(folder: Path, name: str, mark: str) -> dict[int, Path]:
    """Return the files of the samples with this mark by the number of their prompt, the newest of each."""
    pattern = re.compile(rf"{re.escape(name)}_{mark}_(\d{{2,9}})_(\d{{14}})(_\d+)?(_000)?\.(png|mp4)")
    newest: dict[int, tuple[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is not None:
            index, made = int(match[1]), match[2]
            newest[index] = max(newest.get(index, ("", path)), (made, path))
    return {index: path for index, (_, path) in sorted(newest.items())}


def read_reduced(path: Path, side: int = SIDE) -> ReducedClip:
    """Read a sample. Raises MediaError if it cannot be read."""
    if path.suffix == ".png":
        return ReducedClip([reduce_frame(read_image(path), side)], 1.0)
    frames: list[Frame] = []
    stride = 1
    for index, frame in enumerate(video_frames(path)):
        if index % stride:
            continue
        frames.append(reduce_frame(frame, side))
        if len(frames) > MOST_FRAMES:
            frames, stride = frames[::2], 2 * stride
    return ReducedClip(frames, (video_info(path).fps or 16.0) / stride)


def join_strip(clip: ReducedClip) -> Frame:
    """Return the first, the middle and the last frame side by side (H W 3), or the only one."""
    frames = clip.strip
    gap = np.full((frames[0].shape[0], GAP, 3), 24, np.uint8)
    joined = [frames[0]]
    for frame in frames[1:]:
        joined += [gap, frame]
    return np.concatenate(joined, axis=1)
