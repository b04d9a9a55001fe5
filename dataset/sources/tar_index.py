"""The samples of one tar: read from its headers once, then kept beside the caches for the next run.

A sample is the files of a tar whose names are equal up to the first dot (the WebDataset form). Texts are read
at the same time, because they lie beside the headers. Nothing is unpacked, and names are only labels, so that
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from modules.atomic_write import write_text
from modules.errors import DatasetError, OutputError
from modules.limits import MAX_CAPTION_BYTES, MAX_TAR_HEADER_BYTES, MAX_TAR_NAME_BYTES
from modules.paths import short_hash
from modules.text_files import bad_character, parse_json, real_path, require_regular_file

logger = logging.getLogger(__name__)

VERSION = 2
FOLDER = "tar_index"  # in the cache directory
LEAST_SAMPLES = 1000  # fewer are read from their tar each time
MASK, CONTROL = "mask", "control"
_ROLE = re.compile(r"(mask|control)(?:_(\d{1,9}))?(\.\w+)", re.ASCII)
BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class TarDamage(Exception):
    """Raised if a tar cannot be read from here on; the text says why."""

    def __init__(self, reason: str, is_no_tar: bool = False) -> None:
        super().__init__(reason)
        self.is_no_tar = is_no_tar


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str  # as stated; bytes that are not UTF-8 are escaped
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class TarRules:
    """Roles of a sample's files."""

    media: tuple[str, ...]  # suffixes
    spare: tuple[str, ...]  # suffixes that count if there is no other
    beside: tuple[str, ...]  # suffixes of masks and control media
    caption_suffix: str  # ".txt"
    caption_names: tuple[str, ...]  # in a .json, in order
    json_first: bool
    multi_caption: bool


@dataclass(frozen=True, slots=True)
class TarSample:
    """An image or clip in a tar, and its companions."""

    key: str  # name up to the first dot, with its folder
    media: Member
    caption: str | None
    extras: tuple[tuple[str, int, Member], ...] = ()  # MASK or CONTROL, number, member


@dataclass
class TarIndex:
    """Content of a tar."""

    samples: list[TarSample] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # key and what is wrong
    others: list[str] = field(default_factory=list)  # the first of the keys without media
    num_others: int = 0
    damage: str | None = None  # why the tar cannot be read to its end


def read_index(tar: Path, rules: TarRules, cache_directory: Path) -> TarIndex:
    """Return the samples of a tar, from the kept index if the tar has not changed since.

    Raises DatasetError if it is compressed or not a tar, OSError if it cannot be read.
    """
    require_regular_file(tar)
    stat = tar.stat()
    made_for = json.dumps(
        [VERSION, stat.st_size, stat.st_mtime_ns, dataclasses.asdict(rules)], ensure_ascii=False
    )
    path = cache_directory / FOLDER / f"{tar.stem[:80]}-{short_hash(str(real_path(tar)))}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or it is damaged
        stated, others, num_others, kept = json.loads(path.read_text("utf-8"))
        if stated == made_for:
            samples = []
            for key, media, caption, extras in kept:
                beside = tuple((role, number, Member(*member)) for role, number, member in extras)
                samples.append(TarSample(key, Member(*media), caption, beside))
            return TarIndex(samples, [], others, num_others)
    with tar.open("rb", buffering=0) as file:
        found = _scan(file, stat.st_size, rules, tar)
    # a tar that just grows may have the same time twice; damage is looked at again
    if len(found.samples) >= LEAST_SAMPLES and found.damage is None and not found.faults:
        rows = [(one.key, one.media, one.caption, one.extras) for one in found.samples]
        try:
            write_text(path, json.dumps([made_for, found.others, found.num_others, rows]))
        except OutputError as error:  # the tar is read again next time
            logger.info("the index of a tar is not kept: %s", error)
    return found


