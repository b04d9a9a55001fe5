"""Seeds for independent random streams, derived from names and numbers.

They are equal on every machine and Python version.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for one random stream, e.g. `derive_seed(seed, "noise", micro_batch)`.

    It is a SHA-256 of the parts and their types, so that neighboring numbers give unrelated streams.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1
