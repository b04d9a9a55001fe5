"""Shards of earlier versions: tars, each entry behind a comment with its facts.

`tools/convert_cache.py --to shards` makes them anew.
"""

import re
import tarfile
import zlib
from pathlib import Path

_COMMENT = re.compile(
    rb" comment=(reelsmith 1 (entry|removed) (\d{1,9}) (\d{1,11}) ([0-9a-f]{8}) )([0-9a-f]{8}) (.+?)\n"
    rb"(?=\0|\d+ path=|$)",
    re.DOTALL,
)
_MOST_COMMENT = 1 << 16

# name, offset of its bytes, generation, length (None: it was removed), CRC-32 of its bytes
OldRow = tuple[bytes, int, int, int | None, int]


def read_old_shard(path: Path) -> tuple[list[OldRow], bool]:
    """Return the records of a tar, and whether it is whole: behind a damaged place the next one is searched.

    That an entry was removed stands in a global header. Raises OSError.
    """
    rows: list[OldRow] = []
    is_whole, size, found = True, path.stat().st_size, None
    with path.open("rb") as file:
        while (position := file.tell()) < size:
            try:
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                if not 0 <= header.size <= size:
                    raise tarfile.HeaderError("a wrong size")
            except tarfile.HeaderError as error:
                is_end = isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
                if is_end and size - position == 2 * tarfile.BLOCKSIZE:
                    return rows, is_whole
                is_whole, found = False, None
                file.seek(position + tarfile.BLOCKSIZE)
                continue
            start = file.tell()
            end = start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) and header.size <= _MOST_COMMENT:
                content = file.read(header.size)
                found = _COMMENT.search(content)
                if found is not None and zlib.crc32(found[1] + found[7]) != int(found[6], 16):
                    is_whole, found = False, None
                if found is not None and found[2] == b"removed":
                    rows.append((found[7], 0, int(found[3]), None, -1))
            elif found is not None and header.size == int(found[4]) and end <= size:
                rows.append((found[7], start, int(found[3]), header.size, int(found[5], 16)))
                found = None
            else:
                is_whole = False
            file.seek(end)
    return rows, False
