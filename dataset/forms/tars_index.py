"""The samples of one tar, read from its headers once and stored next to the caches for the next run.

A sample is the files of a tar whose names are equal up to the first dot, as in WebDataset. Texts are read at
the same time, because they are next to the headers. Nothing is unpacked, and names are only labels, so that
absolute names and links do no harm. Reading the headers of a million samples takes half a minute from memory,
and far longer from a disk.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import re
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from modules.atomic_write import write_text
from modules.errors import DatasetError, OutputError
from modules.limits import MAX_CAPTION_BYTES, MAX_TAR_HEADER_BYTES, MAX_TAR_NAME_BYTES
from modules.paths import short_hash
from modules.text_files import bad_character, parse_json, real_path, require_regular_file

logger = logging.getLogger(__name__)

VERSION = 2
FOLDER = "tar_index"  # in the cache directory
MIN_SAMPLES = 1000  # a tar with fewer samples has no stored index, because its headers are read quickly
MASK, CONTROL = "mask", "control"
_ROLE = re.compile(r"(mask|control)(?:_(\d{1,9}))?(\.\w+)", re.ASCII)
BLOCK = tarfile.BLOCKSIZE
# first bytes of a compressed file -> the compression, and a command that unpacks it
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class TarDamage(Exception):
    """Raised if the rest of a tar is unreadable; the message gives position and reason."""

    def __init__(self, reason: str, is_no_tar: bool = False) -> None:
        super().__init__(reason)
        self.is_no_tar = is_no_tar


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str  # as in the header; bytes that are not UTF-8 are escaped
    offset: int  # of its first byte in the tar
    size_bytes: int


@dataclass(frozen=True)
class TarRules:
    """Rules that tell which files of a tar sample are media, caption and companions."""

    media: tuple[str, ...]  # suffixes of images or clips
    spare: tuple[str, ...]  # suffixes that count as media only if no file has one of `media`
    companions: tuple[str, ...]  # suffixes of masks and control media
    caption_suffix: str  # ".txt"
    caption_names: tuple[str, ...]  # keys of the caption in a .json, in order of preference
    json_first: bool  # whether a .json takes precedence over a caption file
    multi_caption: bool


@dataclass(frozen=True, slots=True)
class TarSample:
    """An image or clip in a tar, with its caption and companion files."""

    key: str  # name up to the first dot, with its folder
    media: Member
    caption: str | None
    extras: tuple[tuple[str, int, Member], ...] = ()  # role (MASK or CONTROL), number, member


@dataclass
class TarIndex:
    """Media samples and errors found in one tar."""

    samples: list[TarSample] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # key of a sample, and its error
    keys_without_media: list[str] = field(default_factory=list)  # at most the first one
    num_without_media: int = 0  # number of keys without media
    damage: str | None = None  # why the tar cannot be read to the end


def read_index(tar: Path, rules: TarRules, cache_directory: Path) -> TarIndex:
    """Return the samples of a tar, from the cached index if the tar has not changed.

    Raises:
        DatasetError: If the file is compressed or not a tar.
        OSError: If the file cannot be read.
    """
    require_regular_file(tar)
    stat = tar.stat()
    # a stored index is valid only for this version of the code, this state of the tar and these rules
    validity_key = json.dumps(
        [VERSION, stat.st_size, stat.st_mtime_ns, dataclasses.asdict(rules)], ensure_ascii=False
    )
    tar_hash = short_hash(str(real_path(tar)))
    path = cache_directory / FOLDER / f"{tar.stem[:80]}-{tar_hash}.json"
    stored_index = _load_index(path, validity_key)
    if stored_index is not None:
        return stored_index
    with tar.open("rb", buffering=0) as file:
        index = _scan_tar(file, stat.st_size, rules, tar)
    # no index of a damaged tar: another process may still be writing it without changing its size or time
    if len(index.samples) >= MIN_SAMPLES and index.damage is None and not index.faults:
        # the stored index is valid only while `validity_key` stays the same
        rows = [(sample.key, sample.media, sample.caption, sample.extras) for sample in index.samples]
        try:
            write_text(
                path, json.dumps([validity_key, index.keys_without_media, index.num_without_media, rows])
            )
        except OutputError as error:  # the tar is read again next time
            logger.info("the index of a tar is not kept: %s", error)
    return index


def _load_index(path: Path, validity_key: str) -> TarIndex | None:
    """Return the index that an earlier run stored; None if there is none, or if it is damaged or stale."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        stored_for, keys_without_media, num_without_media, rows = json.loads(path.read_text("utf-8"))
        if stored_for == validity_key:
            samples = [_unpack_sample(*row) for row in rows]
            return TarIndex(
                samples, keys_without_media=keys_without_media, num_without_media=num_without_media
            )
    return None


