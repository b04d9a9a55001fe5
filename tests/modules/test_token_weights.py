"""Which token has which weight, and what weights do to rows."""

import pytest
import torch

from modules.contract.data import weigh_rows
from modules.contract.rules import Place, token_weights

TEXT = "a red, red car"
SPANS = ((2, 5, 2.0), (7, 14, 0.5))


@pytest.mark.parametrize(
    ("place", "weight"),
    [
        ((0, 1), 1.0),
        ((1, 5), 2.0),  # the blank in front does not count
        ((2, 4), 2.0),
        ((4, 6), 2.0),  # it begins inside
        ((5, 7), 1.0),
        ((5, 8), 1.0),  # it begins before
        ((6, 7), 1.0),  # a blank alone
        ((10, 11), 0.5),  # a blank inside
        ((10, 14), 0.5),
        ((14, 14), 1.0),
        (None, 1.0),
    ],
)
def test_a_token_belongs_where_its_first_character_is(place: Place, weight: float) -> None:
    assert token_weights(TEXT, [place], SPANS) == [weight]


def test_without_parts_every_token_weighs_one() -> None:
    assert token_weights(TEXT, [(0, 1), None], ()) == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_weight_one_keep_every_bit(dtype: torch.dtype) -> None:
    rows = (100 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))).to(dtype)
    weighed = weigh_rows(rows, [1.0, 1.4, 1.0, -0.5])
    assert weighed.dtype == dtype
    assert torch.equal(weighed[[0, 2]], rows[[0, 2]])
    assert torch.equal(weighed[4:], rows[4:])
    assert torch.equal(weighed[1], (rows[1].float() * 1.4).to(dtype))
    assert torch.equal(weighed[3], rows[3] * -0.5)
