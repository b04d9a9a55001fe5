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
# A hash tells shapes; of pictures with few shapes, colours tell more. Those of copies differ by a brightness,
# a contrast, and little else: of twenty photographs (JPEG 20, a quarter of the size, 30 brighter or darker,
# times 0.7, gamma 0.8) by at most 0.2 of the range, a factor of 0.65, and 0.06 in the worst cell of 4 x 4.
SAME_COLOURS, MOST_SHIFT, LEAST_GAIN = 0.06, 0.25, 0.6
SAME_FLAT = 0.02  # of one colour, all counts
LEAST_DEVIATION = 0.03  # of the cells, below which rounding decides the factor
POPCOUNT = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)

Hashes = NDArray[np.uint64]  # N K: hashes of K frames
Colours = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # N K C: small pictures; N: whether they are flat
Indices = NDArray[np.int64]


def group_copies(measures: Sequence[Measures]) -> list[list[int]]:
    """Return groups of two or more places in `measures` that are nearly the same, in order.

    All have hashes of equally many frames. Two belong together if the hashes differ in at most NEAR bits on
    average and the colours fit; so do those of a chain of pairs. Black ones are left out: they look the same
    without being copies.
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
    small = np.frombuffer(b"".join(keys[index][1] for index in distinct), np.uint8)
    colours = small.reshape(len(distinct), hashes.shape[1], -1)
    is_flat = np.array([keys[index][2] for index in distinct])
    for key in _keys(hashes):
        _compare_equal(key, hashes, (colours, is_flat), distinct, groups)
    return [[int(places[index]) for index in group] for group in groups.several()]


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
    colours: Colours,
    owners: Indices,
    groups: "_Groups",
) -> None:
    """Join all near hashes with equal keys."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.arange(len(key))
    for offset in range(1, len(key)):  # each with the next one of its key, then with the one after, ...
        starts = starts[starts + offset < len(key)]
        starts = starts[key[starts] == key[starts + offset]]
        if not len(starts):
            return
        one, other = order[starts], order[starts + offset]
        is_new = groups.labels[owners[one]] != groups.labels[owners[other]]
        one, other = one[is_new], other[is_new]
        is_near = _popcount(hashes[one] ^ hashes[other]).sum(axis=1) <= NEAR * hashes.shape[1]
        one, other = one[is_near], other[is_near]
        fits = _have_same_colours(colours, one, other)
        for first, second in zip(owners[one[fits]], owners[other[fits]], strict=True):
            groups.join(int(first), int(second))


def _have_same_colours(colours: Colours, one: Indices, other: Indices) -> NDArray[np.bool_]:
    """Return for each pair whether one is the other with some brightness and contrast."""
    small, is_flat = colours
    first, second = (small[places].astype(np.float32) / np.float32(255) for places in (one, other))
    means = first.mean(axis=(1, 2)), second.mean(axis=(1, 2))
    centred = first - means[0][:, None, None], second - means[1][:, None, None]
    powers = np.square(centred[0]).mean(axis=(1, 2)), np.square(centred[1]).mean(axis=(1, 2))
    # least squares: the one of less contrast is `gain` times the other, and a rest
    power = np.maximum(*powers)
    gain = (centred[0] * centred[1]).mean(axis=(1, 2)) / np.maximum(power, 1e-9)
    swaps = (powers[0] < powers[1])[:, None, None]
    strong, weak = np.where(swaps, centred[1], centred[0]), np.where(swaps, centred[0], centred[1])
    rest = np.abs(weak - gain[:, None, None] * strong).mean(axis=1).max(axis=1)  # over frames, then cells
    is_same = (rest <= SAME_COLOURS) & (np.abs(means[0] - means[1]) <= MOST_SHIFT)
    is_same &= (gain >= LEAST_GAIN) | (power < LEAST_DEVIATION**2)
    is_same_flat = np.abs(first - second).mean(axis=1).max(axis=1) <= SAME_FLAT
    return np.where(is_flat[one] | is_flat[other], is_flat[one] & is_flat[other] & is_same_flat, is_same)


def _popcount(values: Hashes) -> NDArray[np.uint16]:
    parts = values.view(np.uint16).reshape(*values.shape, 4)
    return POPCOUNT[parts].sum(axis=-1, dtype=np.uint16)


class _Groups:
    """Sets of numbers that are joined pair by pair; `labels`: equal ones belong together."""

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