def _unpack_sample(key: str, media: Any, caption: str | None, extras: Any) -> TarSample:
    """Restore a tar sample from a stored index; `media` and `extras` are JSON values."""
    members = tuple((role, number, Member(*member)) for role, number, member in extras)
    return TarSample(key, Member(*media), caption, members)


def _scan_tar(file: BinaryIO, size_bytes: int, rules: TarRules, tar: Path) -> TarIndex:
    """Return the samples and errors in an open tar, up to its end or to the first damage."""
    first_bytes = file.read(8)
    file.seek(0)
    for magic, (compression, command) in COMPRESSED.items():
        if first_bytes.startswith(magic):
            raise DatasetError(
                f"{tar} is compressed with {compression}, so that single files of it cannot be read. Unpack "
                f"it once: {command} {tar.name}"
            )
    index = TarIndex()
    # a sample is all files with an equal name before the first dot, its key
    files_by_key: dict[str, _SampleFiles] = {}
    last_key = ""  # of the last member read: its sample may be cut short by damage
    try:
        for member in read_members(file, size_bytes):
            key, extension = _split_member_name(member.name)
            if not extension:
                continue
            last_key = key
            sample_files = files_by_key.setdefault(key, {})
            if extension in sample_files:
                index.faults.append((key, f"{member.name} occurs twice"))
            elif f".{extension}" in (rules.caption_suffix, ".json"):
                sample_files[extension] = _read_text(file, member)
            else:
                sample_files[extension] = member
    except TarDamage as damage:
        if damage.is_no_tar:
            raise DatasetError(
                f"{tar} is not a tar, or is damaged at its beginning. Make it again."
            ) from None
        # the last sample of a damaged tar is dropped unless it seems complete
        last_files = files_by_key.pop(last_key, {})
        lost = f"{last_key} and what follows"
        # it is complete if it has the same kinds of files as another sample
        if any(sample_files.keys() == last_files.keys() for sample_files in files_by_key.values()):
            files_by_key[last_key] = last_files
            lost = "what follows"
        index.damage = f"{damage}. {len(files_by_key)} samples before that are used, {lost} cannot be read"
    _add_samples(index, files_by_key, rules)
    return index


class _MemberText(NamedTuple):
    """The text of a caption file or JSON file in a tar."""

    text: str
    error: str = ""  # end of a message if the member is not text; then `text` is empty


_SampleFiles = dict[str, Member | _MemberText]  # files of a sample, by the name after the first dot


def _split_member_name(name: str) -> tuple[str, str]:
    """Return the key of a tar member's sample, and the rest of its name after the first dot, in lower case.

    The second is "" for a name without a suffix, and for a hidden file.
    """
    folder, slash, base_name = name.removeprefix("./").rpartition("/")
    name_before_dot, _, extension = base_name.partition(".")
    return f"{folder}{slash}{name_before_dot}", extension.lower() if name_before_dot else ""


def _add_samples(index: TarIndex, files_by_key: Mapping[str, _SampleFiles], rules: TarRules) -> None:
    """Add a sample for the files of each key to the index, or the sample's error."""
    for key, sample_files in files_by_key.items():
        try:
            sample = _make_sample(key, sample_files, rules)
        except ValueError as error:
            index.faults.append((key, str(error)))
            continue
        if sample is not None:
            index.samples.append(sample)
        else:  # no image or clip: one such key is named in messages
            index.num_without_media += 1
            if not index.keys_without_media:
                index.keys_without_media.append(key)


