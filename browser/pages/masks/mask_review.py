"""Show the images and clips of a folder with their masks, and change a mask with a key or a brush."""

import io
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from browser.core.page_root import add_root
from browser.core.short_names import short_digest
from browser.core.upload_stream import DECODING
from browser.folders.described_folder import DATASET_FILE
from browser.folders.offered_folders import MEDIA_KEYS, read_tables
from browser.runs.runs import Runs
from data_tools.masks.places import (
    ACCEPTED_TEXT,
    METHOD_TEXT,
    MaskEntry,
    accept_mask,
    find_mask_entries,
    invert_mask,
    read_frame,
    remove_mask,
    replace_mask,
    undo_change,
)
from modules.errors import MediaError
from modules.file_locks import only_one
from modules.media.colors import split_bands
from modules.media.labels import MASK_LABEL, find_stem_label
from modules.media.reading import count_frames, first_frame, image_size, video_frames
from modules.media.streams import source_info
from modules.pages.language import refusal, say
from modules.pages.page import encode_address, reduce_frame
from modules.text_files import real_path

ADDRESS = "/masks"
LARGEST_SIDE = 1600  # pixels of an image in the page; masks for the brush have full size
LOCK = ".masks.lock"  # in the media folder, while one of its masks is changed
MAX_JPEGS = 60  # images in memory, about 200 KB each
MAX_UNDONE = 1000
# states of masks
NONE, GENERATED, ACCEPTED_BY_USER, DRAWN, REMOVED = "none", "made", "accepted", "drawn", "removed"
STATES = {
    NONE: say("no mask"),
    GENERATED: say("made by a program"),
    ACCEPTED_BY_USER: say("accepted"),
    DRAWN: say("drawn by hand"),
    REMOVED: say("thrown away"),
}
MASK_ACTIONS = {"accept": accept_mask, "invert": invert_mask, "remove": remove_mask}


class MaskConflictError(Exception):
    """Raised if a mask has changed since the page read it."""


@dataclass(frozen=True)
class MaskImage:
    """Encoded image of a frame or a mask, ready to be sent."""

    content: bytes
    kind: str  # media type


class _MaskChange(NamedTuple):
    """A mask change that can be undone as long as the mask still has this version."""

    path: Path  # image or clip
    mask_version: str


