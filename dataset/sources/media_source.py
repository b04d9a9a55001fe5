"""A source of a dataset: an image or clip with its caption and the files next to it; nothing is opened yet.

Its bytes are in a file at its path, in a tar, in a table, or at an address. Below: its names for caches and
downloads, and faults of files, collected so that one run reports all of them.
"""

import contextlib
import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from dataset.table import FROM_ALPHA, FROM_FILE, DatasetTable
from modules.console import count_words
from modules.errors import DatasetError
from modules.paths import address_identity, address_name, short_hash, split_address
from protocols.rules import ShownMedium

# in the options of a record: how many references, and `ReferenceRules.factors`; that there is a mask; that
# there is a worse one
CLIP_REFERENCES, CONTROL_MASK, REJECTED, LAYERS = "references", "control_mask", "worse", "layers"
NUM_GUIDES = "guides"
# more keys in these options: that the audio is from a file of its own; what is shown, in order
AUDIO_FILE, SHOWN = "sound_file", "shown"
# warning for a model that takes reference images and gets none
NO_REFERENCE = (
    "nothing has a reference: this trains on texts alone. To train edits, give control_directory, or "
    "control_path in the lines of a list or table; an IC-LoRA has reference_directory, reference_path"
)


class PackedFile(Protocol):
    """A file inside another one: see `dataset/forms`. It can be compared and hashed."""

    def __hash__(self) -> int: ...

    @property
    def container(self) -> Path:
        """The file that it is in."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the file; 0 if they are not known without reading it."""

    @property
    def has_suffix(self) -> bool:
        """Whether its path ends as files of its kind do."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the file in pieces.

        Raises:
            MediaError: If they cannot be read, or OSError.
        """

    def describe(self) -> dict[str, Any]:
        """Return where the file is, as JSON values for the record of a cache."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file at an address; once it is downloaded it is at the source's path."""

    address: str = field(repr=False)  # with its password and signature


Origin = PackedFile | Remote


class GivenTensors(Protocol):
    """Files of tensors computed for a clip before. They may be millions: they are not opened here."""

    @property
    def folder(self) -> Path:
        """Folder of the data."""

    @property
    def moments(self) -> Path:
        """File of the moments of all frames."""

    @property
    def image(self) -> Path | None:
        """File of moments of the first frame alone, which may be missing; None if it is not used."""

    @property
    def embeds(self) -> Path | None:
        """File of the encoded caption; None if the caption is encoded here."""

    def without_image(self) -> "GivenTensors":
        """Return the tensors without moments of the first frame."""


