"""Find which mask belongs to which image or clip of a folder, and change masks as a person decides.

The mask of `cat.jpg` is `masks/cat.png`; the mask of `dance.mp4` is the folder `masks/dance`, with an image
per frame. Masks next to their images are named `cat-masklabel.png` and `dance-masklabel`, as OneTrainer names
them. A generated mask says in a text entry of its PNG (in a folder: of the first one) how it was made; a mask
without it was drawn by a person. Before a mask changes, it is copied into the hidden folder `.before` next to
it, from which the last change of each mask can be undone. Imports no torch.
"""

import contextlib
import itertools
import json
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from dataset.sources.mask_files import has_same_aspect, masks_by_stem
from modules.atomic_write import atomic_folder, explain_errors, replace_file, temporary_name
from modules.errors import DatasetError, MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.labels import MASK_LABEL, MASKS_BEFORE, find_stem_label
from modules.media.reading import (
    VIDEO_SUFFIXES,
    count_frames,
    folder_images,
    frame_size,
    image_suffixes,
    is_single_image,
    read_mask,
    read_tags,
    video_frames,
)
from modules.media.writing import write_png
from modules.paths import compose_name
from modules.text_files import real_path

FOLDER_NAME = "masks"  # folder of the masks, inside the folder of the images
MODEL_FOLDER = Path("models/clipseg")  # tools/download.py writes these files
BACKGROUND_FILE = Path("models/background/u2net.onnx")
FACE_FILE = Path("models/facefix/face_detection_yunet_2023mar.onnx")
IS_COLOR = re.compile(r"#?([0-9a-fA-F]{6})")

Gray = NDArray[np.uint8]  # H W, white is learned
Kind = Literal["image", "video"]
# names of PNG text entries in a mask: how this program made it; whether a person accepted it
METHOD_TEXT, ACCEPTED_TEXT = "mask", "mask_accepted"


@dataclass(frozen=True)
class MaskEntry:
    """An image or clip with the path of its mask, as found when the folder was listed."""

    media_path: Path
    kind: Kind
    masks: tuple[Path, ...]  # files or folders that the dataset takes for its mask; more than one is an error
    mask_folder: Path
    mask_stem: str  # name of its mask without suffix

    @property
    def mask(self) -> Path | None:
        """Path of the existing mask; None if there is none."""
        return self.masks[0] if self.masks else None

    @property
    def backup_folder(self) -> Path:
        """Return the folder that contains the mask from before its last change, if any."""
        return self.mask_folder / MASKS_BEFORE / self.media_path.name

    @property
    def is_removed(self) -> bool:
        """Return whether a person has removed the mask; its backup stays until a new mask is made."""
        return not self.masks and self.backup_folder.is_dir() and any(self.backup_folder.iterdir())

    def mask_path(self, is_folder: bool) -> Path:
        """Return the path for writing a mask.

        Args:
            is_folder: Whether the mask is a folder with an image for each frame of a clip.
        """
        return self.mask_folder / (self.mask_stem if is_folder else f"{self.mask_stem}.png")

    def read_texts(self) -> dict[str, str]:
        """Return the texts stored in the PNG of the mask; {} if it is unreadable."""
        with contextlib.suppress(MediaError, OSError):
            if self.mask is not None:
                return read_tags(folder_images(self.mask)[0] if self.mask.is_dir() else self.mask)
        return {}

    def refresh(self) -> "MaskEntry":
        """Return the entry with the mask files that exist now."""
        return _list_entries([(self.media_path, self.kind)], self.mask_folder)[0]


def find_mask_entries(folder: Path, masks: Path | None = None) -> list[MaskEntry]:
    """Return where the mask of each image and clip in a folder is or would be, sorted by name.

    `masks` is the folder of masks; None means FOLDER/masks. If it is the folder of the images itself, masks
    lie next to the images.

    Raises:
        DatasetError: If the folder cannot be listed.
    """
    return _list_entries(list_media(folder), folder / FOLDER_NAME if masks is None else masks)


