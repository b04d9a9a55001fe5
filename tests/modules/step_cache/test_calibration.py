"""What calibrations measure, against values worked out by hand."""

import pytest
import torch
from torch import Tensor

from modules.contract.steps import Tweaks
from modules.run_blocks import Hidden, Runner
from modules.step_cache import Changes, Ratios, measure_pass, polynomial
from tests.modules.step_cache.turns import nothing, turn
from tests.tiny.dits import ONE_OF_EACH


def tokens(*sizes: float) -> Tensor:
    """A token of each size, B L C."""
    return torch.tensor(sizes).view(1, -1, 1).expand(1, -1, 4) / 2


def test_ratios_are_means_over_tokens_passes_and_sections() -> None:
    ratios = Ratios()
    for section in range(2):
        ratios.forget()
        for step, sizes in enumerate([(1.0, 2.0), (1.1, 2.6), (2.2, 2.6)]):
            ratios.measure(turn(step, 3), nothing, tokens(*sizes))
            if section == 0:
                ratios.measure(turn(step, 3, "negative"), nothing, tokens(1.0, 1.0))
    # (1.1 + 1.3) / 2 = 1.2 twice, and 1 once; (2 + 1) / 2 = 1.5 twice, and 1 once
    assert ratios.result(3) == pytest.approx([1.0, (1.2 + 1.2 + 1) / 3, (1.5 + 1.5 + 1) / 3])


def test_a_step_that_lacks_the_pass_has_no_ratio_and_neither_has_the_one_after() -> None:
    ratios = Ratios()
    ratios.forget()
    for step, size in ((0, 1.0), (1, 2.0), (3, 5.0), (4, 10.0)):
        ratios.measure(turn(step, 5), nothing, tokens(size))
    assert ratios.result(5) == [1.0, 2.0, 1.0, 1.0, 2.0]


def fitted(count: int, coefficients: tuple[float, ...]) -> tuple[Changes, list[float]]:
    """Coefficients fitted to `count` points of a polynomial."""
    changes, entered, residual = Changes(), 1.0, 1.0
    changes.forget()
    for step in range(count + 1):
        level, added = torch.full((1, 2, 4), entered), torch.full((1, 2, 4), residual)
        changes.measure(turn(step, count + 1), lambda level=level: level, added)
        change = 0.01 * (step + 1)
        entered *= 1 + change
        residual *= 1 + polynomial(coefficients, change)
    return changes, changes.result()


def test_the_polynomial_is_found_again() -> None:
    coefficients = (20.0, -3.0, 0.5, 0.02)
    _, found = fitted(24, coefficients)
    assert len(found) == 5
    for x in (0.02, 0.1, 0.2):
        assert polynomial(tuple(found), x) == pytest.approx(polynomial(coefficients, x), rel=1e-2)


@pytest.mark.parametrize(("points", "count"), [(5, 0), (6, 2), (8, 2), (9, 3), (12, 4), (15, 5), (40, 5)])
def test_few_points_give_few_powers(points: int, count: int) -> None:
    changes, found = fitted(points, (0.5, 0.01))
    assert len(found) == count
    assert len(changes.points) == points


def test_passes_that_skip_layers_do_not_count() -> None:
    tiny = ONE_OF_EACH[0]
    dit, seen = tiny.make(1).eval(), list[int]()

    def inner(dit: torch.nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        hidden.x = hidden.x + 1

    run: Runner = inner
    for skipped in (frozenset[int](), frozenset({0})):
        measure_pass(
            lambda turn, signal, residual: seen.append(int(residual.mean())),
            run,
            dit,
            Hidden(torch.zeros(1, 2, 4), None),
            Tweaks(skip_blocks=skipped, turn=turn(0, 3)),
        )
    measure_pass(
        lambda turn, signal, residual: seen.append(2), run, dit, Hidden(torch.zeros(1, 2, 4), None), Tweaks()
    )
    assert seen == [1]
