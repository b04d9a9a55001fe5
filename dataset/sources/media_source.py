"""A source of a dataset: an image or clip with its caption and companions, whose files are not opened here.

Its bytes are in a file on disk, in a tar, in a table, or at a URL. Further below are the names of
sources in caches and downloads, and faults, which are collected so that one run reports all of them.
"""

import contextlib
import gc
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from dataset.table import FROM_ALPHA, FROM_FILE, DatasetTable
from modules.console import pluralize
from modules.errors import DatasetError
from modules.paths import address_identity, address_name, short_hash, split_address
from protocols.rules import ReferenceMedium

# keys in the options of a latent record
CLIP_REFERENCES = "references"  # number of references, followed by `ReferenceRules.factors`
CONTROL_MASK = "control_mask"  # true if there is a control mask
REJECTED = "worse"  # true if there is a rejected item
LAYERS = "layers"  # number of layers
NUM_GUIDES = "guides"  # number of guides
AUDIO_FILE = "sound_file"  # true if the audio is in a separate file
SHOWN = "shown"  # kinds of the reference media of the row, in order
# warning for a model that takes reference images and gets none
NO_REFERENCE = (
    "nothing has a reference: this trains on texts alone. To train edits, set control_directory, or "
    "control_path in the lines of a list or table; an IC-LoRA has reference_directory, reference_path"
)


class PackedFile(Protocol):
    """A file inside an archive or table, such as a tar or a Parquet file. It can be compared and hashed."""

    def __hash__(self) -> int: ...

    @property
    def container(self) -> Path:
        """Path of the archive or table that contains this file."""

    @property
    def size_bytes(self) -> int:
        """Size of the file in bytes; 0 if unknown before reading it."""

    @property
    def has_suffix(self) -> bool:
        """Whether `MediaSource.path` already has the suffix of this file's format."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the file in chunks.

        Raises:
            MediaError: If the content cannot be used.
            OSError: If the container cannot be read.
        """

    def describe(self) -> dict[str, Any]:
        """Return where the file is, as JSON values for the record of a cache file."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file at a URL, which is downloaded to the path of its `MediaSource`."""

    address: str = field(repr=False)  # includes its password and signature


Origin = PackedFile | Remote


class PrecomputedTensors(Protocol):
    """Precomputed VAE and text tensors of a clip. There may be millions, so the files are not opened here."""

    @property
    def folder(self) -> Path:
        """Folder that contains the tensor files."""

    @property
    def moments(self) -> Path:
        """File with the VAE moments of all frames."""

    @property
    def image(self) -> Path | None:
        """File with the VAE moments of the first frame, which may be missing; None if they are not used."""

    @property
    def embeds(self) -> Path | None:
        """File with the precomputed embedding of the caption; None if there is none."""

    def without_image(self) -> "PrecomputedTensors":
        """Return a copy without the first frame's VAE moments."""


