import pytest
from torch import nn

from hunyuan_model.spec import DIT as HUNYUAN
from modules.errors import OptionError
from modules.offload.swap_plan import SwapPlan, most_blocks, plan_list
from modules.parser import parse_options
from modules.speed_options import SwapOptions
from tests.modules.swap_cases import CASES
from wan.spec import DIT as WAN


def options(*words: str) -> SwapOptions:
    return parse_options(None, words, SwapOptions)[0]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 30, 40])
def test_the_device_holds_all_but_the_swapped_blocks(num_blocks: int) -> None:
    for swapped in range(num_blocks):
        plan = plan_list("blocks", num_blocks, swapped)
        least = 2 if swapped else 1  # one that computes and one that comes
        assert num_blocks - len(plan.streamed) + plan.slots == max(num_blocks - swapped, least)
        assert len(set(plan.streamed)) == len(plan.streamed)
        assert set(plan.streamed) <= set(range(num_blocks))


def test_streamed_blocks_are_spread_evenly() -> None:
    """Between two streamed blocks there are as many resident ones as anywhere else, or one more."""
    for swapped in range(1, 38):
        streamed = plan_list("blocks", 40, swapped).streamed
        gaps = {later - earlier for earlier, later in zip(streamed, streamed[1:], strict=False)}
        assert max(gaps) - min(gaps) <= 1


def test_numbers_count_as_in_the_known_tuners() -> None:
    assert WAN.swap_counts(39) == (39,)
    assert HUNYUAN.swap_counts(36) == (18, 37)
    assert HUNYUAN.swap_counts(38) == (19, 39)
    assert most_blocks([40], WAN.swap_counts) == 39
    assert most_blocks([30], WAN.swap_counts) == 29
    assert most_blocks([20, 40], HUNYUAN.swap_counts) == 38
    assert most_blocks([2, 3], HUNYUAN.swap_counts) == 0


def released(double: int, single: int) -> nn.Module:
    """A network with that many blocks, empty ones."""
    dit = nn.Module()
    dit.double_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(double))
    dit.single_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(single))
    return dit


def test_too_many_are_refused_with_the_number_that_can_be() -> None:
    dit = released(20, 40)
    assert [each.num_blocks for each in SwapPlan(HUNYUAN, 38).lists(dit)] == [20, 40]
    with pytest.raises(
        OptionError,
        match=r"--blocks_to_swap 39: the transformer has 20 \+ 40 blocks, at most 38 can be swapped",
    ):
        SwapPlan(HUNYUAN, 39).names(dit)


def test_only_the_large_weights_of_the_blocks_leave_the_device() -> None:
    dit = CASES[0].make()
    names = set(SwapPlan(WAN, 4).names(dit))

    assert {
        name for name, weight in dit.named_parameters() if name.startswith("blocks.") and weight.ndim == 2
    } == names
    assert set(SwapPlan(WAN, 0, input_layers=True).names(dit)) == {
        *("patch_embedding.weight", "text_embedding.0.weight", "text_embedding.2.weight")
    }


def test_the_option_takes_a_number_or_auto() -> None:
    assert options().number == options("--blocks_to_swap", "0").number == 0
    assert options("--blocks_to_swap", "7").number == 7
    assert options("--blocks_to_swap", "auto").is_auto
    assert not options("--blocks_to_swap", "7").is_auto
    assert not SwapPlan(WAN, options().number)
    with pytest.raises(OptionError, match="--blocks_to_swap auto: .* Give one"):
        _ = options("--blocks_to_swap", "auto").number
    with pytest.raises(OptionError, match="--blocks_to_swap -1"):
        options("--blocks_to_swap", "-1")
    with pytest.raises(SystemExit):
        options("--blocks_to_swap", "many")
