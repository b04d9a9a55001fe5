"""Read shards of earlier versions: plain tars, each entry behind a comment with its facts.

The comment is `reelsmith 1 entry GENERATION LENGTH CRC32 CHECK NAME`, in an extended header; that an entry
was removed stands in a global header. `tools/convert_cache.py --to shards` turns them into SQLite files.
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
    """Return the records of a tar up to its end or a damaged header, and whether all were read.

    Raises OSError.
    """
    rows: list[OldRow] = []
    is_whole, size, found = True, path.stat().st_size, None
    with path.open("rb") as file:
        while True:
            try:
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                return rows, is_whole and isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
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