@dataclass(frozen=True, slots=True)
class MediaSource:
    """An image or clip of a dataset table with its companion files, listed without opening any."""

    # a file, or for a clip also a folder of images. In a tar: only a name for messages. At an address: the
    # path of the download, which need not exist yet. `fetch` provides files that can be opened
    path: Path
    stem: str  # file name without suffix: the beginning of its cache names, unique within the table
    caption: str | None  # None: missing (see `missing_captions`), or not read
    # caption file, which need not exist; None: the caption is in a list, or there is no caption_extension
    caption_path: Path | None
    control: tuple[Path, ...]  # control images in order, or one control clip; () without control
    table: DatasetTable
    more_captions: tuple[str, ...] = ()  # captions after the first one
    mask: Path | None = None  # an image, clip or folder of images: white is learned
    precomputed: PrecomputedTensors | None = None  # precomputed; then the file at `path` may be missing
    remote_or_packed: tuple[Origin | None, ...] = ()  # origin of each of `latent_inputs`; (): all are on disk
    # separate audio file of a clip, and its origin if it is not on disk; None: the audio of the clip itself
    audio: tuple[Path, Remote | None] | None = None
    reference_audio: Path | None = None  # reference audio of a clip
    references: tuple[Path, ...] = ()  # clips, folders of images or images; not the control images
    control_mask: Path | None = None  # an image, clip or folder of images: white is generated
    guides: tuple[Path, ...] = ()  # an image for each of `DatasetTable.guides`, or ()
    caption_encoding: str | None = None  # encoding of its caption file, if that is not UTF-8
    # the rejected item of a preference pair: an image, clip or folder of images of the same size
    rejected: Path | None = None
    row_references: tuple[ReferenceMedium, ...] = ()  # reference media that its row names, on disk
    further_text: str | None = None  # `FURTHER_TEXT` of its row
    layers: tuple[Path, ...] = ()  # layers of an image, from back to front

    @property
    def latent_inputs(self) -> tuple[tuple[Path, Origin | None], ...]:
        """The files or folders that latents are made from, each with its origin if it is not on disk.

        The order is: media, control media, mask, control mask, references, guides, rejected item, layers. If
        moments are precomputed, there are only their files.
        """
        if self.precomputed is not None:
            moments = (self.precomputed.moments, self.precomputed.image)
            return tuple((path, None) for path in moments if path is not None)
        masks = filter(None, (self.mask, self.control_mask))
        paths = (
            self.path,
            *self.control,
            *masks,
            *self.references,
            *self.guides,
            *filter(None, (self.rejected,)),  # none or one
            *self.layers,
        )
        return tuple(zip(paths, self.remote_or_packed or (None,) * len(paths), strict=True))

    @property
    def num_images(self) -> int:
        """Number of images to encode for an image item: the image itself and its layers."""
        return 1 + len(self.layers)

    @property
    def mask_from(self) -> str | None:
        """Where the mask comes from, FROM_ALPHA or FROM_FILE; None if there is no mask."""
        if self.table.source.alpha_mask:
            return FROM_ALPHA
        return None if self.mask is None else FROM_FILE


@dataclass(frozen=True)
class FileIdentity:
    """Name, size, modification time and hash of a file or frame folder, to detect changes."""

    name: str
    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class ClipInfo:
    """Size and frame count of a decoded clip; later runs derive its items from them, without decoding."""

    # width, height of the original; of precomputed moments, the size of the clip that was encoded
    size: tuple[int, int]
    kept_frames: int
    complete: bool = True  # False: decoding stopped early, there may be more frames
    # of the clip, its control clips and references: "cat.mp4: 64x32, from frame 9 on 32x64"
    size_changes: tuple[str, ...] = ()


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Pause Python's garbage collector for reference cycles during the block, unless it was off before.

    While a list of a million objects grows, the collector would visit all of them repeatedly, which
    takes a third of the time. Objects outside cycles are freed as usual.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# characters that Windows does not allow in names, separators of folders, and control characters
_INVALID = re.compile(r'[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff/\\:*?"<>|]')
LONGEST_SUFFIX = 12  # characters of a URL's suffix
MAX_BYTES = 120  # bytes of a stem; with span, size and the family's name, a file name has at most 255 bytes


def readable_stem(name: str) -> str:
    """Convert any name to a valid file stem: `a/b` becomes `a_b`. The stem never begins with a dot."""
    stem = _INVALID.sub("_", name).strip(" ") or "_"
    if stem.startswith("."):
        stem = f"_{stem[1:]}"
    return stem.encode("utf-8")[:MAX_BYTES].decode("utf-8", "ignore").rstrip(" .") or "_"


