"""Short names: digests of paths and of shown content, and names that are still free."""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path


def short_digest(text: str | Path, num_bytes: int = 8) -> str:
    """Return a digest of a string or path with `num_bytes` bytes, in hexadecimal."""
    return hashlib.blake2s(os.fsencode(text), digest_size=num_bytes).hexdigest()


def number_names(name: str) -> Iterator[str]:
    """Yield the name itself, then the name with -2, -3, ... appended."""
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def free_name(output: Path, name: str) -> str:
    """Return an unused name for another run in a folder, such as `own-2`.

    `name` is the name of the previous run, such as `own` or `own-3`. A name is in use if files begin with it.
    """
    base = re.sub(r"(?<=\D)-\d{1,4}$", "", name)  # after a digit, it may be part of a date
    entries: list[str] = []
    with contextlib.suppress(OSError):
        entries = os.listdir(output)
    names = itertools.islice(number_names(base), 1, None)
    return next(
        free for free in names if not any(entry.startswith((f"{free}.", f"{free}-")) for entry in entries)
    )
