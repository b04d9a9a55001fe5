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


def read_old_shard(path: Path) -> list[OldRow]:
    """Return the rows of a tar. Global headers mark removed entries.

    Raises tarfile.HeaderError if it is damaged, OSError.
    """
    rows: list[OldRow] = []
    size, found = path.stat().st_size, None
    with path.open("rb") as file:
        while True:
            block = file.read(tarfile.BLOCKSIZE)
            if file.tell() == size - tarfile.BLOCKSIZE and not any(block):
                return rows
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            start = file.tell()
            end = start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not start <= end <= size:
                raise tarfile.HeaderError("a wrong size")
            if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) and header.size <= _MOST_COMMENT:
                found = _COMMENT.search(file.read(header.size))
                if found is not None and zlib.crc32(found[1] + found[7]) != int(found[6], 16):
                    raise tarfile.HeaderError("a wrong comment")
                if found is not None and found[2] == b"removed":
                    rows.append((found[7], 0, int(found[3]), None, -1))
            elif found is not None and header.size == int(found[4]):
                rows.append((found[7], start, int(found[3]), header.size, int(found[5], 16)))
                found = None
            else:
                raise tarfile.HeaderError("a file without a comment")
            file.seek(end)
