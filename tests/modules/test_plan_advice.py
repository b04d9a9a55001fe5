"""The number of --blocks_to_swap auto, and what to change where a plan does not fit, on predictions with
known bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from modules.errors import MemoryPlanError, OptionError
from modules.planning.memory_plan import CONTEXT, GIB, MARGIN, Room, advise, resolve_swap
from modules.speed_options import AUTO, SwapOptions, TrainingSpeedOptions
from tests.training.toy import toy_options


@dataclass(frozen=True)
class Known:
    """So many GiB, of which every swapped block saves one."""

    gib: float
    most: int = 3

    def device(self, blocks: int) -> int:
        return int((self.gib - blocks) * GIB)


def never() -> Known:
    raise AssertionError("not asked for")


def always(gib: float, most: int = 3) -> Callable[[], Known]:
    return lambda: Known(gib, most)


@pytest.mark.parametrize(
    ("cheaper", "expected", "last"),
    [
        ([("--a", always(4)), ("--b", never)], ["--a: 4.00 GiB fits"], None),
        ([("--a", always(7)), ("--b", never)], ["--a: 7.00 GiB", "--blocks_to_swap 2: 5.00 GiB fits"], None),
        (
            [("--a", always(9)), ("--b", always(8))],
            ["--a: 9.00 GiB", "--b: 8.00 GiB", "--blocks_to_swap 3: 5.00 GiB fits"],
            None,
        ),
        ([("--a", always(9))], ["--a: 9.00 GiB"], Known(9)),
        ([], ["--blocks_to_swap 2: 5.00 GiB fits"], None),
    ],
)
def test_advice_adds_up_until_it_fits(
    cheaper: list[tuple[str, Callable[[], Known]]], expected: list[str], last: Known | None
) -> None:
    assert advise(Known(7), cheaper, 5 * GIB) == (expected, last)


def test_advice_names_the_phase_and_counts_the_blocks_that_are_swapped_already() -> None:
    lines, _ = advise(Known(9), [("--a", always(7))], 5 * GIB, swapped=2, phase=" while denoising")

    assert lines == ["--a: 5.00 GiB while denoising fits"]


@pytest.mark.parametrize("cheaper", [[], [("--a", always(6))]])
def test_what_cannot_swap_is_not_told_to(cheaper: list[tuple[str, Callable[[], Known]]]) -> None:
    lines, last = advise(Known(6), cheaper, 5 * GIB, can_swap=False)

    assert not any("swap" in line for line in lines)
    assert last == Known(6)


def room(gib: float) -> Room:
    """Of which so much can be used."""
    return Room("a card", 100 * GIB, math.ceil((gib * GIB + CONTEXT) / (1 - MARGIN)))


@pytest.fixture
def speed(tmp_path_factory: pytest.TempPathFactory) -> TrainingSpeedOptions:
    return toy_options(tmp_path_factory.mktemp("toy")).speed


def asking(speed: TrainingSpeedOptions, blocks: int | str) -> TrainingSpeedOptions:
    return replace(speed, swap=SwapOptions(blocks_to_swap=blocks, img_in_txt_in_offloading=False))


def test_auto_becomes_the_smallest_number_that_fits(speed: TrainingSpeedOptions) -> None:
    found, prediction = resolve_swap(asking(speed, AUTO), room(5), always(7))

    assert found == asking(speed, 2)
    assert prediction == Known(7)


def test_a_number_stays_and_is_predicted(speed: TrainingSpeedOptions) -> None:
    assert resolve_swap(asking(speed, 1), room(5), always(7)) == (asking(speed, 1), Known(7))
    with pytest.raises(OptionError, match="--blocks_to_swap 4: at most 3"):
        resolve_swap(asking(speed, 4), room(5), always(7))


@pytest.mark.parametrize(("asked", "expected"), [(AUTO, 0), (2, 2)])
def test_without_a_device_nothing_is_rehearsed(
    speed: TrainingSpeedOptions, asked: int | str, expected: int
) -> None:
    assert resolve_swap(asking(speed, asked), None, never) == (asking(speed, expected), None)


def test_a_rehearsal_that_fails_stops_a_run_only_if_auto_waits_for_it(
    speed: TrainingSpeedOptions, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Known:
        raise RuntimeError("an operator without a plan")

    assert resolve_swap(asking(speed, 2), room(5), fail) == (asking(speed, 2), None)
    assert "an operator without a plan" in caplog.text
    with pytest.raises(MemoryPlanError, match="an operator without a plan"):
        resolve_swap(asking(speed, AUTO), room(5), fail)