@dataclass
class MaskReview:
    """Reads and changes the masks of folders below the roots. Changes can be undone until the server ends."""

    runs: Runs
    _changes: dict[Path, list[_MaskChange]] = field(default_factory=dict)  # keyed by folder, the newest last
    # frames by the path of their file, its modification time and the index of the frame
    _jpegs: "OrderedDict[tuple[Path, int, int], bytes]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # held while a mask is changed

    def list_media(self, folder: Path) -> list[MaskEntry]:
        """Return each image and clip of a folder with its mask.

        Raises DatasetError if it cannot be listed.
        """
        return find_mask_entries(folder, find_masks_folder(self.runs, folder))

    def find(self, folder: Path, id: str) -> MaskEntry | None:
        """Return an image or clip by its id.

        Returns None if it does not exist, or if it or its mask is outside the roots.
        """
        for media_file in self.list_media(folder):
            if name_id(media_file) == id:
                return media_file if self.may_show(media_file) else None
        return None

    def may_show(self, media_file: MaskEntry) -> bool:
        """Return whether a file, its mask and the mask's history are below the roots, with links resolved."""
        paths = [media_file.media_path, *media_file.masks]
        kept = media_file.backup_folder.parent
        paths += [
            path for path in (media_file.mask_folder, kept, media_file.backup_folder) if os.path.lexists(path)
        ]
        for mask in media_file.masks:
            if mask.is_dir():
                paths += [mask / entry.name for entry in os.scandir(mask) if entry.is_symlink()]
        return all(self.runs.is_below(path) for path in paths)

    def describe(self, folder: Path, media_file: MaskEntry) -> dict[str, Any]:
        """Return the JSON values of an image or clip and its mask."""
        if not self.may_show(media_file):
            fault = say("it does not exist, or is outside the folders that are shown")
            return _describe_mask(media_file, NONE, fault)
        state = find_state(media_file)
        try:
            frame_indices = list_shown_frames(media_file)
            size = image_size(media_file.media_path) if media_file.kind == "image" else None
        except (MediaError, OSError) as error:  # the page shows the path already
            return _describe_mask(media_file, state, str(error).replace(f"{media_file.media_path} ", ""))
        mask_version = read_mask_version(media_file)  # "" without a mask
        media_version = media_file.media_path.stat().st_mtime_ns
        frames = []
        for frame_index in frame_indices:
            query = {"folder": folder, "id": name_id(media_file), "number": frame_index}
            # the versions make browsers load an image again after its file has changed
            picture_query = encode_address({**query, "stamp": media_version})
            mask_query = encode_address({**query, "stamp": mask_version})
            frames.append(
                {
                    "number": frame_index,
                    "picture": add_root(f"{ADDRESS}/picture?{picture_query}"),
                    "mask": add_root(f"{ADDRESS}/mask?{mask_query}") if mask_version else "",
                }
            )
        return {**_describe_mask(media_file, state, ""), "mark": mask_version, "size": size, "shots": frames}

    def has_changed(self, folder: Path) -> bool:
        """Return whether a folder has a change that can be undone."""
        return bool(self._changes.get(folder))

    def change(self, folder: Path, media_file: MaskEntry, action: str, version: str) -> None:
        """Accept, invert or remove a mask, and record the change for undo.

        Args:
            action: A key of MASK_ACTIONS.
            version: Checksum of the mask that the page shows, as `read_mask_version` returns it.

        Raises:
            MaskConflictError: If the mask has changed since the page showed it.
            UserError: If the mask cannot be changed.
        """
        with self._lock, only_one(folder / LOCK):
            media_file = self._require_unchanged(media_file, version)
            MASK_ACTIONS[action](media_file)
            self._record_change(folder, media_file)

    def draw(self, folder: Path, media_file: MaskEntry, png: bytes, version: str) -> None:
        """Replace an image's mask with a drawn one. Raises MaskConflictError if the mask has changed."""
        with self._lock, only_one(folder / LOCK):
            media_file = self._require_unchanged(media_file, version)
            if media_file.kind != "image":
                raise refusal("A brush corrects the mask of an image, not the mask of a clip.")
            with DECODING:
                replace_mask(media_file, read_drawn(png, image_size(media_file.media_path)))
            self._record_change(folder, media_file)

    def undo(self, folder: Path) -> MaskEntry:
        """Undo the last mask change in a folder, and return the image or clip of this mask.

        Raises OptionError if the change cannot be undone.
        """
        with self._lock, only_one(folder / LOCK):
            changes = self._changes.get(folder)
            if not changes:
                raise refusal("There is nothing to undo.")
            last_change = changes.pop()
            media_file = self._find_path(folder, last_change.path)
            if media_file is None or not self.may_show(media_file):
                raise refusal("%(name)s is gone.", name=last_change.path.name)
            is_unchanged = read_mask_version(media_file) == last_change.mask_version
            if not is_unchanged or not undo_change(media_file):
                raise refusal(
                    "%(name)s: only the last change of a mask can be undone, until a program changes it.",
                    name=last_change.path.name,
                )
            return media_file.refresh()

    def read_picture(self, media_file: MaskEntry, frame_index: int) -> MaskImage | None:
        """Return the frame at an index as JPEG; None if `list_shown_frames` does not list the index.

        Raises MediaError if the file cannot be read.
        """
        frame_indices = list_shown_frames(media_file)
        if frame_index not in frame_indices:
            return None
        modified_ns = media_file.media_path.stat().st_mtime_ns
        key = media_file.media_path, modified_ns, frame_index
        with DECODING:
            if key not in self._jpegs:  # decode all frames of the clip together, as the page shows them
                for index, frame in read_shown_frames(media_file, frame_indices):
                    buffer = io.BytesIO()
                    Image.fromarray(frame[..., :3]).save(buffer, format="JPEG", quality=85)
                    self._jpegs[media_file.media_path, modified_ns, index] = buffer.getvalue()
                while len(self._jpegs) > MAX_JPEGS:
                    self._jpegs.popitem(last=False)
            jpeg = self._jpegs.get(key)
        return None if jpeg is None else MaskImage(jpeg, "image/jpeg")

    def read_mask(self, media_file: MaskEntry, frame_index: int, is_full_size: bool) -> MaskImage | None:
        """Return a mask as a PNG of white pixels with the mask's brightness as alpha channel.

        Returns None if there is no mask. Raises MediaError if the mask cannot be read.
        """
        if media_file.mask is None:
            return None
        with DECODING:
            gray = read_frame(media_file.mask, frame_index)
            if not is_full_size:
                gray = reduce_frame(gray, LARGEST_SIDE)
            white = np.full_like(gray, 255)
            png = io.BytesIO()
            Image.fromarray(np.dstack([white, gray])).save(png, format="PNG", compress_level=1)
        return MaskImage(png.getvalue(), "image/png")

    def _record_change(self, folder: Path, media_file: MaskEntry) -> None:
        changes = self._changes.setdefault(folder, [])
        changes.append(_MaskChange(media_file.media_path, read_mask_version(media_file.refresh())))
        del changes[:-MAX_UNDONE]

    def _find_path(self, folder: Path, path: Path) -> MaskEntry | None:
        """Return the image or clip of a folder with this path; None if it no longer exists."""
        for media_file in self.list_media(folder):
            if media_file.media_path == path:
                return media_file
        return None

    def _require_unchanged(self, media_file: MaskEntry, version: str) -> MaskEntry:
        """Return a file with its current mask; raise MaskConflictError if its version is not `version`."""
        now = media_file.refresh()
        if read_mask_version(now) != version:
            raise MaskConflictError
        return now


