"""Swapped blocks give the same bits as blocks that stay on the device, whatever is done with them.

The device is a fake one on which a weight that is used before its arrival, after its slot was given away, or
from host memory, is not a number.
"""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from hunyuan_model.spec import DIT as HUNYUAN
from krea2.configs import DIT as KREA2
from minimax_h3.configs import DIT as H3
from modules.errors import OptionError
from modules.script_options import parse_options
from protocols.family import DitSpec
from protocols.steps import Overrides
from runtime.offload.block_swap import get_swap, move_network, write_back_all
from runtime.offload.checkpointing import checkpoint_blocks
from runtime.offload.swap_plan import SwapPlan, check_swap, max_blocks, plan_list
from runtime.options import SwapOptions
from tests.modules.fake_device import FakeDevice, Interruption, hide
from tests.modules.swap_cases import CASES, Case, gradients, learner, same, step_in_backward, swapped
from wan.spec import DIT as WAN
from z_image.configs import DIT as Z_IMAGE

# all numbers of one list of blocks, and of two lists those with one and with none left
MANY = [pytest.param(CASES[0], blocks, id=f"{CASES[0].name} {blocks}") for blocks in range(1, 5)]
MANY += [pytest.param(case, blocks, id=f"{case.name} {blocks}") for case in CASES[1:] for blocks in (3, 4)]
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])


@functools.cache
def expected_gradients(case: Case, checkpointing: bool) -> list[Tensor]:
    return gradients(case, *learner(case, 0, checkpointing))


@functools.cache
def expected_outputs(case: Case) -> list[Tensor]:
    dit = case.make().eval()
    with torch.no_grad():
        return [
            dit(**case.inputs(seed), overrides=Overrides(skip_blocks=skipped)) for seed, skipped in PASSES
        ]


PASSES: list[tuple[int, frozenset[int]]] = [
    *((1, frozenset()), (2, frozenset({0})), (3, frozenset({1, 2})), (4, frozenset({4})), (5, frozenset())),
]


@pytest.mark.slow_cases(
    "framepack 3-checkpointed",
    "framepack 3-kept",
    "framepack 4-checkpointed",
    "framepack 4-kept",
    "hunyuan 3-checkpointed",
    "hunyuan 4-checkpointed",
    "hunyuan 4-kept",
    "wan 1-checkpointed",
)
@CHECKPOINTING
@pytest.mark.parametrize(("case", "blocks"), MANY)
def test_output_and_gradients_are_those_without_swap_in_the_memory_promised(
    case: Case, blocks: int, checkpointing: bool
) -> None:
    """All but the swapped blocks are held; at the most swapped, two of a list."""
    device = FakeDevice()
    dit, network = learner(case, blocks, checkpointing, device)

    for _ in range(2):
        found = gradients(case, dit, network)
        assert same(found, expected_gradients(case, checkpointing))
        assert len(found) > 10

    swap = get_swap(dit)
    assert swap is not None
    live = promised = 0
    counts = case.spec.swap_counts(blocks)
    for name, total, count in zip(case.spec.block_lists, case.blocks, counts, strict=True):
        layers = [part for part in dit.get_submodule(name).modules() if isinstance(part, nn.Linear)]
        live += sum(layer.weight.nbytes for layer in layers if layer.weight not in swap.in_host_memory)
        all_of_them = sum(layer.weight.nbytes for layer in layers)
        promised += all_of_them // total * (total if count == 0 else max(total - count, 2))
    assert live + device.live_bytes == promised


@pytest.mark.slow_cases("framepack 3")
@pytest.mark.parametrize(("case", "blocks"), MANY)
def test_generation_is_that_without_swap_also_with_skipped_blocks(case: Case, blocks: int) -> None:
    dit = case.make().eval()
    swapped(dit, case.spec, blocks, FakeDevice())

    with torch.no_grad():
        found = [
            dit(**case.inputs(seed), overrides=Overrides(skip_blocks=skipped)) for seed, skipped in PASSES
        ]

    assert same(found, expected_outputs(case))


def interrupt_at(device: FakeDevice, count: int) -> None:
    """Have the device raise when it is asked for something for the count-th time."""
    calls = itertools.count(1)

    def watched(original):  # type: ignore[no-untyped-def]
        def call(*arguments):  # type: ignore[no-untyped-def]
            if next(calls) == count:
                raise Interruption
            return original(*arguments)

        return call

    for name in ("record_event", "copy", "wait"):
        setattr(device, name, watched(getattr(device, name)))


