"""Records of a cache file's origin in its metadata, and checks that they are still valid.

The key `reelsmith_record` has a JSON text with the options, the encoders, the source files (size, mtime,
content hash), the caption of a text cache, and a checksum of every tensor. `reelsmith_record_crc32` is the
checksum of that text. Other programs ignore both.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.finite import is_finite
from dataset.cache_files import Entry, checksum
from dataset.config_keys import IGNORE, SECTIONS
from dataset.sources.media_source import (
    AUDIO_FILE,
    CLIP_REFERENCES,
    CONTROL_MASK,
    LAYERS,
    NUM_GUIDES,
    REJECTED,
    ClipInfo,
    FileIdentity,
    Origin,
    Remote,
)
from dataset.table import FROM_FILE, DatasetTable, get_cache_key_defaults
from modules.errors import CacheError
from modules.limits import MAX_FRAMES
from modules.media.colors import AS_SHOWN
from modules.media.reading import folder_images
from modules.text_files import parse_json
from protocols.data import LatentSpec

RECORD_KEY = "reelsmith_record"
CHECK_KEY = "reelsmith_record_crc32"
VERSION = 1
# parts of a record's JSON text (`record_metadata`) that differ between the items of a table
_CHECKSUMS_OR_FILES = re.compile(r'"crc32": \{[^{}]*\}|"file": \{[^{}]*\}|"files": (\[[^\[\]]*\])')
MAX_CHECKED = 1 << 16  # items to remember as unchanged: a few megabytes


# key in a record's options, set if frames of control clips and masks were selected by the clip's timestamps
CLOCK = "one_clock"
# key in the options of a record of audio: the last of its files is the reference of that audio
HAS_REFERENCE = "reference_audio"
# true if an option of the caching command, not the table, says that the audio is in a separate file
FROM_OPTION = "audio_from_option"


@dataclass(frozen=True)
class LatentRecord:
    """How latents were made: encoder, table keys and source files; stored in the cache file's metadata."""

    encoder: Mapping[str, str]  # Family.media_identity
    options: Mapping[str, Any]  # other options that latents depend on: span, sizes, frame rate; JSON values
    files: tuple[FileIdentity, ...]  # the image or clip, then its control media
    clip: ClipInfo | None  # None for images
    parts: int  # number of files of the item (one, or one per section)
    crc32: Mapping[str, str]  # checksum by tensor name
    decoding_version: int = AS_SHOWN  # version of reading frames (orientation, order, colors); JSON: as_shown


@dataclass(frozen=True)
class TextRecord:
    """How one encoder's outputs in a text cache were made; stored in the cache file's metadata."""

    encoder: Mapping[str, str]  # TextEncoder.identity
    caption: str
    file: FileIdentity | None  # caption file; None if the caption is in a list
    crc32: Mapping[str, str]
    # table keys about captions, and the number of captions; default values are omitted
    settings: Mapping[str, Any] = field(default_factory=dict)
    references: tuple[FileIdentity, ...] = ()  # images that the encoder saw with the caption
    decoding_version: int = 0  # decoder version of these images; 0: early versions, or no images


def record_metadata(record: LatentRecord | Mapping[str, TextRecord]) -> dict[str, str]:
    """Return a cache file's metadata: the record of latents, or of each encoder's outputs, as JSON."""
    content: dict[str, Any] = {"version": VERSION}
    # fields that early versions did not have are omitted if they are empty
    if isinstance(record, LatentRecord):
        latents = dataclasses.asdict(record)
        latents["as_shown"] = latents.pop("decoding_version")
        if record.clip is not None and not record.clip.size_changes:
            del latents["clip"]["size_changes"]
        content["latents"] = latents
    else:
        texts: dict[str, Any] = {}
        for encoder, text_record in record.items():
            fields = dataclasses.asdict(text_record)
            fields["as_shown"] = fields.pop("decoding_version")
            for key in ("settings", "references", "as_shown"):
                if not fields[key]:
                    del fields[key]
            texts[encoder] = fields
        content["texts"] = texts
    record_json = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return {RECORD_KEY: record_json, CHECK_KEY: _crc(record_json)}


