"""Short names: digests of paths and of what a page shows, and names that nothing has yet."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path


def short_digest(text: str | Path, num_bytes: int = 8) -> str:
    """Return a digest of a text or path, in hexadecimal."""
    return hashlib.blake2s(os.fsencode(text), digest_size=num_bytes).hexdigest()


def number_names(name: str) -> Iterator[str]:
    """Yield a name as it is, then with -2, -3, ... behind it."""
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"
