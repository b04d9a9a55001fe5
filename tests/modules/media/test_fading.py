"""The transition between clips that show the same moments."""

import pytest
import torch

from modules.media.pixels import cross_fade


def test_a_fade_begins_with_the_earlier_clip_and_ends_with_the_later_one() -> None:
    earlier, later = torch.zeros(1, 3, 5, 2, 2), torch.ones(1, 3, 5, 2, 2)
    assert cross_fade(earlier, later)[0, 0, :, 0, 0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fade_is_computed_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    earlier, later = (
        torch.full((1, 1, 4, 1, 1), 1.0, dtype=dtype),
        torch.full((1, 1, 4, 1, 1), 3.0, dtype=dtype),
    )
    faded = cross_fade(earlier, later)
    assert faded.dtype == dtype
    torch.testing.assert_close(
        faded.flatten().float(), torch.tensor([1.0, 5 / 3, 7 / 3, 3.0]).to(dtype).float(), rtol=0, atol=0
    )