def latent_record(entry: Entry) -> LatentRecord | None:
    """Return the record of a latent cache file; None if another program made it.

    Raises:
        CacheError: If the record is damaged.
    """
    record = None
    with _read_record(entry, "latents") as content:  # raises CacheError for a damaged record
        if content is not None:
            clip = None
            if content["clip"] is not None:
                kept_frames = content["clip"]["kept_frames"]
                if type(kept_frames) is not int or not 0 <= kept_frames <= MAX_FRAMES:
                    raise ValueError(f"a clip of {kept_frames!r} frames")
                clip = ClipInfo(
                    size=tuple(content["clip"]["size"]),
                    kept_frames=kept_frames,
                    complete=content["clip"]["complete"],
                    size_changes=tuple(map(str, content["clip"].get("size_changes", ()))),
                )
            record = LatentRecord(
                encoder=dict(content["encoder"]),
                options=dict(content["options"]),
                files=tuple(FileIdentity(**file) for file in content.get("files", ())),
                clip=clip,
                parts=int(content["parts"]),
                crc32=dict(content.get("crc32", {})),
                decoding_version=int(content.get("as_shown", 0)),
            )
    return record


def split_record(entry: Entry) -> tuple[Sequence[str], tuple[FileIdentity, ...]] | None:
    """Split the JSON of a latent cache's record into its settings, as text, and its media files, parsed.

    Comparing text is faster than parsing it, and items of a table often have equal settings.

    Returns:
        The pieces of the JSON without checksums and files, and the files; None if the record is missing,
        damaged or cannot be split.
    """
    record_json = entry.metadata.get(RECORD_KEY, "")
    # the pattern matches twice: first the checksums, then the list of files. Only the second match has a
    # group, so re.split returns None for the first one
    pieces = _CHECKSUMS_OR_FILES.split(record_json)
    if len(pieces) != 5 or _crc(record_json) != entry.metadata.get(CHECK_KEY):
        return None
    before_checksums, no_group, between, files_json, after_files = pieces
    try:
        files = tuple(FileIdentity(**file) for file in json.loads(files_json))
    except (ValueError, TypeError):
        return None
    return [before_checksums, no_group, between, after_files], files


def text_records(entry: Entry) -> dict[str, TextRecord]:
    """Return the records of a text cache file by encoder name; {} if it has none.

    Raises:
        CacheError: If the records are damaged.
    """
    records: dict[str, TextRecord] = {}
    with _read_record(entry, "texts") as content_by_encoder:
        for name, content in (content_by_encoder or {}).items():
            file = content.get("file")
            records[name] = TextRecord(
                encoder=dict(content["encoder"]),
                caption=str(content.get("caption", "")),
                file=None if file is None else FileIdentity(**file),
                crc32=dict(content.get("crc32", {})),
                settings=dict(content.get("settings", {})),
                references=tuple(FileIdentity(**image) for image in content.get("references", ())),
                decoding_version=int(content.get("as_shown", 0)),
            )
    return records