@pytest.mark.slow_cases(
    "hunyuan-10-checkpointed",
    "hunyuan-10-kept",
    "hunyuan-14-checkpointed",
    "hunyuan-14-kept",
    "hunyuan-18-checkpointed",
    "hunyuan-18-kept",
    "hunyuan-2-checkpointed",
    "hunyuan-2-kept",
    "hunyuan-22-checkpointed",
    "hunyuan-22-kept",
    "hunyuan-26-checkpointed",
    "hunyuan-26-kept",
    "hunyuan-30-checkpointed",
    "hunyuan-30-kept",
    "hunyuan-34-checkpointed",
    "hunyuan-34-kept",
    "hunyuan-38-checkpointed",
    "hunyuan-38-kept",
    "hunyuan-6-checkpointed",
    "hunyuan-6-kept",
    "wan-10-kept",
    "wan-14-kept",
    "wan-18-kept",
    "wan-2-kept",
    "wan-22-kept",
    "wan-26-kept",
    "wan-30-kept",
    "wan-34-kept",
    "wan-38-kept",
    "wan-6-kept",
)
@CHECKPOINTING
@pytest.mark.parametrize("count", range(2, 40, 4))
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_after_an_interruption_anywhere_the_next_pass_is_right(
    case: Case, count: int, checkpointing: bool
) -> None:
    device = FakeDevice()
    dit, network = learner(case, case.maximum - 1, checkpointing, device)
    interrupt_at(device, count)
    with pytest.raises(Interruption):
        [gradients(case, dit, network, seed) for seed in range(9)]

    assert same(gradients(case, dit, network), expected_gradients(case, checkpointing))


def test_frozen_weights_are_never_copied_back_and_come_twice_a_step() -> None:
    case = CASES[0]
    device = FakeDevice()
    dit, network = learner(case, 4, True, device)  # all five blocks pass through two slots
    for seed in range(2):
        gradients(case, dit, network, seed)
    first = device.log.count("in")
    device.log.clear()
    gradients(case, dit, network)

    assert "out" not in device.log
    # forwards blocks 2, 3 and 4 (0 and 1 are there from the last backward pass), backwards 2, 1 and 0
    assert device.log.count("in") == 6
    assert first == 2 + 2 * 6


@pytest.mark.slow_cases("checkpointed")
@CHECKPOINTING
def test_weights_that_learn_are_copied_back(checkpointing: bool) -> None:
    """Stepped inside the backward pass, read after `settle`."""
    case, results = CASES[0], []
    for blocks in (0, 3):
        dit = case.make().requires_grad_(True)
        if checkpointing:
            checkpoint_blocks(dit, case.spec)
        host = swapped(dit, case.spec, blocks, FakeDevice())
        step_in_backward(dit.train())
        for seed in range(3):
            dit(**case.inputs(seed)).square().mean().backward()
        write_back_all([dit])
        for tensor in () if host is None else host.adopt(dit).values():
            hide(tensor)
        results.append([weight.detach().clone() for weight in dit.parameters()])
    assert same(*results)
    assert not torch.equal(results[0][-1], list(case.make().parameters())[-1])


@pytest.mark.slow_cases("framepack 3", "framepack 4")
@pytest.mark.parametrize(("case", "blocks"), [MANY[0], MANY[3], *MANY[4:]])
def test_weights_are_sent_for_before_their_block_is_entered(case: Case, blocks: int) -> None:
    """In every pass, forwards and backwards, also where the last block is followed by the first."""
    device = FakeDevice()
    dit, network = learner(case, blocks, True, device)
    swap = get_swap(dit)
    assert swap is not None
    enter = swap.enter

    def counted(position: int, backward: bool) -> None:
        device.clock += 1
        enter(position, backward)

    swap.enter = counted  # type: ignore[method-assign]
    for seed in range(2):
        gradients(case, dit, network, seed)
        with torch.no_grad():
            dit(**case.inputs(seed))

    assert len(device.ages) >= 10
    assert min(device.ages) >= 1


@pytest.mark.slow_cases("hunyuan-checkpointed")
@CHECKPOINTING
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_under_autocast_and_in_bf16(case: Case, checkpointing: bool) -> None:
    results = []
    for blocks, device in ((0, None), (2, FakeDevice())):
        dit, network = learner(case, blocks, checkpointing, device, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(case, dit, network))
    assert same(*results)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_input_layers_are_on_the_device_during_their_calls_only(case: Case) -> None:
    dit = case.make().eval()
    host = swapped(dit, case.spec, 0, None, input_layers=True)
    assert host is not None
    names = [name for name in case.spec.input_layers if hasattr(dit, name)]
    assert len(names) >= 2
    places = host.adopt(dit)
    seen: list[bool] = []
    for name, place in places.items():
        layer = dit.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(
            lambda layer, _, place=place: seen.append(layer.weight.data_ptr() == place.data_ptr())
        )
        inner = layer.forward.args[0]  # type: ignore[union-attr]

        def watched(*inputs, layer=layer, place=place, inner=inner):  # type: ignore[no-untyped-def]
            seen.append(layer.weight.data_ptr() != place.data_ptr())
            return inner(*inputs)

        layer.forward.__setstate__((layer.forward.func, (watched, *layer.forward.args[1:]), {}, {}))  # type: ignore[union-attr]
    with torch.no_grad():
        output = dit(**case.inputs(1))

    assert all(seen)
    assert len(seen) >= 2 * len(places)
    assert torch.equal(output, expected_outputs(case)[0])
    assert all(dit.get_parameter(name).data_ptr() == place.data_ptr() for name, place in places.items())