def unique_stems(stems: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Return the stems, with a hash added if different media have the same stem (ignoring case).

    A stem that occurs once does not depend on order or on other rows. Equal media still have equal stems,
    which the listing reports.

    Args:
        stems: Stem of each media file.
        identities: Path or URL of each media file, which is hashed.
    """
    pairs = list(zip(stems, identities, strict=True))
    distinct = {(stem.casefold(), identity) for stem, identity in pairs}
    counts = Counter(stem for stem, _ in distinct)
    unique = []
    for stem, identity in pairs:
        is_unique = counts[stem.casefold()] == 1
        unique.append(stem if is_unique else f"{stem}-{short_hash(identity)}")
    return unique


def number_repeats(sources: Sequence[MediaSource]) -> list[MediaSource]:
    """Number the stems of rows that name the same file but differ in other values.

    They may differ in captions, control media, masks or audio. The stems are `t`, `t-2`, `t-3`, in the order
    of the rows. Equal rows still have equal stems, which the listing reports.
    """
    num_rows = Counter((source.path, source.remote_or_packed[:1]) for source in sources)  # by file
    if not num_rows or max(num_rows.values()) == 1:
        return list(sources)
    used_stems = {source.stem.casefold() for source in sources}
    stems_by_file: dict[object, dict[object, str]] = {}  # file -> (other values of its row -> stem)
    numbered = []
    for source in sources:
        file = source.path, source.remote_or_packed[:1]
        if num_rows[file] == 1:
            numbered.append(source)
            continue
        stems = stems_by_file.setdefault(file, {})
        other_values = (
            source.caption,
            source.more_captions,
            source.control,
            source.mask,
            source.audio,
            source.references,
            source.control_mask,
            source.rejected,
            source.row_references,
            source.further_text,
            source.layers,
        )
        if other_values not in stems:
            # the first row of a file keeps the file's stem
            stem = _number_stem(source.stem, len(stems) + 1, used_stems) if stems else source.stem
            used_stems.add(stem.casefold())
            stems[other_values] = stem
        stem = stems[other_values]
        numbered.append(source if stem == source.stem else replace(source, stem=stem))
    return numbered


def _number_stem(stem: str, number: int, used_stems: Container[str]) -> str:
    """Return the stem with the first number from `number` that makes it differ from all used stems."""
    while f"{stem}-{number}".casefold() in used_stems:
        number += 1
    return f"{stem}-{number}"


# suffixes of images, clips, audio and tars. Downloads get no other suffix, because it could make a system
# execute the file
DOWNLOADED_SUFFIXES = frozenset(
    [
        ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl",
        ".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ogv", ".apng",
        ".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".wma", ".mka",
        ".ac3", ".tar",
    ]
)  # fmt: skip


def local_name(address: str) -> str:
    """Return a file name for a download: the last part of its URL, with a hash of the URL.

    The suffix is kept only if it is one of DOWNLOADED_SUFFIXES.
    """
    stem, suffix = split_name(address)
    if suffix.lower() not in DOWNLOADED_SUFFIXES:
        suffix = ""
    return f"{stem}-{short_hash(address_identity(address), 16)}{suffix}"


@lru_cache(maxsize=1024)  # called twice for each address
def split_name(address: str) -> tuple[str, str]:
    """Split the last part of a URL into a valid file stem and a suffix, such as `.png` or "".

    A URL without a path gives its host as the stem.
    """
    name = address_name(address)
    stem, dot, end = name.rpartition(".")
    has_suffix = stem and 0 < len(end) < LONGEST_SUFFIX and end.isalnum()
    suffix = dot + end
    if not has_suffix:
        stem = name
        suffix = ""
    return readable_stem(stem or split_address(address).hostname or ""), suffix


LISTED = 20  # maximum number of faults of one kind in a message


@dataclass(frozen=True)
class Fault:
    """A problem in a dataset; its text ends with a period only if it is a complete sentence."""

    kind: str  # heading of faults of the same kind, which follows their number: "captions cannot be read"
    text: str  # one line that says where the problem is, and what it is
    stem: str | None = None  # stem of the source with the problem
    is_fatal: bool = True  # False: the source is skipped, and counted at the end


def raise_if_fatal(faults: Sequence[Fault]) -> None:
    """Raise DatasetError with all faults that stop the run, grouped by kind; do nothing if there are none."""
    errors = [fault for fault in faults if fault.is_fatal]
    if len(errors) == 1 and errors[0].text.endswith("."):  # a sentence needs no heading
        raise DatasetError(errors[0].text)
    if errors:
        raise DatasetError("\n".join(list_errors(errors, LISTED)))


def list_errors(faults: Iterable[Fault], maximum: int) -> list[str]:
    """Return message lines: for each kind of fault, how many there are and the first `maximum` of them."""
    by_kind: dict[str, list[str]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault.text)
    lines = []
    for kind, texts in by_kind.items():
        lines.append(f"{pluralize(len(texts), kind)}:")
        lines += [f"  {text}" for text in texts[:maximum]]
        if len(texts) > maximum:
            lines.append(f"  ... and {len(texts) - maximum} more")
    return lines


OLD_INDEXES = {"cache-index.sqlite", "cache-index.parquet"}  # indexes of shards, which earlier versions wrote
# names of shards: finished ones, also of earlier versions (tar), and those that are being written
SHARD = re.compile(r"cache-[0-9a-f]{16}\.(sqlite|tar)|cache-[0-9a-f]{32}\.writing")
# names of shards, their journals, and their former indexes
SHARD_FILE_NAME = re.compile(rf"(?:{SHARD.pattern})(-journal|-wal)?|cache-index\.(sqlite|parquet)")