def _read_text(file: BinaryIO, member: Member) -> _MemberText:
    """Return the text of a tar member, or the reason why it cannot be used."""
    if member.size_bytes > MAX_CAPTION_BYTES:
        return _MemberText("", f"has {member.size_bytes:,} bytes, at most {MAX_CAPTION_BYTES:,} are read")
    file.seek(member.offset)
    try:
        text = file.read(member.size_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        return _MemberText("", "is not UTF-8 text")
    bad = bad_character(text)
    if bad:
        return _MemberText("", f"contains {bad}")
    return _MemberText(text.replace("\r\n", "\n").replace("\r", "\n"))


def _make_sample(key: str, sample_files: _SampleFiles, rules: TarRules) -> TarSample | None:
    """Return a tar sample made of the files with the same key; None if none of them is an image or clip."""
    # 1. Separate the files by their extensions: texts, files with a role (such as masks), and others.
    # 2. Select the image or clip among the others; there must be only one.
    # 3. Add the caption, and one file for each role.
    # Text files are the caption or JSON; all other files are media.
    texts_by_extension: dict[str, _MemberText] = {}
    by_role: dict[tuple[str, int], dict[str, Member]] = {}  # by extension, such as `mask.png`
    candidates: dict[str, Member] = {}  # files that may be the image or clip, by extension
    for extension, content in sample_files.items():
        role = _find_role(extension, rules)
        if isinstance(content, _MemberText):
            texts_by_extension[extension] = content
        elif role is not None:
            by_role.setdefault(role, {})[extension] = content
        else:
            candidates[extension] = content
    # formats of the second set may be previews, so they count only if the first set has no file
    extensions = [*candidates]
    media = _select_media(extensions, rules.media) or _select_media(extensions, rules.spare)
    if not media:
        return None
    if len(media) > 1:
        raise ValueError(f"it has several files to train on: {', '.join(media)}; keep one")
    caption = _select_caption(texts_by_extension, rules)
    # role, number and member of each companion file
    extras = []
    for (role_name, number), members in sorted(by_role.items()):
        if len(members) > 1:
            raise ValueError(f"it has several files of one kind: {', '.join(members)}; keep one")
        (member,) = members.values()
        extras.append((role_name, number, member))
    return TarSample(key, candidates[media[0]], caption, tuple(extras))


def _find_role(extension: str, rules: TarRules) -> tuple[str, int] | None:
    """Return a companion file's role, MASK or CONTROL, and its number; None for other extensions."""
    match = _ROLE.fullmatch(extension)
    if match is None:
        return None
    role, number, suffix = match.groups()
    if suffix not in rules.companions:
        return None
    if role == MASK and number is not None:  # masks have no numbers
        return None
    return role, int(number or 0)


def _select_media(extensions: Sequence[str], suffixes: Container[str]) -> list[str]:
    """Return the media extensions to train on: plain ones such as `png`, otherwise those like `crop.png`."""
    exact = [extension for extension in extensions if f".{extension}" in suffixes]
    if exact:
        return sorted(exact)
    return sorted([extension for extension in extensions if f".{extension.rpartition('.')[2]}" in suffixes])


def _select_caption(texts: Mapping[str, _MemberText], rules: TarRules) -> str | None:
    """Return the caption in a tar sample's text files; None if there is none."""
    # With multi_caption, each line of the result is a caption.
    for extension, content in texts.items():
        if content.error:
            raise ValueError(f"its .{extension} {content.error}")
    caption_file = texts.get(rules.caption_suffix[1:])
    json_file = texts.get("json")
    is_json_preferred = rules.json_first and json_file is not None
    if caption_file is not None and not is_json_preferred:
        return caption_file.text.strip()
    if json_file is None:
        return None
    captions = _read_json_captions(json_file.text, rules)
    if not captions:
        return None
    if not rules.multi_caption:
        return captions[0].strip()
    # each further caption on one line; lines of the first one are captions already
    further_captions = [" ".join(caption.split()) for caption in captions[1:]]
    return "\n".join([captions[0], *further_captions]).strip()


def _read_json_captions(text: str, rules: TarRules) -> list[str]:
    """Return the captions in a sample's .json file."""
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its .json is not valid: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("its .json is not an object")
    names = [name for name in rules.caption_names if record.get(name) is not None]
    captions = [record[name] for name in names[:1]]
    further_captions = record.get("captions") if rules.multi_caption else None
    if isinstance(further_captions, list):
        captions += further_captions
    for caption in captions:
        if not isinstance(caption, str) or bad_character(caption):
            raise ValueError(f"{names[0] if names else 'captions'} in its .json is not text")
    return captions


# --- headers
# ------------------------------------------------------------------------------------------------------------


class _HeaderFile:
    """File object from which `tarfile` reads headers and long names; it refuses larger reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes.

        Raises:
            TarDamage: If `size` is larger than any header.
        """
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise TarDamage(f"a header at byte {self.tell():,} states {size:,} bytes of names")
        return self._file.read(size)


def read_members(file: BinaryIO, size_bytes: int) -> Iterator[Member]:
    """Yield the regular files of a tar in order.

    1. Let `tarfile` parse each header. Unless the disk fails, its errors mean a cut or damaged tar.
    2. Yield the position of the file, without reading its bytes.
    3. At the end, check that the tar ends as it should.

    Args:
        file: The tar, unbuffered and at its beginning. Callers may read from it between two members.
        size_bytes: Size of the tar.

    Raises:
        TarDamage: After all members before the position at which the tar is cut or damaged.
        OSError: If the file cannot be read.
    """
    tar = None
    offset = 0  # position of the last header
    while True:
        try:
            if tar is None:
                tar = tarfile.TarFile(  # reads the first header
                    fileobj=_HeaderFile(file),  # type: ignore[arg-type]  # all that it asks for
                    encoding="utf-8",
                    errors="backslashreplace",
                )
            info = tar.next()
        except TarDamage:
            raise
        except Exception as error:  # `tarfile` passes on errors of the modules that it uses
            # EINVAL: a damaged header makes `tarfile` seek to an invalid position
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            if file.tell() >= size_bytes:
                raise TarDamage(_describe_cut(size_bytes)) from None
            raise TarDamage(f"it is damaged at byte {offset:,}", is_no_tar=offset == 0) from None
        if info is None:
            break
        if info.size < 0 or tar.offset <= offset:
            raise TarDamage(f"it is damaged at byte {offset:,}: a size is not a number")
        offset = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it; `tarfile` would store all members
        if info.isreg() and not info.issparse():
            if info.offset_data + info.size > size_bytes:
                raise TarDamage(f"{_describe_cut(size_bytes)}, in {ascii(info.name[-80:])}")
            name = _read_name(info, file)
            if len(name.encode()) > MAX_TAR_NAME_BYTES:
                raise TarDamage(f"a name at byte {info.offset:,} has more than {MAX_TAR_NAME_BYTES:,} bytes")
            yield Member(name, info.offset_data, info.size)
    _check_end(file, tar.offset, size_bytes)


def _describe_cut(size_bytes: int) -> str:
    """Return the message about a tar that ends too early."""
    return f"it is cut short after {size_bytes:,} bytes"


def _check_end(file: BinaryIO, offset: int, size_bytes: int) -> None:
    """Raise TarDamage unless there is an empty block at `offset`, where `tarfile` stopped."""
    # `tarfile` stops at a damaged header as at the end of the tar.
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise TarDamage(_describe_cut(size_bytes))
    if block != bytes(BLOCK):
        raise TarDamage(f"it is damaged at byte {offset:,}")


def _read_name(info: tarfile.TarInfo, file: BinaryIO) -> str:
    """Return a tar member's name without the timestamps that `tarfile` may mistake for its beginning."""
    # Incremental archives of GNU tar store times in the header field where other archives store the beginning
    # of a long name (the prefix). `tarfile` reads the times as part of the name.
    if not info.name[0].isdigit():  # times are digits
        return info.name
    position = file.tell()
    file.seek(info.offset_data - BLOCK)
    header = file.read(BLOCK)
    file.seek(position)
    prefix = header[345:500].partition(b"\0")[0].decode("ascii", "backslashreplace")
    is_gnu = header[257:263] == b"ustar "  # magic of GNU tar; POSIX archives have "ustar\0"
    return info.name.removeprefix(f"{prefix}/") if prefix and is_gnu else info.name