def test_moving_a_network_leaves_swapped_weights_where_they_are() -> None:
    """The meta device stands for the other one."""
    case = CASES[1]
    dit = case.make().eval()
    host = swapped(dit, case.spec, 3, FakeDevice(), input_layers=True)
    assert host is not None
    with torch.no_grad():
        dit(**case.inputs(1))

    move_network(dit, torch.device("meta"))

    places = host.adopt(dit)
    for name, weight in dit.named_parameters():
        assert weight.is_meta != (name in places)
    assert all(dit.get_parameter(name).data_ptr() == place.data_ptr() for name, place in places.items())
    plain = case.make()
    move_network(plain, torch.device("meta"))
    assert all(weight.is_meta for weight in plain.parameters())


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 30, 40])
def test_the_device_holds_all_but_the_swapped_blocks_which_are_spread_evenly(num_blocks: int) -> None:
    """Between two streamed blocks there are as many resident ones as anywhere else, or one more."""
    for count in range(num_blocks):
        plan = plan_list("blocks", num_blocks, count)
        minimum = 2 if count else 1  # one that computes and one that comes
        assert num_blocks - len(plan.streamed) + plan.slots == max(num_blocks - count, minimum)
        assert set(plan.streamed) <= set(range(num_blocks))
        gaps = {later - earlier for earlier, later in itertools.pairwise(plan.streamed)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert 0 not in gaps


def test_numbers_count_as_in_the_known_tuners() -> None:
    assert WAN.swap_counts(39) == (39,)
    assert HUNYUAN.swap_counts(38) == (19, 39)
    assert max_blocks([40], WAN.swap_counts) == 39
    assert max_blocks([20, 40], HUNYUAN.swap_counts) == 38
    assert max_blocks([2, 3], HUNYUAN.swap_counts) == 0


@pytest.mark.parametrize(
    ("spec", "blocks", "maximum"),
    [
        (H3, [50], 48),
        (Z_IMAGE, [30], 28),
        (KREA2, [28], 27),
        (H3, [2], 1),
        (H3, [1], 0),
    ],
)
def test_as_many_blocks_are_swapped_as_the_known_tuners_allow(
    spec: DitSpec, blocks: list[int], maximum: int
) -> None:
    assert max_blocks(blocks, spec.swap_counts, spec.num_unswapped) == maximum
    with pytest.raises(OptionError, match=f"at most {maximum} can be swapped. Use {maximum} or less"):
        check_swap(spec, maximum + 1, blocks)


def test_too_many_are_refused_with_the_number_that_can_be() -> None:
    dit = nn.Module()
    dit.double_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
    dit.single_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(40))
    assert [each.num_blocks for each in SwapPlan(HUNYUAN, 38).lists(dit)] == [20, 40]
    with pytest.raises(OptionError, match=r"--blocks_to_swap 39: .* 20 \+ 40 blocks, at most 38 can be"):
        SwapPlan(HUNYUAN, 39).names(dit)


def test_only_the_large_weights_of_the_blocks_leave_the_device() -> None:
    dit = CASES[0].make()
    matrices = {name for name, weight in dit.named_parameters() if weight.ndim == 2}
    large = {name for name in matrices if name.startswith("blocks.")}
    inputs = {"patch_embedding.weight", "text_embedding.0.weight", "text_embedding.2.weight"}

    assert set(SwapPlan(WAN, 4).names(dit)) == large
    assert set(SwapPlan(WAN, 0, input_layers=True).names(dit)) == inputs


def test_the_option_takes_a_number_or_auto() -> None:
    def options(*words: str) -> SwapOptions:
        return parse_options(None, words, SwapOptions)[0]

    number, auto = options("--blocks_to_swap", "7"), options("--blocks_to_swap", "auto")
    assert options().number == 0
    assert not SwapPlan(WAN, options().number)
    assert (number.number, number.is_auto, auto.is_auto) == (7, False, True)
    with pytest.raises(OptionError, match="--blocks_to_swap auto: .* Pass one"):
        _ = auto.number
    with pytest.raises(OptionError, match="--blocks_to_swap -1"):
        options("--blocks_to_swap", "-1")
    with pytest.raises(SystemExit):
        options("--blocks_to_swap", "many")
