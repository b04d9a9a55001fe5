"""Ways to run that join: what they refuse, and how they group processes."""

import pytest

from modules.errors import OptionError
from modules.script_options import parse_options
from runtime.options import GenerationSpeedOptions, TrainingSpeedOptions
from runtime.ways.composing import (
    check_launch,
    count_groups,
    count_shared_passes,
    divided_options,
    list_block_options,
)
from runtime.ways.contract import Division, FurtherModel, RunUses


def training(words: str) -> TrainingSpeedOptions:
    return parse_options(None, words.split(), TrainingSpeedOptions)[0]


def generation(words: str) -> GenerationSpeedOptions:
    return parse_options(None, words.split(), GenerationSpeedOptions)[0]


def check_ways(speed: TrainingSpeedOptions | GenerationSpeedOptions, uses: RunUses) -> None:
    for check in speed.modes.hooks.check_uses:
        check(uses)


USED = {
    "teacher": (
        RunUses(further_models=(FurtherModel("the teacher", "--teacher_dit x"),)),
        "--teacher_dit x with --shard_base: the teacher would not be split",
    ),
    "turns": (RunUses(turn_taking_options=("--lazy_loading",)), "--lazy_loading and --shard_base"),
    "samples": (
        RunUses(separate_sample_model="--sample_dit"),
        "--shard_base: samples .* Omit --sample_dit",
    ),
    "module": (
        RunUses(foreign_module="lycoris.kohya", own_modules=("networks.lora", "networks.loha")),
        "--shard_base with --network_module lycoris.kohya: .* Use one of networks.lora, networks.loha",
    ),
}


@pytest.mark.parametrize("what", USED)
def test_what_split_weights_do_not_go_with_is_refused_by_name(what: str) -> None:
    uses, message = USED[what]
    check_ways(training(""), uses)
    check_ways(training("--context_parallel 2"), uses)

    with pytest.raises(OptionError, match=message):
        check_ways(training("--shard_base"), uses)


def test_a_step_cache_goes_with_shared_passes_or_with_split_weights() -> None:
    uses = RunUses(has_step_cache=True)
    check_ways(generation("--cfg_parallel"), uses)
    check_ways(generation("--shard_base"), uses)

    with pytest.raises(OptionError, match="--cfg_parallel and --shard_base .* a step cache"):
        check_ways(generation("--cfg_parallel --shard_base"), uses)


def test_processes_are_grouped_by_tokens_and_passes() -> None:
    tokens, both = generation("--context_parallel 2"), generation("--context_parallel 2 --cfg_parallel")

    assert (count_groups(tokens, 6), count_shared_passes(tokens, 6)) == (3, 1)
    assert (count_groups(both, 6, passes=3), count_shared_passes(both, 6)) == (1, 3)
    with pytest.raises(OptionError, match="--context_parallel 2: 3 processes cannot form groups of 2"):
        count_groups(tokens, 3)


def test_processes_that_would_repeat_a_prompt_are_refused_unless_they_share_its_passes() -> None:
    check_launch(generation("--context_parallel 2 --cfg_parallel"), 4, RunUses())
    check_launch(generation("--context_parallel 4"), 4, RunUses())

    with pytest.raises(OptionError, match="4 processes would make each prompt 2 times"):
        check_launch(generation("--context_parallel 2"), 4, RunUses())


def test_ways_are_named_as_they_are_typed_and_those_of_blocks_are_known() -> None:
    assert generation("--cfg_parallel --shard_base").modes.flags == ["--shard_base", "--cfg_parallel"]
    assert training("--context_parallel 1").modes.flags == []
    assert list_block_options() == ["shard_base", "context_parallel"]
    assert training("--shard_base --context_parallel 2").modes.flags_for_generation == {"--shard_base": True}


def test_a_division_sets_the_options_that_divide() -> None:
    assert divided_options(Division(4, True, 2)) == {"shard_base": True, "context_parallel": 2}