@dataclass(frozen=True, slots=True)
class MediaSource:
    """An image or clip of a table. No media file has been opened."""

    # a file, or for a clip also a folder of images. In a tar: only a name for it. At an address: where its
    # download is, or will be. `fetch` gives files that can be opened
    path: Path
    stem: str  # file name without suffix: the beginning of its cache names, unique within the table
    caption: str | None  # None: missing (see `missing_captions`), or not read
    # the text file of the caption, there or not; None: in a list, or no caption_extension
    caption_path: Path | None
    control: tuple[Path, ...]  # control images in order, or one control clip; () without control
    table: DatasetTable
    more_captions: tuple[str, ...] = ()  # of multi_caption: those after the first
    mask: Path | None = None  # an image, clip or folder of images: white is learned
    tensors: GivenTensors | None = None  # instead of `path`, which may be missing
    origins: tuple[Origin | None, ...] = ()  # of each of `parts`; (): all of them are on disk
    # of a clip: the file that has its sound, and where it is if not on disk; None: the clip itself, if any
    audio: tuple[Path, Remote | None] | None = None
    reference_audio: Path | None = None  # of a clip: audio that the clip's own audio is made after
    references: tuple[Path, ...] = ()  # clips, folders of images or images; not the control images
    control_mask: Path | None = None  # an image, clip or folder of images: white is made anew
    guides: tuple[Path, ...] = ()  # an image for each of `DatasetTable.guides`, or none at all
    caption_encoding: str | None = None  # of its caption file, if that is not UTF-8
    rejected: Path | None = (
        None  # an image, clip or folder of images of the same size, which is to be less likely
    )
    shown: tuple[ShownMedium, ...] = ()  # `references` of its row, on disk
    further_text: str | None = None  # of its row, to be read with `shown`
    layers: tuple[Path, ...] = ()  # of an image, from back to front

    @property
    def parts(self) -> tuple[tuple[Path, Origin | None], ...]:
        """Return the files or folders that latents are made from, and where each is if not on disk.

        The media, its control media, mask, control mask, references, guides, the worse one and its layers; or
        what was computed before.
        """
        if self.tensors is not None:
            moments = (self.tensors.moments, self.tensors.image)
            return tuple((path, None) for path in moments if path is not None)
        masks = filter(None, (self.mask, self.control_mask))
        paths = (
            self.path,
            *self.control,
            *masks,
            *self.references,
            *self.guides,
            *filter(None, (self.rejected,)),
            *self.layers,
        )
        return tuple(zip(paths, self.origins or (None,) * len(paths), strict=True))

    @property
    def num_images(self) -> int:
        """Return how many images an image is: itself and its layers."""
        return 1 + len(self.layers)

    @property
    def mask_from(self) -> str | None:
        """Where the mask comes from, FROM_ALPHA or FROM_FILE; None without a mask."""
        if self.table.alpha_mask:
            return FROM_ALPHA
        return None if self.mask is None else FROM_FILE


@dataclass(frozen=True)
class FileIdentity:
    """Identity of a file, or of a folder of images."""

    name: str
    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class ClipInfo:
    """Facts found by decoding a clip, so that a later run knows the clip's items without decoding."""

    # width, height of the original; of given latents that of the clip that moments stand for
    size: tuple[int, int]
    kept_frames: int
    complete: bool = True  # False: decoding stopped early, there may be more frames
    # of it and its control clips and references: "cat.mp4: 64x32, from frame 9 on 32x64"
    size_changes: tuple[str, ...] = ()


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Pause Python's cycle collection during the block, unless it was off before.

    While a list of a million objects grows, the collector would visit all of them again and again: a third of
    the time. Objects outside cycles are freed as ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# what Windows allows in no name, separators of folders, and control characters
_UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff/\\:*?"<>|]')
LONGEST_SUFFIX = 12  # of an address
MAX_BYTES = 120  # of a stem; behind it stand span, size and the family's name, at most 255 bytes in all


def readable_stem(name: str) -> str:
    """Return a name as the beginning of a file's name: `a/b` becomes `a_b`; it never begins with a dot."""
    stem = _UNFIT.sub("_", name).strip(" ") or "_"
    if stem.startswith("."):
        stem = f"_{stem[1:]}"
    return stem.encode("utf-8")[:MAX_BYTES].decode("utf-8", "ignore").rstrip(" .") or "_"


