"""Read shards of earlier versions: plain tars, each entry behind a comment with its facts.

The comment is `reelsmith 1 entry GENERATION LENGTH CRC32 CHECK NAME`, in an extended header; that an entry
was removed stands in a global header. `tools/convert_cache.py --to shards` turns them into SQLite files.
"""

import json
import logging
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from dataset.shard_names import OLD_INDEX

logger = logging.getLogger(__name__)

BLOCK = 512
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

    Raises OSError.
    """
    rows: list[OldRow] = []
    is_whole, position, size = True, 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            row, end = _read_record(file, position)
            if row is None and end > position:  # who has written it
                position = end
            elif row is None:
                file.seek(position)
                rest = file.read(2 * BLOCK + 1)
                if rest.count(0) == len(rest) == 2 * BLOCK:
                    return rows, is_whole
                is_whole, position = False, position + BLOCK
            elif end > size:
                return rows, False
            else:
                rows.append(row)
                position = end
    return rows, False


def _read_record(file: BinaryIO, position: int) -> tuple[OldRow | None, int]:
    """Return the record at a position, and where the next one begins."""
    header = _header(file, position)
    if header is None or header.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE) or header.size > _MOST_COMMENT:
        return None, position
    found = _COMMENT.search(file.read(header.size))
    position += BLOCK + _padded(header.size)
    if found is None or zlib.crc32(found[1] + found[7]) != int(found[6], 16):
        return None, position
    generation, length, crc32, name = int(found[3]), int(found[4]), int(found[5], 16), found[7]
    if found[2] == b"removed":
        return (name, 0, generation, None, -1), position
    member = _header(file, position)
    if member is None or member.size != length:
        return None, position
    return (name, position + BLOCK, generation, length, crc32), position + BLOCK + _padded(length)


def _header(file: BinaryIO, position: int) -> tarfile.TarInfo | None:
    file.seek(position)
    try:
        return tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def read_old_index(folder: Path, sizes: Mapping[str, int]) -> dict[str, list[OldRow]]:
    """Return the rows of an earlier version's index by the name of their shard, "" if it is lost.

    sizes: of the shards that are there. It is empty if the index is missing, damaged or of another version.
    """
    found: dict[str, list[OldRow]] = {}
    if not (folder / OLD_INDEX).exists():
        return found
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(folder / OLD_INDEX, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        shards = json.loads((table.schema.metadata or {})[b"reelsmith_shards"])["shards"]
        names = [name if sizes.get(name) == size else "" for name, size in shards]
        columns = ("name", "shard", "offset", "generation", "length", "crc32", "kind")
        rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        for name, shard, offset, generation, length, crc32, kind in rows:
            where = names[shard] if shard >= 0 and kind != 2 else ""  # 2: it was lost already
            size, crc32 = (None, -1) if kind == 1 else (length, crc32)  # 1: it was removed
            found.setdefault(where, []).append((name, offset, generation, size, crc32))
    except FileNotFoundError:
        pass
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        logger.warning("%s is damaged (%s); the shards are read instead", folder / OLD_INDEX, error)
        return {}
    return found
