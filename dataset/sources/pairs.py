"""Preference pairs: find the rejected image or clip of each pair by its name, and read it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset.sources.clock import companion_frames
from dataset.sources.folders import list_entries
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Size
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes, resize_cover
from modules.option_values import format_shape
from modules.paths import compose_name

Clip = NDArray[np.uint8]  # F H W C


def add_rejected(
    table: DatasetTable, sources: Sequence[MediaSource], faults: list[Fault]
) -> list[MediaSource]:
    """Add the rejected image or clip of each preference pair, found by name in worse_directory.

    `cat.png` belongs to `cat.jpg`; a clip or a folder of images `cat` belongs to `cat.mp4`. Two files with
    the same name, and an item without a rejected file, are errors.
    """
    folder = table.source.worse_directory
    assert folder is not None
    kind = f"problems with worse_directory of {table.name}"
    try:
        # the files of worse_directory; for clips, a folder of frames counts as one file
        suffixes = image_suffixes() if table.kind == "image" else VIDEO_SUFFIXES | ANIMATION_SUFFIXES
        by_stem: dict[str, list[Path]] = {}
        for entry in list_entries(folder, "worse_directory", table.config_path):
            path = folder / entry.name
            if entry.is_dir():
                if table.kind == "video":
                    by_stem.setdefault(compose_name(entry.name), []).append(path)
            elif path.suffix.lower() in suffixes:
                by_stem.setdefault(compose_name(path.stem), []).append(path)
    except DatasetError as error:
        faults.append(Fault(kind, str(error)))
        return list(sources)
    paired = []
    for source in sources:
        paths = by_stem.get(compose_name(source.stem), [])
        if len(paths) > 1:
            text = f"{paths[0]} and {paths[1].name} are both the worse one of {source.path.name}. Keep one"
            faults.append(Fault(kind, text, source.stem))
        elif not paths:
            example = f"{source.stem}.png" if table.kind == "image" else f"{source.stem}.mp4"
            text = f"{source.path}: {folder} has no worse one for it, such as {example}"
            faults.append(Fault(kind, text, source.stem))
        paired.append(replace(source, rejected=paths[0]) if len(paths) == 1 else source)
    return paired


def require_equal_size(source: MediaSource, size: Size, rejected_size: Size) -> None:
    """Raise MediaError if an item's rejected image or clip differs from it in width or height."""
    if size != rejected_size:
        raise MediaError(
            f"{source.path} has {format_shape(size)} pixels, but its worse one, {source.rejected}, has "
            f"{format_shape(rejected_size)}: both of a pair need one size. Make both alike"
        )


def read_rejected_clip(
    local: MediaSource,
    size: Size,
    bucket: Size,
    count: int,
    fps: float,
    frame_times: Sequence[tuple[int, float]],
) -> Clip:
    """Read the rejected clip of a preference pair at the times of the chosen clip's frames: F H W 3.

    Args:
        local: The chosen clip, with local files.
        size: Size of the chosen clip in pixels.
        bucket: Size of the chosen clip's bucket.
        count: Number of kept frames of the chosen clip.
        fps: Frame rate of the kept frames.
        frame_times: Index and time of each kept frame.

    Raises:
        MediaError: If the rejected clip has a different size or is shorter.
    """
    assert local.rejected is not None
    frames: list[Clip] = []
    for frame in companion_frames(
        local.rejected, local.path, table=local.table, fps=fps, frame_times=frame_times
    ):
        if not frames:
            require_equal_size(local, size, (frame.shape[1], frame.shape[0]))
        frames.append(resize_cover(np.ascontiguousarray(frame[..., :3]), bucket))
        if len(frames) == count:
            return np.stack(frames)
    raise MediaError(
        f"{local.path} has {count} frames, but its worse one, {local.rejected}, only {len(frames)}: both "
        "clips of a pair must have the same length. Cut the longer one"
    )
