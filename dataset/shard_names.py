"""Names of the files of a cache in shards: listings of folders distinguish them from sources."""

import re

INDEX = "cache-index.parquet"
SHARD = re.compile(r"cache-[0-9a-f]{16}\.tar")


def is_of_shards(name: str) -> bool:
    """Whether a file name is that of a shard or of the index."""
    # the beginning first: folders may have millions of other names
    return name.startswith("cache-") and (name == INDEX or SHARD.fullmatch(name) is not None)
