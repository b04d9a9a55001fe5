"""Find pictures and clips that are nearly the same, by their perceptual hashes."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dataset.reporting.measuring import Measures
from modules.media.measures import HASH_BITS, NEAR

# A hash of 63 bits is 9 parts of 7. Of two that differ in at most NEAR = 6 bits, at least 3 parts are equal;
# if the parts are shared out to 2 groups, two equal ones lie in the same group. So it is enough to compare
# hashes that agree in some pair of parts of one group. With K frames: 9 K parts, 3 K equal, 3 K - 1 groups.
# Source of the idea: Norouzi et al. 2012, "Fast Search in Hamming Space with Multi-Index Hashing".
PART_BITS = 7
PARTS = HASH_BITS // PART_BITS
SAME_COLOURS = 0.05  # of the range: mean difference of small pictures, each less its own brightness
POPCOUNT = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)

Hashes = NDArray[np.uint64]  # N K: hashes of K frames
Indices = NDArray[np.int64]


def group_copies(measures: Sequence[Measures]) -> list[list[int]]:
    """Return groups of two or more places in `measures` that are nearly the same, in order.

    All have hashes of equally many frames. Two belong together if the hashes differ in at most NEAR bits on
    average and the colours fit; so do those of a chain of such pairs. Black ones are left out: they look the
    same without being copies.
    Hashes that have nothing in common are hardly compared: of N pictures about N * N / 2000 pairs are.
    """
    places = np.array([place for place, one in enumerate(measures) if not one.is_black], np.int64)
    if len(places) < 2:
        return []
    # equal ones first: a thousand copies of a file are compared once
    keys = [(measures[place].hashes, measures[place].colours, measures[place].is_flat) for place in places]
    first: dict[object, int] = {}
    owners = [first.setdefault(key, index) for index, key in enumerate(keys)]
    distinct = np.array(sorted(set(owners)), np.int64)
    groups = _Groups(len(keys))
    for index, owner in enumerate(owners):
        groups.join(index, owner)
    hashes = np.array([keys[index][0] for index in distinct], np.uint64)
    colours = _comparable(
        [keys[index][1] for index in distinct], np.array([keys[index][2] for index in distinct])
    )
    for key in _keys(hashes):
        _compare_equal(key, hashes, colours, distinct, groups)
    return [[int(places[index]) for index in group] for group in groups.several()]


def _comparable(colours: Sequence[bytes], is_flat: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the small pictures as N C, 0..1, each less its brightness; but flat ones have nothing else."""
    values = np.frombuffer(b"".join(colours), np.uint8).reshape(len(colours), -1).astype(np.float32) / 255
    means = np.where(is_flat, 0.0, values.mean(axis=1) - 2.0)  # far from those of flat ones
    return np.asarray(values - means[:, None], np.float32)


def _keys(hashes: Hashes) -> Iterator[NDArray[np.uint16]]:
    """Yield N numbers each time; near hashes have at least one of them in common."""
    frames = hashes.shape[1]
    parts = [
        ((hashes[:, frame] >> np.uint64(part * PART_BITS)) & np.uint64((1 << PART_BITS) - 1)).astype(
            np.uint16
        )
        for frame in range(frames)
        for part in range(PARTS)
    ]
    groups = (PARTS - NEAR) * frames - 1
    for group in range(groups):
        for one, other in itertools.combinations(parts[group::groups], 2):
            yield one << np.uint16(PART_BITS) | other


def _compare_equal(
    key: NDArray[np.uint16],
    hashes: Hashes,
    colours: NDArray[np.float32],
    owners: Indices,
    groups: "_Groups",
) -> None:
    """Join all near hashes of which the key is equal."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.arange(len(key))
    for offset in range(1, len(key)):  # each with the next one of its key, then with the one after, ...
        starts = starts[starts + offset < len(key)]
        starts = starts[key[starts] == key[starts + offset]]
        if not len(starts):
            return
        one, other = order[starts], order[starts + offset]
        is_near = _popcount(hashes[one] ^ hashes[other]).sum(axis=1) <= NEAR * hashes.shape[1]
        is_new = groups.labels[owners[one]] != groups.labels[owners[other]]
        one, other = one[is_near & is_new], other[is_near & is_new]
        fits = np.abs(colours[one] - colours[other]).mean(axis=1) <= SAME_COLOURS
        for first, second in zip(owners[one[fits]], owners[other[fits]], strict=True):
            groups.join(int(first), int(second))


def _popcount(values: Hashes) -> NDArray[np.uint16]:
    parts = values.view(np.uint16).reshape(*values.shape, 4)
    return POPCOUNT[parts].sum(axis=-1, dtype=np.uint16)


class _Groups:
    """Sets of numbers that are joined pair by pair; `labels` tells which belong together."""

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count)
        self._members: dict[int, list[int]] = {}

    def join(self, one: int, other: int) -> None:
        first, second = int(self.labels[one]), int(self.labels[other])
        if first == second:
            return
        own, theirs = self._members.pop(first, [first]), self._members.pop(second, [second])
        if len(own) < len(theirs):  # the smaller group moves: each number moves at most log2(count) times
            first, own, theirs = second, theirs, own
        self.labels[theirs] = first
        own += theirs
        self._members[first] = own

    def several(self) -> list[list[int]]:
        """Return the groups of two or more, each ascending, by their first number."""
        return sorted(sorted(group) for group in self._members.values())