def _scan(file: BinaryIO, size_bytes: int, rules: TarRules, tar: Path) -> TarIndex:
    start = file.read(8)
    file.seek(0)
    for how, command in (found for magic, found in COMPRESSED.items() if start.startswith(magic)):
        raise DatasetError(
            f"{tar} is compressed with {how}, so that single files of it cannot be read. Unpack it once: "
            f"{command} {tar.name}"
        )
    index = TarIndex()
    groups: dict[str, dict[str, Member | str]] = {}  # key -> (name after the first dot -> place, or text)
    last = ""
    try:
        for member in read_members(file, size_bytes):
            folder, mark, base = member.name.removeprefix("./").rpartition("/")
            key, _, end = base.partition(".")
            key, end = f"{folder}{mark}{key}", end.lower()
            if not end or not key.rpartition("/")[2]:  # also what begins with a dot
                continue
            group, last = groups.setdefault(key, {}), key
            if end in group:
                index.faults.append((key, f"{member.name} is there twice"))
            elif f".{end}" in (rules.caption_suffix, ".json"):
                group[end] = _read_text(file, member)
            else:
                group[end] = member
    except TarDamage as damage:
        if damage.is_no_tar:
            raise DatasetError(
                f"{tar} is no tar, or it is damaged at its beginning. Make it again."
            ) from None
        final = groups.pop(last, {})
        # complete if it has the same kinds of files as another
        if any(group.keys() == final.keys() for group in groups.values()):
            groups[last] = final
            lost = "what follows"
        else:
            lost = f"{last} and what follows"
        index.damage = f"{damage}. {len(groups)} samples before that are used, {lost} cannot be read"
    for key, group in groups.items():
        try:
            sample = _sample(key, group, rules)
        except ValueError as error:
            index.faults.append((key, str(error)))
            continue
        if sample is not None:
            index.samples.append(sample)
        else:
            index.num_others += 1
            index.others = index.others or [key]
    return index


def _read_text(file: BinaryIO, member: Member) -> str:
    """Return the text of a member; for other data, a message that begins with NUL, which no text contains."""
    if member.size_bytes > MAX_CAPTION_BYTES:
        return f"\0has {member.size_bytes:,} bytes, at most {MAX_CAPTION_BYTES:,} are read"
    file.seek(member.offset)
    try:
        text = file.read(member.size_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        return "\0is not UTF-8 text"
    found = bad_character(text)
    return f"\0holds {found}" if found else text.replace("\r\n", "\n").replace("\r", "\n")


def _sample(key: str, group: dict[str, Member | str], rules: TarRules) -> TarSample | None:
    """Return the sample that a group of files makes; None without media. Raises ValueError on a fault."""
    files = {end: one for end, one in group.items() if isinstance(one, Member)}
    texts = {end: one for end, one in group.items() if isinstance(one, str)}
    beside: dict[tuple[str, int], list[str]] = {}  # by roles, `mask.png` or `control_1.png`
    others = []
    for end in files:
        match = _ROLE.fullmatch(end)
        if match is None or match[3] not in rules.beside or (match[1] == MASK and match[2] is not None):
            others.append(end)
        else:
            beside.setdefault((match[1], int(match[2] or 0)), []).append(end)
    found: list[str] = []  # media to learn: names that are a suffix, else names that end in one
    for suffixes in (rules.media, rules.spare):
        exact = [end for end in others if f".{end}" in suffixes]
        like = [end for end in others if f".{end.rpartition('.')[2]}" in suffixes]
        found = found or sorted(exact or like)
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"it has several files to learn: {', '.join(found)}; keep one")
    caption = _caption(texts, rules)
    for ends in beside.values():
        if len(ends) > 1:
            raise ValueError(f"it has two files of one kind among {', '.join(ends)}; keep one")
    extras = tuple((*role, files[ends[0]]) for role, ends in sorted(beside.items()))
    return TarSample(key, files[found[0]], caption, extras)