def name_id(media_file: MaskEntry) -> str:
    """Return the id of an image or clip in URLs."""
    return short_digest(media_file.media_path.name)


def read_mask_version(media_file: MaskEntry) -> str:
    """Return a string that changes whenever the mask changes; "" if there is no mask."""
    return "" if media_file.mask is None else str(media_file.mask.stat().st_mtime_ns)


def find_state(media_file: MaskEntry) -> str:
    """Return the state of a mask, a key of STATES."""
    if media_file.mask is None:
        return REMOVED if media_file.is_removed else NONE
    texts = media_file.read_texts()
    if ACCEPTED_TEXT in texts:
        return ACCEPTED_BY_USER
    return GENERATED if METHOD_TEXT in texts else DRAWN


def list_shown_frames(media_file: MaskEntry) -> list[int]:
    """Return the indices of the frames to show: the first, middle and last frame of a clip.

    Raises MediaError if the clip cannot be read.
    """
    if media_file.kind == "image":
        return [0]
    count = source_info(media_file.media_path).frames or count_frames(media_file.media_path)
    return sorted({0, count // 2, count - 1})


def read_shown_frames(media_file: MaskEntry, numbers: list[int]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Return the frames with these indices, each with its index, reduced in size; an image has one frame.

    Raises MediaError if it cannot be read.
    """
    if media_file.kind == "image":
        return [(0, reduce_frame(first_frame(media_file.media_path), LARGEST_SIDE))]
    frames = []
    for index, frame in enumerate(video_frames(media_file.media_path)):
        if index in numbers:
            frames.append((index, reduce_frame(frame, LARGEST_SIDE)))
        if index >= numbers[-1]:
            break
    return frames


def read_drawn(png: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode the PNG of a drawn mask into an (H, W) array of gray levels, 0 where nothing was drawn.

    The pixels are decoded only if the header states the right size.

    Args:
        png: Body of the request.
        size: Required width and height in pixels.

    Raises:
        OptionError: If the body is not a PNG of this size.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != size:
                raise refusal(
                    "The mask has %(sent)s pixels, the image %(size)s.",
                    sent=" × ".join(map(str, image.size)),
                    size=" × ".join(map(str, size)),
                )
            mask = np.empty((image.height, image.width), np.uint8)
            for rows, band in split_bands(image):
                # transparent pixels of the drawing are not masked
                on_black = Image.new("RGBA", band.size, "black")
                on_black.alpha_composite(band.convert("RGBA"))
                mask[rows] = np.asarray(on_black.convert("L"))
            return mask
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise refusal("The uploaded mask is not a readable PNG: %(error)s", error=error) from None


def find_masks_folder(runs: Runs, folder: Path) -> Path | None:
    """Return the folder that contains a media folder's masks; None for the default subfolder `masks`.

    It is the folder that dataset.toml names, or the media folder itself if masks are next to the images.
    """
    named = find_named_masks(runs, folder)
    if named is not None:
        return named
    has_masks_beside = any(find_stem_label(Path(name).stem) == MASK_LABEL for name in os.listdir(folder))
    return folder if has_masks_beside else None


def find_named_masks(runs: Runs, folder: Path) -> Path | None:
    """Return the mask_directory that a dataset.toml sets for a media folder; None if none does.

    It looks for dataset.toml in the folder, and then in the parent folder.
    """
    for config in (folder / DATASET_FILE, folder.parent / DATASET_FILE):
        for table in read_tables(config) if runs.is_inside(config) else ():
            media = [table.get(key) for key in MEDIA_KEYS]
            is_for_folder = any(
                isinstance(text, str) and real_path(config.parent / text) == folder for text in media
            )
            masks = table.get("mask_directory")
            if is_for_folder and isinstance(masks, str) and runs.is_below(config.parent / masks):
                return real_path(config.parent / masks)  # from the first table for this folder
    return None


def _describe_mask(media_file: MaskEntry, state: str, fault: str) -> dict[str, Any]:
    """Return the JSON values of an image or clip without its frames. `fault` is why it cannot be shown."""
    return {
        "id": name_id(media_file),
        "name": media_file.media_path.name,
        "kind": media_file.kind,
        "state": state,
        "state_text": STATES[state],
        "fault": fault,
        "mark": "",
        "size": None,
        "shots": [],
    }
