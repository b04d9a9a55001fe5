"""The npz caches that image trainers of the known family write beside the pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NpzFormat:
    """Names of a family's npz caches. Their arrays have the names of the tensors in our own caches.

    Latents: `STEM_WWWWxHHHH{latents}.npz`, W and H of the picture, with arrays `latents_{h}x{w}` of every
    resolution. Texts: `STEM{texts}.npz`.
    """

    latents: str  # "_flux"
    texts: str  # "_flux_te"
    # arrays of a text file that are no tensors of ours: name -> the value that a valid file has
    constants: Mapping[str, bool | int | float] = field(default_factory=dict)
    # arrays of a text file that are all zeros: name -> the array with as many rows, and the columns; "": one
    # row of so many numbers, without an axis for rows
    zeros: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    # arrays of a text file whose length differs per caption
    variable_length: frozenset[str] = frozenset()