def _caption(texts: dict[str, str], rules: TarRules) -> str | None:
    """Return the caption in the texts of a sample. Raises ValueError if it cannot be used."""
    text, told = texts.get(rules.caption_suffix[1:]), texts.get("json")
    for end, one in texts.items():
        if one.startswith("\0"):
            raise ValueError(f"its .{end} {one[1:]}")
    if text is not None and not (rules.json_first and told is not None):
        return text.strip()
    if told is None:
        return None
    try:
        record = parse_json(told)
    except ValueError as error:
        raise ValueError(f"its .json is not valid: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("its .json is not an object")
    name = next((one for one in rules.caption_names if record.get(one) is not None), None)
    caption = None if name is None else record[name]
    more = record.get("captions") if rules.multi_caption else None
    captions = [*([] if caption is None else [caption]), *(more if isinstance(more, list) else [])]
    if not all(isinstance(one, str) and not bad_character(one) for one in captions):
        raise ValueError(f"{name or 'captions'} in its .json is not a text")
    if rules.multi_caption:
        captions = [captions[0], *(" ".join(one.split()) for one in captions[1:])] if captions else []
        return "\n".join(captions).strip() if captions else None
    return captions[0].strip() if captions else None


# --- headers
# ------------------------------------------------------------------------------------------------------------


class _HeaderFile:
    """A tar for `tarfile` to read headers and long names from; refuses larger reads than these need."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Return as many bytes as are there, at most `size`. Raises TarDamage if these are too many."""
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise TarDamage(f"a header at byte {self.tell():,} states {size:,} bytes of names")
        return self._file.read(size)


def read_members(file: BinaryIO, size_bytes: int) -> Iterator[Member]:
    """Yield the regular files of a tar in order. file: not buffered, at its beginning; may be read between.

    Raises TarDamage where the tar is cut or damaged, after all members before that, OSError.
    """
    cut = f"it is cut short after {size_bytes:,} bytes"
    tar, place = None, 0
    while True:
        try:
            if tar is None:
                tar = tarfile.TarFile(
                    fileobj=_HeaderFile(file),  # type: ignore[arg-type]  # all that it asks for
                    encoding="utf-8",
                    errors="backslashreplace",
                )
            found = tar.next()
        except TarDamage:
            raise
        except Exception as error:  # the library passes on errors of other modules
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # not a seek to a damaged place
                raise
            is_cut = file.tell() >= size_bytes
            raise TarDamage(
                cut if is_cut else f"it is damaged at byte {place:,}", place == 0 and not is_cut
            ) from None
        if found is None:
            break
        if found.size < 0 or tar.offset <= place:
            raise TarDamage(f"it is damaged at byte {place:,}: a size is no number")
        place = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it; else it keeps all of them
        if found.isreg() and not found.issparse():
            if found.offset_data + found.size > size_bytes:
                raise TarDamage(f"{cut}, in {ascii(found.name[-80:])}")
            name = found.name
            if name[0].isdigit():
                # GNU tar writes times into incremental archives, where other tars have the beginning of a
                # name: `tarfile` takes them for it
                position = file.tell()
                file.seek(found.offset_data - BLOCK)
                header = file.read(BLOCK)
                file.seek(position)
                times = header[345:500].partition(b"\0")[0].decode("ascii", "backslashreplace")
                name = name.removeprefix(f"{times}/") if times and header[257:263] == b"ustar " else name
            if len(name.encode()) > MAX_TAR_NAME_BYTES:
                raise TarDamage(f"a name at byte {found.offset:,} has more than {MAX_TAR_NAME_BYTES:,} bytes")
            yield Member(name, found.offset_data, found.size)
    file.seek(tar.offset)
    block = file.read(BLOCK)
    if block != bytes(BLOCK):  # the library ends at a damaged header as at the end
        raise TarDamage(cut if len(block) < BLOCK else f"it is damaged at byte {tar.offset:,}")