def unique_stems(stems: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Return the stems; if several are equal (ignoring case), each gets a hash of its identity.

    `identities` are the texts that differ if the sources do. A stem that occurs once depends neither on order
    nor on other rows. Equal sources keep equal stems, which the listing reports.
    """
    counts = Counter(stem for stem, _ in {*zip(map(str.casefold, stems), identities, strict=True)})
    return [
        stem if counts[stem.casefold()] == 1 else f"{stem}-{short_hash(identity)}"
        for stem, identity in zip(stems, identities, strict=True)
    ]


def number_repeats(sources: Sequence[MediaSource]) -> list[MediaSource]:
    """Give each row its own stem if several rows name one file and differ in something else.

    They may differ in captions, control media, masks or sound. The stems are `t`, `t-2`, `t-3`, in the order
    of the rows. Equal rows keep equal stems, which the listing reports.
    """
    rows_by_file = Counter((source.path, source.origins[:1]) for source in sources)
    if not rows_by_file or max(rows_by_file.values()) == 1:
        return list(sources)
    used = {source.stem.casefold() for source in sources}
    by_file: dict[object, dict[object, str]] = {}  # file -> (other values of its row -> stem)
    numbered = []
    for source in sources:
        file = source.path, source.origins[:1]
        row = (
            source.caption,
            source.more_captions,
            source.control,
            source.mask,
            source.audio,
            source.references,
            source.control_mask,
            source.rejected,
            source.shown,
            source.further_text,
            source.layers,
        )
        stems = by_file.setdefault(file, {}) if rows_by_file[file] > 1 else {}
        if row not in stems:
            stem = source.stem
            number = len(stems) + 1
            while stems and stem.casefold() in used:
                stem = f"{source.stem}-{number}"
                number += 1
            used.add(stem.casefold())
            stems[row] = stem
        stem = stems[row]
        numbered.append(source if stem == source.stem else replace(source, stem=stem))
    return numbered


# endings of images, clips, sounds and tars: no other comes from an address, as programs run files by theirs
DOWNLOADED_SUFFIXES = frozenset(
    [
        ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl",
        ".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ogv", ".apng",
        ".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".wma", ".mka",
        ".ac3", ".tar",
    ]
)  # fmt: skip


def local_name(address: str) -> str:
    """Return the name of a downloaded file: the address's last part, readable, with a hash of the address.

    The suffix is kept if it is one of media.
    """
    stem, suffix = split_name(address)
    suffix = suffix if suffix.lower() in DOWNLOADED_SUFFIXES else ""
    return f"{stem}-{short_hash(address_identity(address), 16)}{suffix}"


@lru_cache(maxsize=1024)  # asked for twice
def split_name(address: str) -> tuple[str, str]:
    """Return the last part of an address, readable, and its suffix; without one, the host."""
    stem, dot, end = address_name(address).rpartition(".")
    if not stem or not 0 < len(end) < LONGEST_SUFFIX or not end.isalnum():
        stem = address_name(address)
        dot = ""
        end = ""
    return readable_stem(stem or split_address(address).hostname or ""), dot + end


LISTED = 20  # how many faults of one kind a message shows


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. A text that is a whole sentence ends with a full stop."""

    kind: str  # "captions cannot be read": follows a count
    text: str  # one line: where, and what
    stem: str | None = None  # of the source that it concerns
    ends_run: bool = True  # False: what it concerns is skipped, and counted at the end


def raise_errors(faults: Sequence[Fault]) -> None:
    """Raise DatasetError with all faults by kind, if there are any that end a run."""
    faults = [error for error in faults if error.ends_run]
    if len(faults) == 1 and faults[0].text.endswith("."):
        raise DatasetError(faults[0].text)
    if faults:
        raise DatasetError("\n".join(list_errors(faults, LISTED)))


def list_errors(faults: Iterable[Fault], maximum: int) -> list[str]:
    """Return lines: each kind with its count, then its first `maximum` faults."""
    by_kind: dict[str, list[str]] = {}
    for error in faults:
        by_kind.setdefault(error.kind, []).append(error.text)
    lines = []
    for kind, texts in by_kind.items():
        lines += [f"{count_words(len(texts), kind)}:", *(f"  {text}" for text in texts[:maximum])]
        lines += [f"  ... and {len(texts) - maximum} more"] if len(texts) > maximum else []
    return lines


OLD_INDEXES = {"cache-index.sqlite", "cache-index.parquet"}  # of earlier versions
# finished, of earlier versions, and being written: by a word for the machine
SHARD = re.compile(r"cache-[0-9a-f]{16}\.(sqlite|tar)|cache-[0-9a-f]{32}\.writing")
# names of all that belongs to them
OF_SHARDS = re.compile(rf"(?:{SHARD.pattern})(-journal|-wal)?|cache-index\.(sqlite|parquet)")
