"""Arithmetic of the plan on numbers, on headers of released files, and on predictions with known bytes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from modules.devices import GIB
from modules.errors import MemoryPlanError, OptionError
from protocols.family import DitSpec
from runtime.offload.swap_plan import SwapPlan
from runtime.options import AUTO, SwapOptions, TrainingSpeedOptions
from runtime.planning.device_memory import CONTEXT, MARGIN, DeviceMemory, comparison
from runtime.planning.dry_run import ACTIVATIONS, TEMPORARY, WEIGHTS
from runtime.planning.memory_plan import (
    MemoryPart,
    MemoryPlan,
    OffloadedWeights,
    Phase,
    advise,
    list_memory_parts,
    plan_swapped_bytes,
    predict_swaps,
    print_plan,
    resolve_swap,
    show,
    swap_for,
    verdict,
)
from tests.training.toy import toy_options

SPEC = DitSpec(block_lists=("blocks",))


def model(blocks: int = 6) -> nn.Module:
    """Blocks of one layer of 1 MiB in bfloat16, and a bias."""
    dit = nn.Module()
    with torch.device("meta"):
        dit.blocks = nn.ModuleList(nn.Linear(512, 1024, dtype=torch.bfloat16) for _ in range(blocks))
    return dit


def test_swapped_blocks_leave_the_device_but_for_the_places_they_pass_through() -> None:
    found = plan_swapped_bytes(model(), SwapPlan(SPEC, 3))
    # as much device memory as three blocks take
    assert found == OffloadedWeights(host_bytes=5 << 20, slot_bytes=2 << 20)
    assert found.saved_device_bytes == 3 << 20
    saved = [each.saved_device_bytes for each in predict_swaps(model(), SPEC, SwapOptions(blocks_to_swap=0))]
    assert saved == [0, 1 << 20, 2 << 20, 3 << 20, 4 << 20, 4 << 20]  # two places are always needed


def plan(size: int) -> MemoryPlan:
    moment = {WEIGHTS: 8 * GIB, ACTIVATIONS: GIB, TEMPORARY: size - 6 * GIB}
    parts = list_memory_parts(
        moment, OffloadedWeights(4 * GIB, GIB), {WEIGHTS: "8.00 bfloat16"}, waiting=2 * GIB
    )
    return MemoryPlan((Phase("text", (MemoryPart("weights", GIB),)), Phase("training step", parts)))


def test_the_table_holds_all_parts_of_device_and_host(capsys: pytest.CaptureFixture[str]) -> None:
    show(plan(10 * GIB), "Fits")
    text = capsys.readouterr().out
    assert "training step (largest)" in text
    lines = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    # device, host, note
    assert lines["weights of the transformer"][-4:] == ["5.00", "4.00", "8.00", "bfloat16"]
    assert lines["kept activations"][-2:] == ["1.00", "2.00"]
    assert plan(10 * GIB).device == 10 * GIB
    assert plan(10 * GIB).host == 6 * GIB


def test_the_last_line_judges_and_says_what_to_change() -> None:
    room = DeviceMemory("a card", 24 * GIB, 24 * GIB)
    assert verdict(plan(10 * GIB), room).startswith("Fits: 10.00 GiB")
    too_much = verdict(plan(23 * GIB), room, ["--blocks_to_swap 4: 20.00 GiB fits"])
    assert too_much.startswith("Does not fit: 23.00 GiB")
    assert too_much.endswith("--blocks_to_swap 4: 20.00 GiB fits")
    assert "no CUDA device" in verdict(plan(10 * GIB), None)


def test_a_prediction_that_is_far_off_is_told() -> None:
    assert comparison(103 * GIB, 100 * GIB) == "Memory: predicted 103.00 GiB, measured 100.00 GiB (+3.0%)."
    assert "more than 7% off" in comparison(92 * GIB, 100 * GIB)


@dataclass(frozen=True)
class Known:
    """So many GiB, of which every swapped block saves one."""

    gib: float
    max_swapped_blocks: int = 3

    def device_bytes(self, blocks: int) -> int:
        return int((self.gib - blocks) * GIB)


EVEN = Known(20, max_swapped_blocks=12)


def test_auto_is_the_smallest_number_that_fits_else_the_largest() -> None:
    auto = SwapOptions(blocks_to_swap="auto")
    room = DeviceMemory("a card", 18 * GIB, 16 * GIB)
    count, reason = swap_for(EVEN, auto, room)
    assert count == 6
    assert EVEN.device_bytes(count) <= room.usable < EVEN.device_bytes(count - 1)
    assert reason is not None
    assert reason.startswith("--blocks_to_swap auto: 6. 14.00 GiB are predicted")
    assert swap_for(Known(20), auto, room)[0] == 3
    assert swap_for(EVEN, auto, None)[0] == 0  # a CPU


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("auto", ("--blocks_to_swap auto: 6. 14.00 GiB are predicted", "Fits: 14.00 GiB")),
        (2, ("Does not fit: 18.00 GiB", "a card of more than 16")),
    ],
)
def test_a_plan_is_shown_with_the_blocks_of_auto_or_with_advice(
    number: int | str, said: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def plan_of(blocks: int, remarks: Sequence[str]) -> MemoryPlan:
        phase = Phase("training step", (MemoryPart("weights", EVEN.device_bytes(blocks)),))
        return MemoryPlan((phase,), tuple(remarks))

    def advice(room: DeviceMemory) -> list[str]:
        return [f"a card of more than {room.total // GIB}"]

    card = DeviceMemory("a card of 16 GiB", 16 * GIB, 16 * GIB)
    print_plan(EVEN, SwapOptions(blocks_to_swap=number), card, plan_of, advice)

    text = capsys.readouterr().out
    assert all(words in text for words in said)


Cheaper = list[tuple[str, Callable[[], Known]]]


def asked(*gib: int) -> Cheaper:
    """Predictions for --a, --b, ...; one of 0 may not be asked for."""

    def predict(size: int) -> Known:
        assert size, "not asked for"
        return Known(size)

    return [(f"--{character}", partial(predict, size)) for character, size in zip("ab", gib, strict=False)]


@pytest.mark.parametrize(
    ("cheaper", "expected", "last"),
    [
        (asked(4, 0), ["--a: 4.00 GiB fits"], None),
        (asked(7, 0), ["--a: 7.00 GiB", "--blocks_to_swap 2: 5.00 GiB fits"], None),
        (asked(9, 8), ["--a: 9.00 GiB", "--b: 8.00 GiB", "--blocks_to_swap 3: 5.00 GiB fits"], None),
        (asked(9), ["--a: 9.00 GiB"], Known(9)),
        ([], ["--blocks_to_swap 2: 5.00 GiB fits"], None),
    ],
)
def test_advice_adds_up_until_it_fits(cheaper: Cheaper, expected: list[str], last: Known | None) -> None:
    assert advise(Known(7), cheaper, 5 * GIB) == (expected, last)


def test_advice_names_smaller_forms_where_fp8_does_not_suffice() -> None:
    for size, named in ((4, False), (7, True)):
        lines, _ = advise(Known(9), [("--fp8_scaled", partial(Known, size))], 5 * GIB)
        assert ("--convrot_int8" in lines[0] and "--nf4" in lines[0]) == named


def test_advice_names_the_phase_and_counts_the_blocks_that_are_swapped_already() -> None:
    lines, _ = advise(Known(9), asked(7), 5 * GIB, swapped=2, phase=" while denoising")

    assert lines == ["--a: 5.00 GiB while denoising fits"]


@pytest.mark.parametrize(("cheaper", "expected"), [([], []), (asked(6), ["--a: 6.00 GiB"])])
def test_what_cannot_swap_is_not_told_to(cheaper: Cheaper, expected: list[str]) -> None:
    assert advise(Known(6), cheaper, 5 * GIB, can_swap=False) == (expected, Known(6))


def room(gib: float) -> DeviceMemory:
    """Of which so much can be used."""
    return DeviceMemory("a card", 100 * GIB, math.ceil((gib * GIB + CONTEXT) / (1 - MARGIN)))


@pytest.fixture
def speed(tmp_path_factory: pytest.TempPathFactory) -> TrainingSpeedOptions:
    return toy_options(tmp_path_factory.mktemp("toy")).speed


def asking(speed: TrainingSpeedOptions, blocks: int | str) -> TrainingSpeedOptions:
    return replace(speed, swap=SwapOptions(blocks_to_swap=blocks, img_in_txt_in_offloading=False))


def test_auto_becomes_a_number_and_a_number_stays(speed: TrainingSpeedOptions) -> None:
    ((_, seven), (_, never)) = asked(7, 0)
    assert resolve_swap(asking(speed, AUTO), room(5), seven) == (asking(speed, 2), Known(7))
    assert resolve_swap(asking(speed, 1), room(5), seven) == (asking(speed, 1), Known(7))
    with pytest.raises(OptionError, match="--blocks_to_swap 4: at most 3"):
        resolve_swap(asking(speed, 4), room(5), seven)
    for number, expected in ((AUTO, 0), (2, 2)):  # without a device
        assert resolve_swap(asking(speed, number), None, never) == (asking(speed, expected), None)


def test_a_rehearsal_that_fails_stops_a_run_only_if_auto_waits_for_it(
    speed: TrainingSpeedOptions, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Known:
        raise RuntimeError("an operator without a plan")

    assert resolve_swap(asking(speed, 2), room(5), fail) == (asking(speed, 2), None)
    assert "an operator without a plan" in caplog.text
    with pytest.raises(MemoryPlanError, match="an operator without a plan"):
        resolve_swap(asking(speed, AUTO), room(5), fail)
