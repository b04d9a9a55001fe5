"""Memory and ways of several cards, on numbers that can be counted by hand."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from modules.devices import GIB
from modules.errors import OptionError
from runtime.options import PlanOptions, cards_or_size
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.memory_plan import MemoryPart, MemoryPlan, OffloadedWeights, Phase, share_blocks
from runtime.planning.several_cards import (
    GpuLayout,
    SingleGpuRun,
    format_launch_command,
    plan_layouts,
    print_layouts,
)
from runtime.ways.contract import Division


def test_a_part_of_every_block_stays_and_three_blocks_are_gathered() -> None:
    blocks = (((1024, 1 << 20),),) * 8
    assert share_blocks(blocks, 4) == OffloadedWeights(0, 3 << 20, 6 << 20, 4)


@dataclass(frozen=True)
class Card:
    """So many GiB, of which every swapped block saves one."""

    gib: float
    max_swapped_blocks: int = 3

    @property
    def swaps(self) -> Sequence[OffloadedWeights]:
        return [OffloadedWeights(blocks * GIB, 0) for blocks in range(self.max_swapped_blocks + 1)]

    def device_bytes(self, blocks: int) -> int:
        return int((self.gib - blocks) * GIB)

    def plan(self, blocks: int) -> MemoryPlan:
        part = MemoryPart("weights", self.device_bytes(blocks), 2 * GIB + self.swaps[blocks].host_bytes)
        return MemoryPlan((Phase("training step", (part,)),))


def run(gib: float, *extra_options: str, heads: int = 12, is_full: bool = False) -> SingleGpuRun:
    """Of which half is weights, and half is tokens."""

    def divide(division: Division) -> Card:
        if division.shards_weights and is_full:
            raise OptionError("--shard_base splits frozen weights")
        weights = 1 / division.processes if division.shards_weights else 1
        return Card(gib / 2 * (weights + 1 / division.num_context_parallel))

    return SingleGpuRun(extra_options, heads, not is_full, divide)


def room(gib: float) -> DeviceMemory:
    """Of which nearly so much can be used."""
    return DeviceMemory("a card", int((gib + 0.6) / 0.97 * GIB), int((gib + 0.6) / 0.97 * GIB))


def test_every_way_has_its_memory_on_card_and_host() -> None:
    found = {
        " ".join(layout.extra_options): layout
        for layout in plan_layouts(run(20), 4, room(18.5), is_training=True)
    }

    both = "--shard_base --context_parallel 4"
    sizes = {
        extra_options: layout.memory.device / GIB for extra_options, layout in found.items() if layout.memory
    }
    assert sizes == {
        **{"": 20, "--context_parallel 2": 15, "--context_parallel 4": 12.5, "--blocks_to_swap 2": 18},
        **{"--shard_base": 12.5, "--shard_base --context_parallel 2": 7.5, both: 5},
    }
    assert [extra_options for extra_options, layout in found.items() if not layout.fits] == [""]
    assert found["--blocks_to_swap 2"].host == (4 * 2 + 2) * GIB  # a copy of the blocks for all
    assert {extra_options: layout.num_parallel for extra_options, layout in found.items()}[both] == 1
    assert found["--context_parallel 2"].num_parallel == 2


def test_a_generation_that_shares_anything_makes_one_clip_at_a_time() -> None:
    found = {
        " ".join(layout.extra_options): layout
        for layout in plan_layouts(run(20), 4, room(18.5), is_training=False)
    }

    sharing = ("--shard_base", "--context_parallel 4", "--shard_base --context_parallel 4")
    num_parallel = {"": 4, "--blocks_to_swap 2": 4, **dict.fromkeys(sharing, 1)}
    assert {extra_options: layout.num_parallel for extra_options, layout in found.items()} == num_parallel
    assert found["--blocks_to_swap 2"].host == 4 * (2 + 2) * GIB


@pytest.mark.parametrize(
    ("runs", "gib", "extra_options", "said"),
    [
        ([run(20)], 30, "", ""),
        ([run(20)], 18.5, " --blocks_to_swap 2", ""),
        ([run(20)], 16, " --shard_base", ""),
        ([run(20)], 12, " --shard_base --context_parallel 2", ""),
        ([run(40), run(20, "--fp8_base")], 12, " --fp8_base --shard_base --context_parallel 2", "with --fp8"),
        ([run(20, heads=5)], 12, None, "5 heads of attention are not divisible by 2"),
        ([run(20, is_full=True)], 16, " --context_parallel 2", "splits frozen weights"),
        ([run(20), run(19)], 5, None, "No layout fits: training step takes 9.50 GiB at least"),
    ],
)
def test_the_cheapest_that_fits_is_shown_with_its_command(
    runs: list[SingleGpuRun],
    gib: float,
    extra_options: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["wan_train_network.py", "--dit", "x", "--plan", "2x24", "--seed=1"])

    print_layouts(runs, 2, room(gib), is_training=True)

    text = capsys.readouterr().out
    assert said in text
    command = "accelerate launch --multi_gpu --num_processes 2 wan_train_network.py --dit x --seed=1"
    assert text.rstrip().endswith(command + extra_options if extra_options is not None else "larger cards.")


def test_a_run_of_one_process_is_refused() -> None:
    def divide(_: Division) -> Card:
        raise OptionError("--fused_backward_pass with 2 processes")

    with pytest.raises(OptionError, match="with 2 processes"):
        print_layouts([SingleGpuRun((), 12, False, divide)], 2, room(20), is_training=True)


@pytest.mark.parametrize("asked", ["--plan 2x24", "--plan=2x24", "--shard_base --blocks_to_swap 4 --plan"])
def test_a_command_keeps_what_no_way_decides(asked: str) -> None:
    layout = GpuLayout((), Division(2), num_parallel=2)
    argv = ["wan_generate_video.py", *asked.split(), "--prompt", "a cat"]
    typed = format_launch_command(layout, (), argv, is_training=False)
    assert typed == "python wan_generate_video.py --prompt 'a cat'"


@pytest.mark.parametrize(("text", "cards"), [("0", (1, 0)), ("24", (1, 24)), ("4X79.5", (4, 79.5))])
def test_cards_are_a_number_and_a_size(text: str, cards: tuple[int, float]) -> None:
    assert PlanOptions(plan=cards_or_size(text)).cards == cards


@pytest.mark.parametrize("text", ["2x", "x24", "0x24", "2x0", "2x0.0", "-1", "two", "2x24x2", "inf"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="2x24 for two"):
        cards_or_size(text)
