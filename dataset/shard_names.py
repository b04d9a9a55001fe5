"""Names of the files of a cache in shards: listings of folders distinguish them from sources."""

import re

INDEX = "cache-index.sqlite"
OLD_INDEX = "cache-index.parquet"  # of shards in tars, as earlier versions made them
# finished, of earlier versions, and being written: by two words of the machine
SHARD = re.compile(r"cache-[0-9a-f]{16}\.(sqlite|tar)|cache-[0-9a-f]{32}\.writing")


def is_of_shards(name: str) -> bool:
    """Whether a file name is that of a shard, of what SQLite keeps beside one, or of the index."""
    # the beginning first: folders may have millions of other names
    return name.startswith("cache-") and (
        name in {INDEX, OLD_INDEX} or SHARD.fullmatch(name.removesuffix("-journal")) is not None
    )
