import math
from fractions import Fraction

import pytest

from modules.integers import ceil_div, round_up

PAIRS = [(0, 4), (1, 4), (4, 4), (5, 4), (2**60 + 1, 2), (-1, 4), (-4, 4), (-5, 4)]


@pytest.mark.parametrize(("number", "divisor"), PAIRS)
def test_a_quotient_is_rounded_up_exactly_also_beyond_what_a_float_holds(number: int, divisor: int) -> None:
    assert ceil_div(number, divisor) == math.ceil(Fraction(number, divisor))


@pytest.mark.parametrize(("number", "step"), PAIRS)
def test_rounding_up_gives_the_nearest_multiple_that_is_not_smaller(number: int, step: int) -> None:
    rounded = round_up(number, step)

    assert rounded % step == 0
    assert 0 <= rounded - number < step
