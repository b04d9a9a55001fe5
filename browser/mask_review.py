"""Show the images and clips of a folder with their masks, and change a mask with a key or a brush."""

import io
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from browser.described_folder import DATASET_FILE
from browser.offered_folders import MEDIA_KEYS, read_tables
from browser.page_root import add_root
from browser.runs import Runs
from browser.short_names import short_digest
from browser.upload_stream import DECODING
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
from modules.errors import MediaError, OptionError
from modules.file_locks import only_one
from modules.media.colors import split_bands
from modules.media.labels import MASK_LABEL, label_of
from modules.media.reading import count_frames, first_frame, image_size, video_frames
from modules.media.streams import source_info
from modules.pages.language import say
from modules.pages.page import encode_address, reduce_frame
from modules.text_files import real_path

ADDRESS = "/masks"
LARGEST_SIDE = 1600  # pixels of an image in the page; masks for the brush have all of theirs
LOCK = ".masks.lock"  # in the folder of the media, while a mask of it is changed
MAX_SHOTS = 60  # images in memory, some 200 KB each
MAX_UNDONE = 1000
# states of masks
NONE, OF_PROGRAM, TAKEN, DRAWN, REMOVED = "none", "made", "accepted", "drawn", "removed"
STATES = {
    NONE: say("no mask"),
    OF_PROGRAM: say("made by a program"),
    TAKEN: say("accepted"),
    DRAWN: say("drawn by hand"),
    REMOVED: say("thrown away"),
}
CHANGES = {"accept": accept_mask, "invert": invert_mask, "remove": remove_mask}


class MaskConflictError(Exception):
    """Raised if a mask has changed since the page read it."""


@dataclass(frozen=True)
class MaskImage:
    """Encoded image of a frame or a mask, ready to be sent."""

    content: bytes
    kind: str  # media type


