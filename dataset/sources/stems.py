"""Stems for sources without a file name of their own, unique within a table: readable and stable."""

import re
from collections import Counter
from collections.abc import Sequence

from modules.paths import short_hash

# what Windows allows in no name, separators of folders, and control characters
_UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff/\\:*?"<>|]')
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
