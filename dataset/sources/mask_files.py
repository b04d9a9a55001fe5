"""Know by their names which files are masks of the loss, and of which picture or clip. Imports no torch."""

from collections.abc import Container, Iterable
from pathlib import Path

from modules.media.buckets import Size
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.labels import MASK_LABEL, label_of, owner_of
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes

SAME_SHAPE = 0.02  # by how much the ratio of a mask's sides may differ from that of what it masks


def is_of_shape(mask: Size, size: Size) -> bool:
    """Return whether a mask has the shape of what it masks, in whatever size. Sizes are width and height."""
    return abs(mask[0] * size[1] / (mask[1] * size[0]) - 1) <= SAME_SHAPE


def mask_suffixes(kind: str) -> frozenset[str]:
    """Return the suffixes of masks: the mask of a clip may also be an image, or a folder of images."""
    images = image_suffixes() | {".gif"}
    return images if kind == "image" else images | VIDEO_SUFFIXES | ANIMATION_SUFFIXES


def masks_by_stem(entries: Iterable[Path], kind: str, is_beside: bool) -> dict[str, list[Path]]:
    """Return the masks among the entries of a folder, by the names without suffix of what they mask.

    `kind` is image or video. `is_beside` says that the folder is that of the images or clips themselves;
    then only files with the label of masks are masks, because an image is not a mask of itself.
    """
    masks: dict[str, list[Path]] = {}
    for stem, paths in files_by_stem(entries, mask_suffixes(kind), kind == "video").items():
        if not is_beside or label_of(stem) == MASK_LABEL:
            masks.setdefault(owner_of(stem, MASK_LABEL), []).extend(paths)
    return masks


def files_by_stem(
    entries: Iterable[Path], suffixes: Container[str], with_folders: bool
) -> dict[str, list[Path]]:
    """Return the files with these suffixes among the entries of a folder, by their names without suffix.

    With `with_folders`, folders are found too, by their full names.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in entries:
        is_folder = with_folders and path.is_dir()
        if is_folder or (path.suffix.lower() in suffixes and path.is_file()):
            by_stem.setdefault(path.name if is_folder else path.stem, []).append(path)
    return by_stem
