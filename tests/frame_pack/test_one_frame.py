"""One-frame generation: where its frames stand for the documented command lines."""

import pytest

from frame_pack.one_frame import OneFrame, one_frame_indices, parse_one_frame
from frame_pack.sections import Indices, section_indices

FOUR = tuple(range(13, 29))


@pytest.mark.parametrize(
    ("text", "controls", "indices"),
    [
        ("default", 0, Indices((0, 10), (11, 12), FOUR, (9,))),
        ("default", 1, Indices((0, 10), (11, 12), FOUR, (9,))),
        ("no_2x,no_4x", 1, Indices((0, 10), (), (), (9,))),
        ("no_post", 2, Indices((0, 0), (11, 12), FOUR, (9,))),
        # kisekaeichi
        ("target_index=1,control_index=0;10,no_post,no_2x,no_4x", 2, Indices((0, 10), (), (), (1,))),
        ("target_index=9, control_index=0;1, no_2x", 2, Indices((0, 1, 10), (), FOUR, (9,))),  # 1f-mc
        # as datasets may say
        ("target_index=-2,control_index=-1;-12,no_2x,no_4x", 2, Indices((-1, -12, 10), (), (), (-2,))),
        ("target_index=40,control_index=5", 3, Indices((5, 0, 0, 10), (11, 12), FOUR, (40,))),
    ],
)
def test_documented_lists_give_their_places(text: str, controls: int, indices: Indices) -> None:
    assert one_frame_indices(parse_one_frame(text), controls, 9) == indices


def test_without_settings_it_is_a_section_with_its_last_frame_as_target() -> None:
    for window in (4, 9):
        whole, one = section_indices(0, window), one_frame_indices(OneFrame(), 1, window)
        assert (one.clean, one.clean_2x, one.clean_4x) == (whole.clean, whole.clean_2x, whole.clean_4x)
        assert one.target == whole.target[-1:]
