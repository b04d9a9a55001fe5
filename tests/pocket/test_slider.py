"""A slider of the pocket model, trained from captions alone by the scripts that users type."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from pocket import slide


@pytest.mark.slow
def test_strength_moves_the_colour_of_eight_prompts_and_keeps_the_rest(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before it in this process
    seen = slide.slide(tmp_path)

    count = len(slide.PROMPTS)
    assert slide.count_monotone(seen) == count
    blue, default, red = slide.summarize(seen)
    assert blue.redness < -0.4 < 0.6 < red.redness
    for row in (blue, red):
        # measured: at most two of eight clips differ
        assert row.shapes >= default.shapes - 2
        assert row.directions >= default.directions - 2
        assert row.ground < 0.1
