"""Find pictures and clips that are nearly the same, by their perceptual hashes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_tools.report.looks import Measures
from modules.media.measures import NEAR

# A hash tells shapes; of pictures with few shapes, colours tell more. Those of copies differ by a brightness,
# a contrast, and little else: of twenty photographs (JPEG 20, a quarter of the size, 30 brighter or darker,
# times 0.7, gamma 0.8) by at most 0.2 of the range, a factor of 0.65, and 0.06 in the worst cell of 4 x 4.
SAME_COLOURS, MOST_SHIFT, LEAST_GAIN = 0.06, 0.25, 0.6
SAME_FLAT = 0.02  # of one colour, all counts
LEAST_DEVIATION = 0.03  # of the cells, below which rounding decides the factor
BITS = 64  # that a hash takes

Colours = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # N K C: small pictures; N: whether they are flat
Indices = NDArray[np.int64]


def group_copies(measures: Sequence[Measures]) -> list[list[int]]:
    """Return groups of two or more places in `measures` that are nearly the same, in order.

    All have hashes of equally many frames. Two belong together if the hashes differ in at most NEAR bits on
    average and the colours fit; so do those of a chain of pairs. Black ones are left out: they look the same
    without being copies.
    """
    by_key: dict[object, list[int]] = {}  # a thousand copies of a file are compared once
    for place, one in enumerate(measures):
        if not one.is_black:
            by_key.setdefault((one.hashes, one.colours, one.is_flat), []).append(place)
    alike = list(by_key.values())
    if not alike:
        return []
    first = [measures[places[0]] for places in alike]
    small = np.frombuffer(b"".join(one.colours for one in first), np.uint8)
    is_flat = np.array([one.is_flat for one in first])
    colours = small.reshape(len(first), len(first[0].hashes), -1), is_flat
    # a bit is -1 or 1, so that a product of two rows is how many bits agree less how many differ
    bits = np.unpackbits(np.array([one.hashes for one in first], np.uint64).view(np.uint8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    least = (BITS - 2 * NEAR) * len(first[0].hashes)
    labels = np.arange(len(first))  # equal ones belong together
    for row in range(len(first)):
        near = row + 1 + np.flatnonzero(signs[row + 1 :] @ signs[row] >= least)
        near = near[labels[near] != labels[row]]
        for other in near[_have_same_colours(colours, row, near)] if len(near) else ():
            labels[labels == labels[other]] = labels[row]
    groups: dict[int, list[int]] = {}
    for label, places in zip(labels, alike, strict=True):
        groups.setdefault(int(label), []).extend(places)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _have_same_colours(colours: Colours, one: int, others: Indices) -> NDArray[np.bool_]:
    """Return for each of the others whether it is the one with some brightness and contrast."""
    small, is_flat = colours
    first, second = (small[places].astype(np.float32) / np.float32(255) for places in ([one], others))
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
    return np.where(is_flat[one] | is_flat[others], is_flat[one] & is_flat[others] & is_same_flat, is_same)
