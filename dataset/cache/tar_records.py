"""The records of a shard: members of a plain tar, whose bytes are single cache files.

Each entry is a member of its name behind an extended header with a comment, which other programs pass over:
`reelsmith 1 entry GENERATION LENGTH CRC32 CHECK NAME`. That an entry was removed is a comment in a global
header, from which no program makes a file. CRC32 is of the entry's bytes, CHECK of the comment
itself. Source of the format: POSIX.1-2001, pax, "ustar Interchange Format" and "pax Extended Header".
"""

import os
import platform
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)  # of a whole tar
MOST_COMMENT = 64 * 1024  # bytes of an extended header: names are far shorter
MOST_BYTES = 0o77777777777  # what the size in a header can say
SEARCH_BYTES = 1 << 20
_MAGIC = b"ustar\x0000"
_MAGIC_AT = 257
_COMMENT = re.compile(
    rb"reelsmith 1 (entry|removed) (\d{1,9}) (\d{1,11}) ([0-9a-f]{8}) ([0-9a-f]{8}) (.+)", re.DOTALL
)
_WRITER = b"reelsmith 1 writer "
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BAD = re.compile(rb"[/\\:\x00]" if os.name == "nt" else rb"[/\x00]")


class RecordKind(IntEnum):
    """State of a name. Of two of one generation the lower kind does."""

    ENTRY = 0
    REMOVED = 1
    LOST = 2  # there was an entry, but its bytes are gone: only the index says so, no record


@dataclass(frozen=True)
class ShardRecord:
    """One record of a shard. Offsets are of the shard; `offset` is where the entry's bytes begin."""

    name: str
    kind: RecordKind
    generation: int  # one more than that of what it replaces
    length: int
    crc32: int
    start: int
    offset: int

    @property
    def end(self) -> int:
        """Return where the next record begins."""
        return padded(self.offset + self.length) if self.kind is RecordKind.ENTRY else self.offset


@dataclass(frozen=True)
class Damage:
    """Bytes of a shard that are no record."""

    start: int
    end: int


@dataclass(frozen=True)
class Ending:
    """The end of the readable part: more may be appended at `position` if the shard is not finished."""

    position: int
    is_finished: bool


