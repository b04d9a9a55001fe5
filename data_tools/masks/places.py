"""Know which mask belongs to which picture or clip of a folder, and change one mask as a person decides.

The mask of `cat.jpg` is `masks/cat.png`; that of `dance.mp4` is the folder `masks/dance`, with a picture for
each frame. Next to their pictures masks are `cat-masklabel.png` and `dance-masklabel`, as OneTrainer names
them. A made mask says in a text of its PNG (of a folder: of the first picture) how it was made; a mask
without it was drawn by a person. Before a mask changes, it is copied into the hidden folder `.before` next to
it, from where the last change of each mask can be undone. Imports no torch.
"""

import contextlib
import itertools
import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.masks.options import FOLDER_NAME
from dataset.sources.mask_files import is_of_shape, masks_by_stem
from modules.atomic_write import atomic_folder, explain_errors, replace_file, temporary_name
from modules.errors import DatasetError, MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.labels import MASK_LABEL, MASKS_BEFORE, label_of
from modules.media.reading import (
    VIDEO_SUFFIXES,
    count_frames,
    folder_images,
    frame_size,
    image_suffixes,
    is_still,
    read_mask,
    read_tags,
    video_frames,
)
from modules.media.writing import write_png
from modules.text_files import real_path

Gray = NDArray[np.uint8]  # H W, white is learned
Kind = Literal["image", "video"]
MADE, ACCEPTED = "mask", "mask_accepted"  # names of texts in a mask


@dataclass(frozen=True)
class MaskPlace:
    """An image or clip with the path of its mask, as found when the folder was listed."""

    medium: Path
    kind: Kind
    masks: tuple[Path, ...]  # files or folders that the dataset takes for its mask; more than one is a fault
    folder: Path  # of masks
    name: str  # of its mask without suffix

    @property
    def mask(self) -> Path | None:
        """Path of the existing mask; None if there is none."""
        return self.masks[0] if self.masks else None

    @property
    def before(self) -> Path:
        """Return the folder that holds the mask from before its last change, if any."""
        return self.folder / MASKS_BEFORE / self.medium.name

    @property
    def is_removed(self) -> bool:
        """Return whether a person has removed the mask; its copy stays until a new mask is made."""
        return not self.masks and self.before.is_dir() and any(self.before.iterdir())

    def target(self, moves: bool) -> Path:
        """Return the path for writing a mask.

        Args:
            moves: Whether the mask has an image for each frame of a clip.
        """
        return self.folder / (self.name if moves else f"{self.name}.png")

    def texts(self) -> dict[str, str]:
        """Return the texts stored in the mask file; {} if it is unreadable."""
        with contextlib.suppress(MediaError, OSError):
            if self.mask is not None:
                return read_tags(folder_images(self.mask)[0] if self.mask.is_dir() else self.mask)
        return {}

    def listed_anew(self) -> "MaskPlace":
        """Return the same place with the mask files that exist now."""
        return _list_places([(self.medium, self.kind)], self.folder)[0]


def find_mask_places(folder: Path, masks: Path | None = None) -> list[MaskPlace]:
    """Return where the mask of each image and clip in a folder is or would be, sorted by name.

    `masks` is the folder of masks; None means FOLDER/masks. If it is the folder of the images itself, masks
    lie next to the images.

    Raises:
        DatasetError: If the folder cannot be listed.
    """
    return _list_places(list_media(folder), folder / FOLDER_NAME if masks is None else masks)


def find_mask_place(medium: Path, masks: Path | None = None) -> MaskPlace:
    """Return where the mask of one image or clip is, or would be written.

    `masks` is the folder of masks; None means a folder `masks` next to the medium.
    """
    folder = medium.parent / FOLDER_NAME if masks is None else masks
    return _list_places([(medium, _kind_of(medium))], folder)[0]


def list_media(folder: Path) -> list[tuple[Path, Kind]]:
    """Return the visible images and clips of a folder, sorted, with their kinds, without masks.

    An animated GIF or WebP is a clip.

    Raises:
        DatasetError: If the folder cannot be listed.
    """
    suffixes = image_suffixes() | VIDEO_SUFFIXES | ANIMATION_SUFFIXES
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed: {error.strerror or error}") from None
    return [
        (path, _kind_of(path))
        for path in paths
        if path.suffix.lower() in suffixes
        and not path.name.startswith(".")
        # OneTrainer stores masks and conditioning images next to the images
        and label_of(path.stem) is None
        and path.is_file()
    ]


