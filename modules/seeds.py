"""Seeds for independent random streams, derived from names and numbers, equal on every machine and Python
version.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what the stream is for, e.g. `derive_seed(seed, "noise", micro_batch)`.

    SHA-256 over the parts with their kinds, so that neighbouring numbers give unrelated streams.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1