def padded(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def encode_name(name: str) -> bytes:
    """Return the bytes of a name; those of file names that are no UTF-8 come back as they were."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """Return the name in a record's bytes."""
    return name.decode("utf-8", "surrogateescape")


def is_safe_name(name: str) -> bool:
    """Whether a name can be that of a file in a folder, not of one elsewhere."""
    return name not in {"", ".", ".."} and not has_bad_characters(encode_name(name))


def has_bad_characters(names: bytes) -> bool:
    """Whether a character of some names leads out of their folder."""
    return _BAD.search(names) is not None


def record_header(name: str, kind: RecordKind, generation: int, length: int = 0, crc32: int = 0) -> bytes:
    """Return the bytes before those of an entry; for other kinds the whole record."""
    raw = encode_name(name)
    start = f"reelsmith 1 {kind.name.lower()} {generation} {length} {crc32:08x} ".encode()
    check = zlib.crc32(start + raw)
    body = _line(b"comment", start + f"{check:08x} ".encode() + raw)
    if kind is not RecordKind.ENTRY:
        return _block(b"reelsmith", len(body), b"g") + _fill(body)
    if len(raw) > 100 or not name.isascii():
        body += _line(b"path", raw)
    return _block(b"reelsmith", len(body), b"x") + _fill(body) + _block(raw[:100], length, b"0")


def machine() -> str:
    """Return two words that identify this machine: one of its name, as containers differ in it, and one of
    its last start. Machines with one of them in common are the same.
    """
    name = platform.node().encode()
    try:
        start = _BOOT_ID.read_bytes()
    except OSError:
        start = name
    return f"{zlib.crc32(name):08x} {zlib.crc32(start):08x}"


def writer_header() -> bytes:
    """Return the first bytes of a shard that is not merged: a comment that names the writing machine."""
    body = _line(b"comment", _WRITER + machine().encode())
    return _block(b"reelsmith", len(body), b"g") + _fill(body)


def writer_of(file: BinaryIO) -> str | None:
    """Return the result of `machine` where a shard was begun; None if it does not say."""
    comment = _comment_in(_at(file, BLOCK, BLOCK))
    return comment.removeprefix(_WRITER).decode("ascii", "replace") if comment.startswith(_WRITER) else None


def is_foreign(file: BinaryIO) -> bool:
    """Whether a file begins as a tar of another program does, or of another version of this format."""
    start = _at(file, 0, 3 * BLOCK)
    length = _size_in(start[:BLOCK])
    if length is None:
        return False
    comment = _comment_in(start[BLOCK : BLOCK + length])
    is_other_version = re.match(rb"reelsmith \d+ ", comment) and not comment.startswith(b"reelsmith 1 ")
    return not start.startswith(b"reelsmith\0") or bool(is_other_version)


def read_records(file: BinaryIO, size: int, position: int = 0) -> Iterator[ShardRecord | Damage | Ending]:
    """Yield the records of a shard from a position, its damaged places, and at last its end.

    Only headers are read. Behind a place that is no header the next one is searched byte by byte, so that
    damage costs only what it touches.
    """
    floor = position  # where a search begins: the bytes of the last record may be fewer than it says
    while True:
        found = _read_record(file, position)
        if isinstance(found, ShardRecord) and found.end <= size:
            yield found
            floor, position = found.offset, found.end
            continue
        if isinstance(found, int):
            floor, position = position, found
            continue
        if size - position <= 2 * BLOCK and _at(file, position, size - position).count(0) == size - position:
            yield Ending(position, is_finished=size - position == 2 * BLOCK)
            return
        after = _search(file, max(floor, found.offset if isinstance(found, ShardRecord) else floor) + 1, size)
        if after is None:
            yield Ending(position, is_finished=False)
            return
        yield Damage(min(position, after), after)
        floor = position = after


def _read_record(file: BinaryIO, position: int) -> ShardRecord | int | None:
    """Return the record at a position; for the writer's header where the next one begins."""
    start = _at(file, position, 3 * BLOCK)
    length = _size_in(start[:BLOCK])
    if length is None:
        return None
    flag = start[156:157]
    if flag not in (b"x", b"g") or length > MOST_COMMENT:
        return None
    body_end = BLOCK + padded(length)
    if body_end + BLOCK > len(start):
        start = _at(file, position, body_end + BLOCK)
    comment = _comment_in(start[BLOCK : BLOCK + length])
    if re.fullmatch(_WRITER + rb"[0-9a-f]{8}( [0-9a-f]{8})?", comment):
        return position + body_end
    match = _COMMENT.fullmatch(comment)
    if match is None or zlib.crc32(match[0][: match.start(5)] + match[6]) != int(match[5], 16):
        return None
    kind, data_length = RecordKind[match[1].decode().upper()], int(match[3])
    name = decode_name(match[6])
    is_right = is_safe_name(name) and (flag == b"x") == (kind is RecordKind.ENTRY)
    if kind is RecordKind.ENTRY:
        is_right = is_right and _size_in(start[body_end : body_end + BLOCK]) == data_length
        body_end += BLOCK
    if not is_right:
        return None
    return ShardRecord(
        name, kind, int(match[2]), data_length, int(match[4], 16), position, position + body_end
    )


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _search(file: BinaryIO, position: int, size: int) -> int | None:
    """Return where the next record of ours begins, at any byte."""
    while position < size:
        chunk = _at(file, position, SEARCH_BYTES + BLOCK)
        place = chunk.find(_MAGIC)
        while place >= 0:
            start = place - _MAGIC_AT
            if start >= 0 and isinstance(_read_record(file, position + start), ShardRecord):
                return position + start
            place = chunk.find(_MAGIC, place + 1)
        position += SEARCH_BYTES
    return None


def _line(key: bytes, value: bytes) -> bytes:
    """Return `LENGTH key=value` and a line end; LENGTH counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _comment_in(body: bytes) -> bytes:
    while body:
        digits, _, _ = body.partition(b" ")
        if not digits.isdigit() or len(digits) > 6 or not 0 < int(digits) <= len(body):
            return b""
        line, body = body[len(digits) + 1 : int(digits) - 1], body[int(digits) :]
        key, _, value = line.partition(b"=")
        if key == b"comment":
            return value
    return b""


def _block(name: bytes, size: int, flag: bytes) -> bytes:
    """Return a header: mode 644, no owner, no time, so that equal entries give equal bytes."""
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0
    rest = flag + bytes(100) + _MAGIC + bytes(64) + b"0000000\0" * 2 + bytes(167)
    total = sum(head) + 8 * ord(" ") + sum(rest)
    return head + b"%06o\0 " % total + rest


def _size_in(block: bytes) -> int | None:
    """Return the size that a header says; None if it is no whole header."""
    if len(block) < BLOCK or block[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        return None
    try:
        total, size = int(block[148:154], 8), int(block[124:135], 8)
    except ValueError:
        return None
    return size if sum(block) - sum(block[148:156]) + 8 * ord(" ") == total and size >= 0 else None


def _fill(body: bytes) -> bytes:
    return body.ljust(padded(len(body)), b"\0")