@dataclass
class MaskReview:
    """The masks of folders below the roots. Changes can be undone until the server ends."""

    runs: Runs
    # media of a folder with the checksums of their masks after each change, the newest last
    _changed: dict[Path, list[tuple[Path, str]]] = field(default_factory=dict)
    _shots: "OrderedDict[tuple[Path, int, int], bytes]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # held while a mask is changed

    def places(self, folder: Path) -> list[MaskEntry]:
        """Return each image and clip of a folder with its mask.

        Raises DatasetError if it cannot be listed.
        """
        return find_mask_entries(folder, find_masks_folder(self.runs, folder))

    def find(self, folder: Path, id: str) -> MaskEntry | None:
        """Return an image or clip by its id.

        Returns None if it does not exist, or if it or its mask is outside the roots.
        """
        for place in self.places(folder):
            if name_id(place) == id:
                return place if self.is_open(place) else None
        return None

    def is_open(self, place: MaskEntry) -> bool:
        """Return whether a file, its mask and the mask's history are below the roots, with links resolved."""
        paths = [place.media_path, *place.masks]
        kept = place.backup_folder.parent
        paths += [path for path in (place.mask_folder, kept, place.backup_folder) if os.path.lexists(path)]
        for mask in place.masks:
            if mask.is_dir():
                paths += [mask / entry.name for entry in os.scandir(mask) if entry.is_symlink()]
        return all(self.runs.is_below(path) for path in paths)

    def describe(self, folder: Path, place: MaskEntry) -> dict[str, Any]:
        """Return the JSON values of an image or clip and its mask."""
        if not self.is_open(place):
            fault = say("it is gone, or leads outside the folders that are shown")
            return _as_json(place, NONE, fault)
        state = find_state(place)
        try:
            numbers = list_shots(place)
            size = image_size(place.media_path) if place.kind == "image" else None
        except (MediaError, OSError) as error:  # the page shows the path already
            return _as_json(place, state, str(error).replace(f"{place.media_path} ", ""))
        mark = mark_mask(place)  # "" without a mask
        stamp = place.media_path.stat().st_mtime_ns
        shots = []
        for number in numbers:
            query = {"folder": folder, "id": name_id(place), "number": number}
            # a stamp makes browsers load the image again after its file has changed
            picture = encode_address({**query, "stamp": stamp})
            mask = encode_address({**query, "stamp": mark})
            shots.append(
                {
                    "number": number,
                    "picture": add_root(f"{ADDRESS}/picture?{picture}"),
                    "mask": add_root(f"{ADDRESS}/mask?{mask}") if mark else "",
                }
            )
        return {**_as_json(place, state, ""), "mark": mark, "size": size, "shots": shots}

    def has_changed(self, folder: Path) -> bool:
        """Return whether a folder has a change that can be undone."""
        return bool(self._changed.get(folder))

    def change(self, folder: Path, place: MaskEntry, action: str, version: str) -> None:
        """Accept, invert or remove a mask, and note the change so that it can be undone.

        Args:
            folder: The folder with media.
            place: The image or clip.
            action: A key of CHANGES.
            version: Checksum of the mask that the page shows, as `mark_mask` returns it.

        Raises:
            MaskConflictError: If the mask has changed since.
            UserError: If it cannot be changed.
        """
        with self._lock, only_one(folder / LOCK):
            place = self._require_unchanged(place, version)
            CHANGES[action](place)
            self._note(folder, place)

    def draw(self, folder: Path, place: MaskEntry, png: bytes, version: str) -> None:
        """Replace an image's mask by a drawn one. Raises MaskConflictError if the mask has changed."""
        with self._lock, only_one(folder / LOCK):
            place = self._require_unchanged(place, version)
            if place.kind != "image":
                raise OptionError(say("A brush corrects the mask of a picture, not that of a clip."))
            with DECODING:
                replace_mask(place, read_drawn(png, image_size(place.media_path)))
            self._note(folder, place)

    def undo(self, folder: Path) -> MaskEntry:
        """Undo the last change in a folder, and return its image or clip.

        Raises OptionError if that fails.
        """
        with self._lock, only_one(folder / LOCK):
            changed = self._changed.get(folder)
            if not changed:
                raise OptionError(say("There is nothing to undo."))
            medium, mark = changed.pop()  # the file, and the checksum of its mask after the change
            place = next((place for place in self.places(folder) if place.media_path == medium), None)
            if place is None or not self.is_open(place):
                raise OptionError(say("%(name)s is gone.", name=medium.name))
            if mark_mask(place) != mark or not undo_change(place):
                raise OptionError(
                    say(
                        "%(name)s: only the last change of a mask can be undone, until a program changes it.",
                        name=medium.name,
                    )
                )
            return place.refresh()

    def read_picture(self, place: MaskEntry, number: int) -> MaskImage | None:
        """Return a frame as JPEG; None if `list_shots` does not list it.

        Raises MediaError if the file cannot be read.
        """
        numbers = list_shots(place)
        if number not in numbers:
            return None
        stamp = place.media_path.stat().st_mtime_ns
        key = place.media_path, stamp, number
        with DECODING:
            if key not in self._shots:  # decode all frames of the clip at once: the page shows them together
                for shown, frame in read_shots(place, numbers):
                    self._shots[place.media_path, stamp, shown] = _encode_jpeg(frame)
                while len(self._shots) > MAX_SHOTS:
                    self._shots.popitem(last=False)
            content = self._shots.get(key)
        return None if content is None else MaskImage(content, "image/jpeg")

    def read_mask(self, place: MaskEntry, number: int, is_full: bool) -> MaskImage | None:
        """Return a mask as a PNG of white pixels whose opacity is the brightness of the mask.

        `is_full` asks for full size. Returns None without a mask; raises MediaError if it cannot be read.
        """
        if place.mask is None:
            return None
        with DECODING:
            gray = read_frame(place.mask, number)
            if not is_full:
                gray = reduce_frame(gray, LARGEST_SIDE)
            white = np.full_like(gray, 255)
            png = io.BytesIO()
            Image.fromarray(np.dstack([white, gray])).save(png, format="PNG", compress_level=1)
        return MaskImage(png.getvalue(), "image/png")

    def _note(self, folder: Path, place: MaskEntry) -> None:
        changed = self._changed.setdefault(folder, [])
        changed.append((place.media_path, mark_mask(place.refresh())))
        del changed[:-MAX_UNDONE]

    def _require_unchanged(self, place: MaskEntry, version: str) -> MaskEntry:
        """Return a file with its present mask; raise MaskConflictError if its checksum is not `version`."""
        now = place.refresh()
        if mark_mask(now) != version:
            raise MaskConflictError
        return now


