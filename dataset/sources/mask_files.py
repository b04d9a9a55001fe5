"""Find out from their names which files are loss masks, and of which image or clip. Imports no torch."""

from collections.abc import Container, Iterable
from pathlib import Path

from modules.media.buckets import Size
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.labels import MASK_LABEL, find_stem_label, get_image_stem
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from modules.paths import compose_name

SAME_SHAPE = 0.02  # relative difference of aspect ratios that count as equal


def has_same_aspect(mask: Size, size: Size) -> bool:
    """Return whether a mask has the aspect ratio of its image or clip; both sizes are (width, height)."""
    mask_width, mask_height = mask
    width, height = size
    return abs(mask_width * height / (mask_height * width) - 1) <= SAME_SHAPE


def mask_suffixes(kind: str) -> frozenset[str]:
    """Return the suffixes of mask files: masks of clips may also be images or folders of images."""
    images = image_suffixes() | {".gif"}
    return images if kind == "image" else images | VIDEO_SUFFIXES | ANIMATION_SUFFIXES


def masks_by_stem(entries: Iterable[Path], kind: str, in_media_folder: bool) -> dict[str, list[Path]]:
    """Return the mask files among a folder's paths, by the stem of their image or clip (`compose_name`).

    Args:
        entries: Paths in the folder.
        kind: "image" or "video".
        in_media_folder: Whether the images or clips are in the same folder. Then only files with the mask
            label in their names are masks, because an image is not its own mask.
    """
    masks: dict[str, list[Path]] = {}
    for stem, paths in files_by_stem(entries, mask_suffixes(kind), kind == "video").items():
        if not in_media_folder or find_stem_label(stem) == MASK_LABEL:
            masks.setdefault(get_image_stem(stem, MASK_LABEL), []).extend(paths)
    return masks


def files_by_stem(
    entries: Iterable[Path], suffixes: Container[str], with_folders: bool
) -> dict[str, list[Path]]:
    """Return the files with these suffixes among the paths of a folder, by stem as `compose_name` returns it.

    With `with_folders`, subfolders are included, by their full names.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in entries:
        is_folder = with_folders and path.is_dir()
        if is_folder or (path.suffix.lower() in suffixes and path.is_file()):
            by_stem.setdefault(compose_name(path.name if is_folder else path.stem), []).append(path)
    return by_stem
