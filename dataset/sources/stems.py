"""Names for sources without a file of their own: stems unique within a table, and files of downloads."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from modules.paths import address_identity, address_name, short_hash, split_address

# what Windows allows in no name, separators of folders, and control characters
_UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff/\\:*?"<>|]')
LONGEST_SUFFIX = 12  # of an address
MOST_BYTES = 120  # of a stem; behind it stand span, size and the family's name, at most 255 bytes in all


def readable_stem(name: str) -> str:
    """Return a name as the beginning of a file's name: `a/b` becomes `a_b`; it never begins with a dot."""
    stem = _UNFIT.sub("_", name).strip(" ") or "_"
    if stem.startswith("."):
        stem = f"_{stem[1:]}"
    return stem.encode("utf-8")[:MOST_BYTES].decode("utf-8", "ignore").rstrip(" .") or "_"


def unique_stems(stems: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Return the stems; where several are equal, but for upper case, each gets a hash of its identity.

    identities: texts that differ if the sources do. So neither the order of a table nor other rows matter to
    a stem that occurs once, and equal sources keep equal stems, which the listing reports.
    """
    counts = Counter(stem.casefold() for stem in stems)
    return [
        stem if counts[stem.casefold()] == 1 else f"{stem}-{short_hash(identity)}"
        for stem, identity in zip(stems, identities, strict=True)
    ]


def local_name(address: str) -> str:
    """Return the name of a downloaded file: the address's last part, readable, with a hash of the address,
    and its suffix.
    """
    stem, suffix = split_name(address)
    return f"{stem}-{short_hash(address_identity(address), 16)}{suffix}"


@lru_cache(maxsize=1024)  # asked for twice
def split_name(address: str) -> tuple[str, str]:
    """Return the last part of an address, readable, and its suffix; without one, the host."""
    stem, dot, end = address_name(address).rpartition(".")
    if not stem or not 0 < len(end) < LONGEST_SUFFIX or not end.isalnum():
        stem, dot, end = address_name(address), "", ""
    return readable_stem(stem or split_address(address).hostname or ""), dot + end
