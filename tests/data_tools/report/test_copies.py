"""Groups of near-duplicates: how far hashes and colours of copies may differ."""

import random

import pytest

from data_tools.report.looks import Measures
from data_tools.report.run import SAME_FLAT, group_copies
from modules.media.measures import NEAR

GREY = bytes([100] * 48)


def measures(hashes: tuple[int, ...], colours: bytes = GREY, **changes: bool) -> Measures:
    flags = {"is_black": False, "is_static": False, "is_blurred": False, "is_flat": False} | changes
    return Measures(0.5, 0.0, 0.1, hashes=hashes, colours=colours * len(hashes), **flags)


@pytest.mark.parametrize("frames", [1, 4])
def test_copies_differ_in_few_bits_on_average(frames: int) -> None:
    generator = random.Random(frames)
    found = []
    for _ in range(40):  # a picture, and others at all distances around the limit
        base = [generator.getrandbits(63) for _ in range(frames)]
        for bits in (0, NEAR * frames - 1, NEAR * frames, NEAR * frames + 1):
            hashes = list(base)
            for bit in generator.sample(range(63 * frames), bits):
                hashes[bit // 63] ^= 1 << bit % 63
            found.append(measures(tuple(hashes)))

    near = [group for group in group_copies(found) if group[0] % 4 == 0]

    assert len(near) == 40
    assert all(group[:3] == [group[0], group[0] + 1, group[0] + 2] for group in near)
    alone = [group_copies([found[place], found[place + 3]]) for place in range(0, 160, 4)]
    assert not any(alone)


def test_groups_are_chains_in_order() -> None:
    steps = [0, (1 << 6) - 1, (1 << 12) - 1, (1 << 18) - 1]
    others = [0b101010101010101 << 40, 0b110011001100110011 << 30]
    found = [measures((value,)) for value in (others[0], steps[2], steps[0], others[1], steps[3], steps[1])]

    assert group_copies(found) == [[1, 2, 4, 5]]


def test_one_shape_in_other_colours_is_no_copy() -> None:
    red, blue = bytes([200, 40, 40] * 16), bytes([40, 40, 200] * 16)
    brighter = bytes(value + 30 for value in red)
    assert group_copies([measures((5,), red), measures((5,), blue)]) == []
    assert group_copies([measures((5,), red), measures((5,), brighter)]) == [[0, 1]]


def test_brightness_and_contrast_do_not_count_but_one_cell_does() -> None:
    generator = random.Random(0)
    picture = bytes(generator.randrange(20, 200) for _ in range(48))
    darker = bytes(round(0.7 * value) for value in picture)
    other = bytes([*picture[:3], 250, 20, 250, *picture[6:]])
    assert group_copies([measures((5,), picture), measures((5,), darker)]) == [[0, 1]]
    assert group_copies([measures((5,), picture), measures((5,), other)]) == []


def test_flat_pictures_are_copies_if_they_have_one_colour() -> None:
    off = bytes([100 + round(255 * SAME_FLAT) + 2] * 48)
    found = [
        measures((0,), GREY, is_flat=True),
        measures((0,), off, is_flat=True),
        measures((0,), bytes([101] * 48), is_flat=True),
        measures((0,), GREY),
    ]
    assert group_copies(found) == [[0, 2]]


def test_black_ones_are_left_out() -> None:
    assert group_copies([measures((7,), is_black=True), measures((7,), is_black=True)]) == []
    assert group_copies([]) == []