def source_folders(table: DatasetTable, record: LatentRecord) -> list[Path | None]:
    """Return the folder of each file in a latent record, which contains only file names.

    Records list the files of an item in this order: the item itself, control media, mask, control mask,
    references, guides, rejected item, audio, layers. The options of the record say how many there are of
    each kind, except for control media, which are the rest.
    """
    options = record.options
    after_controls: list[Path | None] = []
    if options.get("mask") == FROM_FILE:
        after_controls.append(table.source.mask_directory)
    if CONTROL_MASK in options:
        after_controls.append(table.references.control_mask_directory)
    # the number of references is followed by factors of their sizes
    num_references = options.get(CLIP_REFERENCES, [0])[0]
    after_controls += [table.references.reference_directory] * num_references
    if NUM_GUIDES in options:
        after_controls += [guide.directory for guide in table.references.guides]
    if REJECTED in options:
        after_controls.append(table.source.worse_directory)
    if options.get(AUDIO_FILE) and options.get("audio") != IGNORE:
        after_controls.append(table.source.audio_directory or table.source.directory)
    after_controls += [table.source.directory] * options.get(LAYERS, 0)
    num_controls = len(record.files) - 1 - len(after_controls)  # 1: the item itself
    return [table.source.directory, *[table.references.control_directory] * num_controls, *after_controls]


def verify_tensors(entry: Entry, crc32: Mapping[str, str]) -> None:
    """Raise CacheError if a tensor is missing or has another checksum than `crc32` records."""
    for name, expected in crc32.items():
        if name not in entry.named:
            raise CacheError(f"{entry.path}: damaged, it has no tensor {name}, which its record lists")
        if checksum(name, entry.named[name]) != expected:
            raise CacheError(f"{entry.path}: damaged, the data of {name} do not match their checksum")


def require_finite(tensor: Tensor, item: str, key: str) -> None:
    """Raise CacheError if a tensor contains NaN or infinity, which would ruin the training run."""
    if is_finite(tensor):
        return
    num_wrong = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
    raise CacheError(
        f"{item}: {num_wrong} of {tensor.numel()} values of {key} are NaN or infinite, so it is not cached.\n"
        "  Use a wider dtype for the encoder (bfloat16 or float32 instead of float16), or another file."
    )


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return how two mappings of JSON values differ, as text; None if they are equal."""
    if then == now:
        return None
    # through JSON, which turns tuples into lists: then a value from a file equals the same value in memory
    old = json.loads(json.dumps(dict(then)))
    new = json.loads(json.dumps(dict(now)))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)}, is now {new.get(key)}" for key in changed) or None


def identify(path: Path, origin: Origin | None = None) -> FileIdentity:
    """Return size, modification time and content hash of a file or of a folder of images.

    `origin` says where the file is read from if it is not on disk; a remote file is downloaded.
    """
    size_bytes, mtime_ns = size_and_mtime(path, origin)
    return FileIdentity(path.name, size_bytes, mtime_ns, _content_hash(path, size_bytes, mtime_ns, origin))


def is_unchanged(recorded: FileIdentity, path: Path, origin: Origin | None = None) -> bool:
    """Return whether a file equals the recorded one; its content is read only if just its time differs.

    If a download was removed, a source with the same URL counts as unchanged and is not downloaded again.

    Raises:
        OSError: If the file is missing.
        MediaError: If a folder no longer has images.
    """
    if isinstance(origin, Remote) and not path.exists():
        return recorded.name == path.name  # the name includes a hash of the address
    size_bytes, mtime_ns = size_and_mtime(path, origin)
    if size_bytes != recorded.size_bytes:
        return False
    if mtime_ns == recorded.mtime_ns:
        return True
    return _content_hash(path, size_bytes, mtime_ns, origin) == recorded.sha256


def size_and_mtime(path: Path, origin: Origin | None = None) -> tuple[int, int]:
    """Return size and modification time of a file; for a folder, total size and latest time of its images.

    `origin` is the origin of a file inside a tar or table, which has the modification time of the container.

    Raises:
        OSError: If the file is missing.
        MediaError: If a folder has no images.
    """
    if origin is not None and not isinstance(origin, Remote):
        # os.stat is a third faster than Path.stat, and this function is called up to a million times
        return origin.size_bytes, os.stat(origin.container).st_mtime_ns  # noqa: PTH116
    info = os.stat(path)  # noqa: PTH116
    if not stat.S_ISDIR(info.st_mode):
        return info.st_size, info.st_mtime_ns
    images = [file.stat() for file in folder_images(path)]
    size_bytes = sum(image.st_size for image in images)
    return size_bytes, max(image.st_mtime_ns for image in images)


# cached, because in a dataset that was copied without its times, training hashes every item at each check
@functools.lru_cache(maxsize=4096)
def _content_hash(path: Path, size_bytes: int, mtime_ns: int, origin: Origin | None = None) -> str:
    """Return the SHA-256 of a file, or of the names and hashes of a folder's images."""
    # `size_bytes` and `mtime_ns` are only keys of the hash cache: a changed file is read again.
    digest = hashlib.sha256()
    if origin is not None and not isinstance(origin, Remote):  # the file is inside a tar or a table
        for piece in origin.pieces():
            digest.update(piece)
        return digest.hexdigest()
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    for image in folder_images(path):
        with image.open("rb") as file:
            image_hash = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{image.name}\0{image_hash}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


