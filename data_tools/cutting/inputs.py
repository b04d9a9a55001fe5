"""Which videos are cut, and how their clips are named."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dataset.sources.stems import readable_stem
from modules.errors import MediaError
from modules.media.reading import VIDEO_SUFFIXES

# with what phones, cameras and broadcasts have
SUFFIXES = VIDEO_SUFFIXES | {".3gp", ".mts", ".m2ts", ".ts", ".vob", ".ogv"}
MARK = ".split_video"  # folder of the records, beside the clips


@dataclass(frozen=True)
class FootageSource:
    """A video to cut."""

    path: Path  # absolute
    stem: str  # the name its clips would have by its place below --input, if no other source has it


def find_videos(given: Path, output: Path) -> list[FootageSource]:
    """Return the videos of a folder and of the folders in it, by name, or the given one.

    Files in `output` are left out, if that is inside the folder, and so are clips that were cut into another
    folder there. Raises MediaError without any video.
    """
    if not given.is_dir():
        return [FootageSource(given.resolve(), readable_stem(given.stem))]
    root, own = given.resolve(), output.resolve()
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here / name != own)
        if here == root or not (here / MARK).is_dir():
            found += [here / name for name in sorted(names) if _is_video(here / name)]
    if not found:
        raise MediaError(
            f"--input {given} is a folder without videos (clips of this command do not count). Their names "
            f"end in {', '.join(sorted(SUFFIXES))}."
        )
    return [
        FootageSource(path, readable_stem("_".join(path.relative_to(root).with_suffix("").parts)))
        for path in found
    ]


def free_stem(wanted: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: with a number behind it if necessary.

    taken: without capitals, because file systems of Windows and macOS ignore them.
    """
    stem, number = wanted, 1
    while stem.casefold() in taken:
        number += 1
        stem = f"{wanted}-{number}"
    return stem


def clip_name(stem: str, number: int, suffix: str) -> str:
    """Return the name of a clip. number: from 1."""
    return f"{stem}_{number:05d}{suffix}"


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
