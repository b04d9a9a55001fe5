"""Read the shards of earlier versions: tars in which a comment precedes each entry and describes it.

`tools/convert_cache.py --to shards` converts them to SQLite shards.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from modules.integers import ceil_div

_COMMENT = re.compile(
    rb" comment=(?P<facts>reelsmith 1 (?P<kind>entry|removed) (?P<generation>\d{1,9}) (?P<size>\d{1,11}) "
    rb"(?P<crc32>[0-9a-f]{8}) )(?P<check>[0-9a-f]{8}) (?P<name>.+?)\n"
    rb"(?=\0|\d+ path=|$)",
    re.DOTALL,
)
_MAX_COMMENT = 1 << 16

# a row of a shard, from a tar as from SQLite: name; offset of the bytes in the tar, or key of the row in
# SQLite; generation; number of bytes, None if the entry was removed; CRC-32 of the bytes
ShardRow = tuple[bytes, int, int, int | None, int]


def read_old_shard(path: Path) -> list[ShardRow]:
    """Return the entries of a tar shard, the format of earlier versions.

    A pax header precedes each entry; its comment has the name, the generation (higher replaces lower), the
    size and the checksum. The comment of a global pax header says that an entry was removed.

    Raises:
        tarfile.HeaderError: If the tar is damaged.
        OSError: If the tar cannot be read.
    """
    rows: list[ShardRow] = []
    comment: re.Match[bytes] | None = None  # of the entry that follows
    with path.open("rb") as file:
        for header, start in _read_headers(file, path.stat().st_size):
            is_comment = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE)
            if is_comment and header.size <= _MAX_COMMENT:
                # None if the pax header has no comment in this program's format
                comment = _COMMENT.search(file.read(header.size))
                if comment is not None:
                    checksum = zlib.crc32(comment["facts"] + comment["name"])
                    if checksum != int(comment["check"], 16):
                        raise tarfile.HeaderError("a wrong comment")
                if comment is not None and comment["kind"] == b"removed":
                    generation = int(comment["generation"])
                    # a removed entry has no bytes: no offset, no size, and -1 (REMOVED_CRC32) as checksum
                    rows.append((comment["name"], 0, generation, None, -1))
            elif comment is not None and header.size == int(comment["size"]):
                generation = int(comment["generation"])
                crc32 = int(comment["crc32"], 16)
                rows.append((comment["name"], start, generation, header.size, crc32))
                comment = None
            else:
                raise tarfile.HeaderError("a file without a comment")
    return rows


def _read_headers(file: BinaryIO, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each header of a tar of `size` bytes, with the offset of the bytes that follow it."""
    # While a header is used, the file is at that offset.
    while True:
        block = file.read(tarfile.BLOCKSIZE)
        if file.tell() == size - tarfile.BLOCKSIZE and not any(block):
            return  # a tar ends with two empty blocks, of which this is the first
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        start = file.tell()
        num_blocks = ceil_div(header.size, tarfile.BLOCKSIZE)
        end = start + num_blocks * tarfile.BLOCKSIZE
        if not start <= end <= size:
            raise tarfile.HeaderError("a wrong size")
        yield header, start
        file.seek(end)