def name_id(place: MaskEntry) -> str:
    """Return the id of an image or clip in addresses."""
    return short_digest(place.media_path.name)


def mark_mask(place: MaskEntry) -> str:
    """Return a text that changes whenever the mask changes; "" if there is no mask."""
    return "" if place.mask is None else str(place.mask.stat().st_mtime_ns)


def find_state(place: MaskEntry) -> str:
    """Return the state of a mask, a key of STATES."""
    if place.mask is None:
        return REMOVED if place.is_removed else NONE
    texts = place.read_texts()
    if ACCEPTED_TEXT in texts:
        return TAKEN
    return OF_PROGRAM if METHOD_TEXT in texts else DRAWN


def list_shots(place: MaskEntry) -> list[int]:
    """Return the indices of the frames to show: the first, middle and last frame of a clip.

    Raises MediaError if the clip cannot be read.
    """
    if place.kind == "image":
        return [0]
    count = source_info(place.media_path).frames or count_frames(place.media_path)
    return sorted({0, count // 2, count - 1})


def read_shots(place: MaskEntry, numbers: list[int]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Return frames of an image or clip with their numbers, reduced in size.

    Raises MediaError if it cannot be read.
    """
    if place.kind == "image":
        return [(0, reduce_frame(first_frame(place.media_path), LARGEST_SIDE))]
    shots = []
    for index, frame in enumerate(video_frames(place.media_path)):
        if index in numbers:
            shots.append((index, reduce_frame(frame, LARGEST_SIDE)))
        if index >= numbers[-1]:
            break
    return shots


def read_drawn(png: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode the PNG of a drawn mask into gray levels H W, 0 where nothing was drawn.

    Its pixels are decoded only if the header has the right size.

    Args:
        png: Body of the request.
        size: Required width and height in pixels.

    Raises:
        OptionError: If it is not a PNG of this size.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != size:
                raise OptionError(
                    say(
                        "The mask is %(sent)s pixels, the picture %(size)s.",
                        sent=" × ".join(map(str, image.size)),
                        size=" × ".join(map(str, size)),
                    )
                )
            mask = np.empty((image.height, image.width), np.uint8)
            for rows, band in split_bands(image):
                # transparent pixels of the drawing are not masked
                on_black = Image.new("RGBA", band.size, "black")
                on_black.alpha_composite(band.convert("RGBA"))
                mask[rows] = np.asarray(on_black.convert("L"))
            return mask
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OptionError(say("What was sent is no PNG that can be read: %(error)s", error=error)) from None


def find_masks_folder(runs: Runs, folder: Path) -> Path | None:
    """Return the folder with the masks of a media folder; None for the default, the subfolder `masks`.

    It is the folder that the dataset names, or the media folder itself if the masks are next to the images.
    """
    named = find_named_masks(runs, folder)
    if named is not None:
        return named
    has_masks_beside = any(label_of(Path(name).stem) == MASK_LABEL for name in os.listdir(folder))
    return folder if has_masks_beside else None


def find_named_masks(runs: Runs, folder: Path) -> Path | None:
    """Return the mask_directory that a dataset.toml sets for a folder with media; None if none does.

    The dataset.toml is the one in the folder, or the one in the folder above.
    """
    for config in (folder / DATASET_FILE, folder.parent / DATASET_FILE):
        for table in read_tables(config) if runs.is_inside(config) else ():
            media = [table.get(key) for key in MEDIA_KEYS]
            is_of_folder = any(
                isinstance(text, str) and real_path(config.parent / text) == folder for text in media
            )
            masks = table.get("mask_directory")
            if is_of_folder and isinstance(masks, str) and runs.is_below(config.parent / masks):
                return real_path(config.parent / masks)  # of the first table for this folder
    return None


def _as_json(place: MaskEntry, state: str, fault: str) -> dict[str, Any]:
    return {
        "id": name_id(place),
        "name": place.media_path.name,
        "kind": place.kind,
        "state": state,
        "state_text": STATES[state],
        "fault": fault,
        "mark": "",
        "size": None,
        "shots": [],
    }


def _encode_jpeg(frame: NDArray[np.uint8]) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(frame[..., :3]).save(jpeg, format="JPEG", quality=85)
    return jpeg.getvalue()