def find_mask_entry(media_path: Path, masks: Path | None = None) -> MaskEntry:
    """Return where the mask of one image or clip is, or would be written.

    `masks` is the folder of masks; None means a folder `masks` next to the media file.
    """
    folder = media_path.parent / FOLDER_NAME if masks is None else masks
    return _list_entries([(media_path, _get_media_kind(media_path))], folder)[0]


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
        (path, _get_media_kind(path))
        for path in paths
        if path.suffix.lower() in suffixes
        and not path.name.startswith(".")
        # OneTrainer stores masks and conditioning images next to the images
        and find_stem_label(path.stem) is None
        and path.is_file()
    ]


def _get_media_kind(path: Path) -> Kind:
    """Return whether a file counts as an image or as a clip; animated images are clips."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    try:
        return "video" if is_animation(path) else "image"
    except MediaError:  # it is reported when it is read
        return "image"


def _list_entries(media: Sequence[tuple[Path, Kind]], folder: Path) -> list[MaskEntry]:
    """Return for each image or clip which masks exist in a folder, and the name of a new mask."""
    visible_paths: list[Path] = []
    with contextlib.suppress(FileNotFoundError):
        visible_paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    # all media are in one folder, so the first one is sufficient
    is_next_to_media = any(real_path(folder) == real_path(media_path.parent) for media_path, _ in media[:1])
    masks_by_kind: dict[str, Mapping[str, Sequence[Path]]] = {}
    for kind in {kind for _, kind in media}:
        masks_by_kind[kind] = masks_by_stem(visible_paths, kind, is_next_to_media)
    label = MASK_LABEL if is_next_to_media else ""
    entries = []
    for media_path, kind in media:
        masks = tuple(masks_by_kind[kind].get(compose_name(media_path.stem), ()))
        entries.append(MaskEntry(media_path, kind, masks, folder, mask_stem=media_path.stem + label))
    return entries


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
    elif is_single_image(mask):
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
    """Raised if all frames of a new mask are black, so that nothing would be learned."""


def write_mask(entry: MaskEntry, frames: Iterable[Gray], is_folder: bool, texts: Mapping[str, str]) -> bool:
    """Write a mask and keep a copy of the existing one; return whether it was written.

    A mask that is black everywhere is not written, because nothing could be learned with it.

    Args:
        entry: Image or clip, and the location of its mask.
        frames: Frames of the mask, H W each. Errors of the iterator pass through.
        is_folder: Whether the mask is a folder of frames; otherwise there is one frame.
        texts: Text entries to store in the PNG, or in the first PNG of the folder.

    Raises:
        OutputError: If the mask cannot be written.
    """
    target = entry.mask_path(is_folder)
    try:
        if is_folder:
            with atomic_folder(target) as temporary:
                _write_frames(temporary, frames, texts)
                backup_mask(entry)
        else:
            (gray,) = frames
            if not gray.any():
                return False
            backup_mask(entry)
            write_png(target, gray, texts)
    except _AllBlackError:  # of `_write_frames`; the temporary folder is gone
        return False
    # an old mask of a different form, such as a folder of frames
    if entry.mask is not None and entry.mask != target:
        _delete(entry.mask)
    return True


def _write_frames(folder: Path, frames: Iterable[Gray], texts: Mapping[str, str]) -> None:
    """Write grayscale frames, H W each, as PNG files. Raises _AllBlackError if all are black."""
    has_white = False
    for number, gray in enumerate(frames):
        has_white = has_white or bool(gray.any())
        write_png(folder / f"{number:06}.png", gray, texts if number == 0 else None)
    if not has_white:
        raise _AllBlackError


def backup_mask(entry: MaskEntry) -> None:
    """Save a copy of the mask for `undo_change`, replacing an earlier copy.

    Raises OutputError if it cannot be written.
    """
    with atomic_folder(entry.backup_folder) as temporary:
        if entry.mask is None:
            return
        copy = temporary / entry.mask.name
        if entry.mask.is_dir():
            shutil.copytree(entry.mask, copy)
        else:
            shutil.copyfile(entry.mask, copy)


def _delete(path: Path) -> None:
    """Delete a file or folder in one step. Raises OutputError if that fails."""
    with explain_errors(path):
        if path.is_dir() and not path.is_symlink():
            waste = temporary_name(path)
            replace_file(path, waste)
            shutil.rmtree(waste, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- actions of a person on a mask
# ------------------------------------------------------------------------------------------------------------


def is_reviewed(entry: MaskEntry) -> bool:
    """Return whether a person has drawn, changed or accepted the mask; False without a mask."""
    texts = entry.read_texts()
    return entry.mask is not None and (ACCEPTED_TEXT in texts or METHOD_TEXT not in texts)


def accept_mask(entry: MaskEntry) -> None:
    """Mark a generated mask as accepted by a person, so that no run makes it again.

    Raises:
        DatasetError: If there is no mask.
        MediaError: If the mask cannot be read.
        OutputError: If the mask cannot be written.
    """
    mask = _require_mask(entry)
    if is_reviewed(entry):
        return
    first = folder_images(mask)[0] if mask.is_dir() else mask
    backup_mask(entry)
    write_png(first, as_gray(read_mask(first)), {**entry.read_texts(), ACCEPTED_TEXT: "yes"})


def invert_mask(entry: MaskEntry) -> None:
    """Invert a mask, which then counts as drawn by a person.

    Raises:
        DatasetError: If there is no mask, or if nothing would be learned.
        MediaError: If the mask cannot be read.
        OutputError: If the mask cannot be written.
    """
    mask = _require_mask(entry)
    inverted = (255 - gray for gray in read_frames(mask))
    if not write_mask(entry, inverted, is_folder=not is_single_image(mask), texts={}):
        raise DatasetError(
            f"{mask} is all white: if inverted, nothing of {entry.media_path.name} would be learned"
        )


def remove_mask(entry: MaskEntry) -> None:
    """Remove a mask; a masking run makes it again only if it replaces masks.

    Raises:
        DatasetError: If there is no mask.
        OutputError: If the files cannot be changed.
    """
    mask = _require_mask(entry)
    backup_mask(entry)
    _delete(mask)


def replace_mask(entry: MaskEntry, pixels: NDArray[np.uint8], frame_index: int | None = None) -> None:
    """Store a mask that a person has drawn, in place of an existing one.

    Args:
        entry: Image or clip, and the location of its mask.
        pixels: The mask, H W or H W 3; white is learned.
        frame_index: Frame of a clip that the mask is for; None for the full image or clip.

    Raises:
        DatasetError: If the shape differs from the image's or clip's shape, if the clip's mask has no such
            frame, or if nothing would be learned.
        MediaError: If an existing mask cannot be read.
        OutputError: If the mask cannot be written.
    """
    drawn_mask = as_gray(pixels)
    height, width = drawn_mask.shape
    media_width, media_height = frame_size(entry.media_path)
    if not has_same_aspect((width, height), (media_width, media_height)):
        raise DatasetError(
            f"The mask has {width}x{height} pixels, {entry.media_path.name} {media_width}x{media_height}: "
            "they need the same shape"
        )
    frames: Iterable[Gray] = [drawn_mask]
    if frame_index is not None:
        # a clip's frames are read one by one, and one of them is replaced
        mask = _require_mask(entry)
        if is_single_image(mask) or not 0 <= frame_index < count_frames(mask):
            raise DatasetError(f"{mask} has no frame {frame_index}, so it cannot be replaced")
        frames = (drawn_mask if index == frame_index else old for index, old in enumerate(read_frames(mask)))
    # without a recorded method the mask counts as drawn by a person
    if not write_mask(entry, frames, is_folder=frame_index is not None, texts={}):
        raise DatasetError(f"The mask of {entry.media_path.name} is all black: nothing would be learned")


def undo_change(entry: MaskEntry) -> bool:
    """Restore the mask from before its last change; return False if there is no earlier mask.

    Changes that a masking run made can be undone too. Raises OutputError if files cannot be changed.
    """
    if not entry.backup_folder.is_dir():
        return False
    for mask in entry.masks:
        _delete(mask)
    with explain_errors(entry.mask_folder):
        for copy in entry.backup_folder.iterdir():
            replace_file(copy, entry.mask_folder / copy.name)
        shutil.rmtree(entry.backup_folder)
    return True


def _require_mask(entry: MaskEntry) -> Path:
    """Return the path of an existing mask."""
    if entry.mask is None:
        raise DatasetError(f"{entry.media_path.name} has no mask in {entry.mask_folder}")
    return entry.mask