@contextlib.contextmanager
def _read_record(entry: Entry, key: str) -> Iterator[Any]:
    """Yield a key's value ("latents" or "texts") in the record of a cache file; None if it has no record."""
    # This is a context manager, so that errors in the block, which mean a damaged record, become CacheErrors.
    record_json = entry.metadata.get(RECORD_KEY)
    if record_json is None:
        yield None
        return
    if _crc(record_json) != entry.metadata.get(CHECK_KEY):
        raise CacheError(f"{entry.path}: damaged, its record does not match its checksum")
    try:
        content = parse_json(record_json)
        if content["version"] != VERSION:
            raise CacheError(
                f"{entry.path}: its record has version {content['version']}, this program knows version "
                f"{VERSION}"
            )
        yield content[key]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(
            f"{entry.path}: damaged, its record cannot be read ({type(error).__name__}: {error})"
        ) from error


def _crc(text: str) -> str:
    """Return a checksum of a text."""
    return f"{zlib.crc32(text.encode()):08x}"


def options_difference(then: Mapping[str, Any], now: Mapping[str, Any], latent: LatentSpec) -> str | None:
    """Return how the options of two cache records differ, as text; None if they agree.

    Records omit section keys that have their defaults. For models without sections, these keys are ignored,
    because one dataset may serve several models.
    """
    section_defaults = get_cache_key_defaults(SECTIONS)
    if latent.in_sections:
        return difference({**section_defaults, **then}, {**section_defaults, **now})
    old = {key: value for key, value in then.items() if key not in section_defaults}
    new = {key: value for key, value in now.items() if key not in section_defaults}
    return difference(old, new)


@dataclass
class CacheChecks:
    """Checks whether media files have changed since they were cached, during one run.

    Files that were modified after `started_ns` pass, so that an edit does not stop the run. Missing files are
    not an error, because training only needs the caches.
    """

    started_ns: int = field(default_factory=time.time_ns)
    max_checked: int = MAX_CHECKED
    # table index and key of items whose sources are unchanged
    checked: set[tuple[int, str]] = field(default_factory=set)

    def add(self, table: int, key: str) -> None:
        """Record that the source files of a cache are unchanged.

        `table` is the index of the table, `key` the name of the cache. After `max_checked` items, all earlier
        ones are forgotten and will be checked again.
        """
        if len(self.checked) >= self.max_checked:
            self.checked.clear()
        self.checked.add((table, key))

    def changed_file(self, folders: Sequence[Path | None], files: tuple[FileIdentity, ...]) -> Path | None:
        """Return the first existing media file that has changed since its identity was recorded, or None.

        `folders` contains the folder of each file, or None if it is unknown.
        """
        for folder, file in zip(folders, files, strict=True):
            if folder is None:
                continue
            path = folder / file.name
            if not path.exists() or is_unchanged(file, path):
                continue
            _, mtime_ns = size_and_mtime(path)
            # a file that was edited during the run does not end it
            if mtime_ns <= self.started_ns:
                return path
        return None
