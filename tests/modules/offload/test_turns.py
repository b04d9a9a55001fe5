"""A network that takes turns gives the bits of one that stays, whatever is done between.

The device is the fake one of the tests of block swap: a weight that is used on the host, before it has come
or after it has left is not a number.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modules.contract.loading import Placement
from modules.offload.block_swap import swap_blocks, swap_of
from modules.offload.swap_plan import HostWeights, SwapPlan, host_weights
from modules.offload.turns import HostCopy
from modules.speed_options import Quantisation
from tests.modules.fake_device import CountedMemory, FakeDevice, hide
from tests.modules.swap_cases import CASES, CPU, Case, same, swapped
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit

WAN = CASES[0]


class CountingDevice(CountedMemory, FakeDevice):
    """Knows how much of its memory is in use."""


def taking_turns(dit: nn.Module, device: FakeDevice, place: HostWeights | None = None) -> HostCopy:
    """Have a network take turns on a device that cannot use the host's memory."""
    swap = swap_of(dit)
    copy = HostCopy(dit, CPU, place, device)
    for tensor in [*dit.parameters(), *dit.buffers()]:
        if not tensor.requires_grad and (swap is None or tensor not in swap.held):
            hide(tensor.data)
    return copy


@torch.no_grad()
def output_of(case: Case, dit: nn.Module) -> list[Tensor]:
    return [dit(**case.inputs(1))]


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_output_is_that_of_a_network_that_stays(case: Case, blocks: int) -> None:
    expected = output_of(case, case.make().eval())
    device, dit = CountingDevice(), case.make().eval()
    swapped(dit, case.spec, blocks, device)
    copy = taking_turns(dit, device)
    before = {name: (id(each), each.dtype, each.shape) for name, each in dit.named_parameters()}

    for _ in range(2):
        assert not copy.is_here
        copy.bring()
        assert copy.is_here
        assert same(output_of(case, dit), expected)
        copy.leave()
        assert device.used == 0

    assert "out" not in device.log
    assert {name: (id(each), each.dtype, each.shape) for name, each in dit.named_parameters()} == before


def test_two_networks_never_take_more_than_the_larger_one() -> None:
    device = CountingDevice()
    dits = [WAN.make().eval() for _ in range(2)]
    copies = [taking_turns(dit, device) for dit in dits]
    for turn in (0, 1, 0):
        copies[1 - turn].leave()
        copies[turn].bring()
        assert same(output_of(WAN, dits[turn]), output_of(WAN, WAN.make().eval()))
    assert device.most == copies[0].size_bytes == copies[1].size_bytes


@pytest.mark.parametrize("quantisation", [None, Quantisation("rows")], ids=["16 bits", "fp8"])
def test_weights_are_read_straight_to_where_they_wait(
    tmp_path: Path, quantisation: Quantisation | None
) -> None:
    path = write_dit(tmp_path / "dit.safetensors", tiny_state("t2v", num_layers=5))
    plain = load_dit(path, Placement(CPU, fp8=quantisation)).eval()
    place, device = host_weights(SwapPlan(WAN.spec, 0), CPU, whole=True), FakeDevice()
    assert place is not None
    dit = load_dit(path, Placement(CPU, fp8=quantisation, host=place)).eval()
    addresses = {tensor.data_ptr() for tensor in place.tensors.values()}
    copy = taking_turns(dit, device, place)

    assert {weight.data_ptr() for weight in dit.parameters()} <= addresses
    assert (len(list(dit.buffers())) > 0) == (quantisation is not None)  # scales, which move too
    copy.bring()
    assert addresses.isdisjoint({each.data_ptr() for each in [*dit.parameters(), *dit.buffers()]})
    assert same(output_of(WAN, dit), output_of(WAN, plain))


def test_swapped_weights_keep_their_own_place(tmp_path: Path) -> None:
    path = write_dit(tmp_path / "dit.safetensors", tiny_state("t2v", num_layers=5))
    host, device = host_weights(SwapPlan(WAN.spec, 3, False), CPU, whole=True), FakeDevice()
    dit = load_dit(path, Placement(CPU, host=host)).eval()
    swap_blocks(dit, host, CPU, device)
    assert host is not None
    held = host.adopt(dit)
    for tensor in held.values():
        hide(tensor)
    copy = taking_turns(dit, device, host)
    copy.bring()

    assert same(output_of(WAN, dit), output_of(WAN, load_dit(path, Placement(CPU)).eval()))
    copy.leave()
    assert copy.size_bytes + sum(each.nbytes for each in held.values()) == sum(
        each.nbytes for each in dit.parameters()
    )
    assert all(dit.get_parameter(name).data_ptr() == each.data_ptr() for name, each in held.items())


def test_a_network_that_has_worked_on_the_device_frees_all_it_has_there() -> None:
    device, dit = CountingDevice(), WAN.make().eval()
    swapped(dit, WAN.spec, 3, device)
    output_of(WAN, dit)
    assert device.used > 0
    copy = taking_turns(dit, device)
    assert device.used == 0
    copy.bring()
    assert same(output_of(WAN, dit), output_of(WAN, WAN.make().eval()))


class Interruption(BaseException):
    """Comes from anywhere, as Ctrl-C."""


@pytest.mark.parametrize("name", ["mark", "memory", "copy", "wait"])
def test_after_an_interruption_the_network_can_be_brought_again(name: str) -> None:
    device, dit = CountingDevice(), WAN.make().eval()
    copy = taking_turns(dit, device)
    original, calls = getattr(device, name), []

    def interrupted(*arguments):  # type: ignore[no-untyped-def]
        calls.append(name)
        if len(calls) == (20 if name == "memory" else 1):
            raise Interruption
        return original(*arguments)

    setattr(device, name, interrupted)
    with pytest.raises(Interruption):
        copy.bring()
    device.finish()
    assert not copy.is_here
    copy.bring()
    assert same(output_of(WAN, dit), output_of(WAN, WAN.make().eval()))


def test_compiled_blocks_are_not_compiled_again_when_a_network_comes_back() -> None:
    compiled: list[int] = []

    def backend(graph, _):  # type: ignore[no-untyped-def]
        compiled.append(1)
        return graph.forward

    device, dit = FakeDevice(), WAN.make().eval()
    expected = output_of(WAN, WAN.make().eval())
    for block in dit.get_submodule("blocks").children():
        block.forward = torch.compile(block.forward, backend=backend)
    copy = taking_turns(dit, device)
    counts = []
    for _ in range(3):
        copy.bring()
        assert same(output_of(WAN, dit), expected)
        copy.leave()
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2