def _kind_of(path: Path) -> Kind:
    """Return whether a file counts as an image or as a clip, which animations do."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    try:
        return "video" if is_animation(path) else "image"
    except MediaError:  # it is reported when it is read
        return "image"


def _list_places(media: Sequence[tuple[Path, Kind]], folder: Path) -> list[MaskPlace]:
    """Return for each image or clip which masks exist in a folder, and what a new mask is called."""
    entries: list[Path] = []
    with contextlib.suppress(FileNotFoundError):
        entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    is_beside = any(real_path(folder) == real_path(medium.parent) for medium, _ in media[:1])
    by_kind: dict[str, Mapping[str, Sequence[Path]]] = {
        kind: masks_by_stem(entries, kind, is_beside) for kind in {kind for _, kind in media}
    }
    label = MASK_LABEL if is_beside else ""
    return [
        MaskPlace(medium, kind, tuple(by_kind[kind].get(medium.stem, ())), folder, medium.stem + label)
        for medium, kind in media
    ]


def mask_line(folder: PurePath) -> str:
    """Return the line of dataset.toml that makes a table use a folder of masks."""
    return f"mask_directory = {json.dumps(folder.as_posix(), ensure_ascii=False)}"  # as TOML quotes too


# --- reading and writing
# ------------------------------------------------------------------------------------------------------------


def read_frames(mask: Path) -> Iterator[Gray]:
    """Yield the frames of a mask, H W each: one for an image, several for a clip or a folder.

    Raises MediaError if the mask cannot be read.
    """
    if mask.is_dir():
        yield from (as_gray(read_mask(image)) for image in folder_images(mask))
    elif is_still(mask):
        yield as_gray(read_mask(mask))
    else:
        yield from (as_gray(frame) for frame in video_frames(mask))


def read_frame(mask: Path, number: int) -> Gray:
    """Return frame `number` of a mask, H W; the last frame if the mask is shorter.

    Raises MediaError if the mask cannot be read.
    """
    if mask.is_dir():
        images = folder_images(mask)
        return as_gray(read_mask(images[min(number, len(images) - 1)]))
    frames = itertools.islice(read_frames(mask), number + 1)
    return deque(frames, maxlen=1)[0]  # a clip without frames is a MediaError


def as_gray(pixels: NDArray[np.uint8]) -> Gray:
    """Convert an image, H W 3 or H W, to grayscale, H W, exactly as the dataset converts masks."""
    if pixels.ndim == 2:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)


class _AllBlackError(Exception):
    """All frames of a new mask are black, so that nothing would be learned."""


def write_mask(place: MaskPlace, frames: Iterable[Gray], moves: bool, texts: Mapping[str, str]) -> bool:
    """Write a mask and keep a copy of the existing one; return whether it was written.

    A mask that is black everywhere is not written, because nothing could be learned with it.

    Args:
        place: Image or clip, and the location of its mask.
        frames: Frames of the mask, H W each. Errors of the iterator pass through.
        moves: Whether the mask is a folder of frames; otherwise there is one frame.
        texts: Texts to store in the PNG, or in the first PNG of the folder.

    Raises:
        OutputError: If the mask cannot be written.
    """
    target = place.target(moves)
    try:
        if moves:
            with atomic_folder(target) as temporary:
                _write_frames(temporary, frames, texts)
                keep_before(place)
        else:
            (gray,) = frames
            if not gray.any():
                return False
            keep_before(place)
            write_png(target, gray, texts)
    except _AllBlackError:  # of `_write_frames`; the temporary folder is gone
        return False
    # an old mask of another form, such as a folder of frames
    if place.mask is not None and place.mask != target:
        _delete(place.mask)
    return True


def _write_frames(folder: Path, frames: Iterable[Gray], texts: Mapping[str, str]) -> None:
    """Write grayscale frames, H W each, as PNG files. Raises _AllBlackError if all are black."""
    has_white = False
    for number, gray in enumerate(frames):
        has_white = has_white or bool(gray.any())
        write_png(folder / f"{number:06}.png", gray, texts if number == 0 else None)
    if not has_white:
        raise _AllBlackError


def keep_before(place: MaskPlace) -> None:
    """Save a copy of the mask for `undo_change`, replacing an earlier copy.

    Raises OutputError if it cannot be written.
    """
    with atomic_folder(place.before) as temporary:
        if place.mask is None:
            return
        copy = temporary / place.mask.name
        if place.mask.is_dir():
            shutil.copytree(place.mask, copy)
        else:
            shutil.copyfile(place.mask, copy)


def _delete(path: Path) -> None:
    """Delete a file or folder in one step. Raises OutputError if that fails."""
    with explain_errors(path):
        if path.is_dir() and not path.is_symlink():
            waste = temporary_name(path)
            replace_file(path, waste)
            shutil.rmtree(waste, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- what a person does with a mask
# ------------------------------------------------------------------------------------------------------------


def is_reviewed(place: MaskPlace) -> bool:
    """Return whether a person has drawn, changed or accepted the mask; False without a mask."""
    texts = place.texts()
    return place.mask is not None and (ACCEPTED in texts or MADE not in texts)


def accept_mask(place: MaskPlace) -> None:
    """Mark a generated mask as accepted by a person, so that no run makes it again.

    Raises:
        DatasetError: If there is no mask.
        MediaError: If the mask cannot be read.
        OutputError: If the mask cannot be written.
    """
    mask = _require_mask(place)
    if is_reviewed(place):
        return
    first = folder_images(mask)[0] if mask.is_dir() else mask
    keep_before(place)
    write_png(first, as_gray(read_mask(first)), {**place.texts(), ACCEPTED: "yes"})


def invert_mask(place: MaskPlace) -> None:
    """Invert a mask, which then counts as drawn by a person.

    Raises:
        DatasetError: If there is no mask, or if nothing would be learned.
        MediaError: If the mask cannot be read.
        OutputError: If the mask cannot be written.
    """
    mask = _require_mask(place)
    inverted = (255 - gray for gray in read_frames(mask))
    if not write_mask(place, inverted, moves=not is_still(mask), texts={}):
        raise DatasetError(f"{mask} is all white: inverted, nothing of {place.medium.name} would be learned")


def remove_mask(place: MaskPlace) -> None:
    """Remove a mask; runs make it again only if they replace masks.

    Raises:
        DatasetError: If there is no mask.
        OutputError: If the files cannot be changed.
    """
    mask = _require_mask(place)
    keep_before(place)
    _delete(mask)


def replace_mask(place: MaskPlace, pixels: NDArray[np.uint8], number: int | None = None) -> None:
    """Store a mask that a person has drawn, in place of an existing one.

    Args:
        place: Image or clip, and the location of its mask.
        pixels: The mask, H W or H W 3; white is learned.
        number: Index of the frame of a clip that the mask is for; None for the full image or clip.

    Raises:
        DatasetError: If the shape differs from that of the image or clip, if the clip's mask has no such
            frame, or if nothing would be learned.
        MediaError: If an existing mask cannot be read.
        OutputError: If the mask cannot be written.
    """
    gray = as_gray(pixels)
    mask_size, size = (gray.shape[1], gray.shape[0]), frame_size(place.medium)
    if not is_of_shape(mask_size, size):
        raise DatasetError(
            f"The mask has {mask_size[0]}x{mask_size[1]} pixels, {place.medium.name} {size[0]}x{size[1]}: "
            "they need the same shape"
        )
    if number is None:
        frames: Iterable[Gray] = [gray]
    else:
        mask = _require_mask(place)
        if is_still(mask) or not 0 <= number < count_frames(mask):
            raise DatasetError(f"{mask} has no frame {number}, so that it cannot be replaced")
        # a generator: one frame of the old mask is replaced, the others are copied
        frames = (gray if index == number else old for index, old in enumerate(read_frames(mask)))
    if not write_mask(place, frames, moves=number is not None, texts={}):
        raise DatasetError(f"The mask of {place.medium.name} is all black: nothing would be learned")


def undo_change(place: MaskPlace) -> bool:
    """Restore the mask from before its last change; return False if there is no earlier mask.

    Changes by runs can be undone too. Raises OutputError if files cannot be changed.
    """
    if not place.before.is_dir():
        return False
    for mask in place.masks:
        _delete(mask)
    with explain_errors(place.folder):
        for copy in place.before.iterdir():
            replace_file(copy, place.folder / copy.name)
        shutil.rmtree(place.before)
    return True


def _require_mask(place: MaskPlace) -> Path:
    """Return the path of an existing mask.

    Raises:
        DatasetError: If there is no mask.
    """
    if place.mask is None:
        raise DatasetError(f"{place.medium.name} has no mask in {place.folder}")
    return place.mask
