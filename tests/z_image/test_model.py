"""The Z-Image transformer against diffusers' in float32, and what its padding does."""

import pytest
import torch

from tests.parity.running import assert_equal
from tests.tiny.z_image import tiny_state
from tests.z_image.making import in_diffusers, predict_with, tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("rows", "columns", "text"),
    [(5, 7, 40), (4, 8, 64), (1, 1, 1), (9, 3, 70)],
    ids=["both padded", "text padded in one sample", "one token", "three paddings of text"],
)
@torch.no_grad()
def test_what_is_predicted_equals_diffusers(rows: int, columns: int, text: int) -> None:
    """Each sample of a batch by itself there: its own padding takes part, that of longer texts does not."""
    given = tiny_inputs(2 if text > 20 else 1, rows, columns, text)

    ours = tiny_model()(**given)

    assert_equal(ours, predict_with(in_diffusers(tiny_state()), given), "direction", 2e-5)


@torch.no_grad()
def test_padding_takes_part_in_attention() -> None:
    given, model = tiny_inputs(), tiny_model()
    before = model(**given)
    for token in (model.x_pad_token, model.cap_pad_token):
        token.mul_(2)
        assert (model(**given) - before).abs().max() > 1e-3
        token.div_(2)


def test_sizes_that_do_not_fit_are_refused() -> None:
    given = tiny_inputs()
    with pytest.raises(ValueError, match="cannot be cut into patches"):
        tiny_model()(**{**given, "noisy": given["noisy"][..., :-1]})
