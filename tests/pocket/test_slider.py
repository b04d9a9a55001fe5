"""A slider of the pocket model, trained from captions alone by the scripts that users type."""

from pathlib import Path

import pytest

from pocket import slide


@pytest.mark.long
@pytest.mark.slow
def test_strength_moves_the_colour_of_eight_prompts_and_keeps_the_rest(tmp_path: Path) -> None:
    seen = slide.slide(tmp_path)

    count = len(slide.PROMPTS)
    assert slide.count_monotone(seen) == count
    blue, usual, red = slide.summarise(seen)
    assert blue.redness < -0.3 < 0.3 < red.redness
    for row in (blue, red):
        # one clip more or less than without the slider
        assert row.shapes >= usual.shapes - 1
        assert row.directions >= usual.directions - 1
        assert row.ground < 0.1
