"""The distance that NEAR is about, written out; data_tools/report/copies.py has it for many pairs at once."""

from collections.abc import Sequence


def hash_distance(first: Sequence[int], second: Sequence[int]) -> float:
    """In how many bits of 63 the hashes of two pictures or clips differ, the mean over their frames."""
    return sum((one ^ other).bit_count() for one, other in zip(first, second, strict=True)) / len(first)
