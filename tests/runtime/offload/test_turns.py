"""A network that takes turns gives the bits of one that stays, whatever is done between.

The device is the fake one of the tests of block swap: a weight that is used on the host, before it has come
or after it has left is not a number.
"""

import gc
import json
import os
import weakref
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.speed_options import Quantization
from networks.apply import LoraPatch
from networks.loading import WeightedLora, read_lora
from protocols.loading import HostWeightMemory, Placement, TensorInfo
from runtime.offload.block_swap import get_swap, swap_blocks
from runtime.offload.host_memory import ALIGNMENT, LoadedNetwork, allocate
from runtime.offload.swap_plan import HostWeights, SwapPlan, host_weights
from runtime.offload.turns import HostCopy
from tests.commands import ROOT, run_python
from tests.modules.fake_device import CountedMemory, FakeDevice, Interruption, hide
from tests.modules.swap_cases import CASES, CPU, Case, same, swapped
from tests.tiny.loras import unused
from tests.tiny.project import write_lora
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit
from wan.spec import DIT

WAN = CASES[0]


class CountingDevice(CountedMemory, FakeDevice):
    """Knows how much of its memory is in use."""


def taking_turns(dit: nn.Module, device: FakeDevice, place: HostWeights | None = None) -> HostCopy:
    """Have a network take turns on a device that cannot use the host's memory."""
    swap = get_swap(dit)
    copy = HostCopy(dit, CPU, place, device)
    for tensor in [*dit.parameters(), *dit.buffers()]:
        if not tensor.requires_grad and (swap is None or tensor not in swap.in_host_memory):
            hide(tensor.data)
    return copy


@torch.no_grad()
def output_of(case: Case, dit: nn.Module) -> list[Tensor]:
    return [dit(**case.inputs(1))]


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_the_output_is_that_of_a_network_that_stays(case: Case, blocks: int) -> None:
    expected = output_of(case, case.make().eval())
    device, dit = CountingDevice(), case.make().eval()
    swapped(dit, case.spec, blocks, device)
    copy = taking_turns(dit, device)
    before = {name: (id(each), each.dtype, each.shape) for name, each in dit.named_parameters()}

    for _ in range(2):
        assert not copy.is_on_device
        copy.to_device()
        assert copy.is_on_device
        assert same(output_of(case, dit), expected)
        copy.free_device_memory()
        assert device.used == 0

    assert "out" not in device.log
    assert {name: (id(each), each.dtype, each.shape) for name, each in dit.named_parameters()} == before


@pytest.mark.parametrize("quantization", [None, Quantization("rows")], ids=["16 bits", "fp8"])
def test_weights_are_read_straight_to_where_they_wait(
    tmp_path: Path, quantization: Quantization | None
) -> None:
    path = write_dit(tmp_path / "dit.safetensors", tiny_state("t2v", num_layers=5))
    plain = load_dit(path, Placement(CPU, quantization=quantization)).eval()
    place, device = host_weights(SwapPlan(WAN.spec, 0), CPU, all_weights=True), FakeDevice()
    assert place is not None
    dit = load_dit(path, Placement(CPU, quantization=quantization, host_weights=place)).eval()
    addresses = {tensor.data_ptr() for tensor in place.tensors.values()}
    copy = taking_turns(dit, device, place)

    assert {weight.data_ptr() for weight in dit.parameters()} <= addresses
    assert (len(list(dit.buffers())) > 0) == (quantization is not None)  # scales, which move too
    copy.to_device()
    assert addresses.isdisjoint({each.data_ptr() for each in [*dit.parameters(), *dit.buffers()]})
    assert same(output_of(WAN, dit), output_of(WAN, plain))


def test_swapped_weights_keep_their_own_place(tmp_path: Path) -> None:
    path = write_dit(tmp_path / "dit.safetensors", tiny_state("t2v", num_layers=5))
    host, device = host_weights(SwapPlan(WAN.spec, 3, False), CPU, all_weights=True), FakeDevice()
    dit = load_dit(path, Placement(CPU, host_weights=host)).eval()
    swap_blocks(dit, host, CPU, device)
    assert host is not None
    held = host.adopt(dit)
    for tensor in held.values():
        hide(tensor)
    copy = taking_turns(dit, device, host)
    copy.to_device()

    assert same(output_of(WAN, dit), output_of(WAN, load_dit(path, Placement(CPU)).eval()))
    copy.free_device_memory()
    full, swapped_away = (sum(each.nbytes for each in some) for some in (dit.parameters(), held.values()))
    assert copy.size_bytes == full - swapped_away
    assert all(dit.get_parameter(name).data_ptr() == each.data_ptr() for name, each in held.items())


def test_a_network_that_has_worked_on_the_device_frees_all_it_has_there() -> None:
    device, dit = CountingDevice(), WAN.make().eval()
    swapped(dit, WAN.spec, 3, device)
    output_of(WAN, dit)
    assert device.used > 0

    taking_turns(dit, device)

    assert device.used == 0


@pytest.mark.parametrize("name", ["record_event", "allocate", "copy", "wait"])
def test_after_an_interruption_the_network_can_be_brought_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, dit = CountingDevice(), WAN.make().eval()
    copy = taking_turns(dit, device)
    original, calls = getattr(device, name), count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == (20 if name == "allocate" else 1):
            raise Interruption
        return original(*arguments)

    monkeypatch.setattr(device, name, interrupted)
    with pytest.raises(Interruption):
        copy.to_device()
    device.finish()
    assert not copy.is_on_device
    copy.to_device()
    assert same(output_of(WAN, dit), output_of(WAN, WAN.make().eval()))


def test_compiled_blocks_are_not_compiled_again_when_a_network_comes_back() -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    device, dit = FakeDevice(), WAN.make().eval()
    expected = output_of(WAN, WAN.make().eval())
    for block in dit.get_submodule("blocks").children():
        block.forward = torch.compile(block.forward, backend=backend)
    copy = taking_turns(dit, device)
    counts = []
    for _ in range(3):
        copy.to_device()
        assert same(output_of(WAN, dit), expected)
        copy.free_device_memory()
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


def test_tensors_lie_where_a_device_likes_them_and_do_not_touch() -> None:
    kinds = ((torch.bfloat16, (3, 5)), (torch.float8_e4m3fn, (7,)), (torch.float32, (2,)))
    infos = {str(number): TensorInfo(*kind) for number, kind in enumerate(kinds)}
    held = allocate(infos, pinned=False)

    for number, (name, info) in enumerate(infos.items()):
        tensor = held.tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
        assert tensor.data_ptr() % ALIGNMENT == 0
        tensor.view(torch.uint8).fill_(number)
    assert [int(tensor.view(torch.uint8).unique()) for tensor in held.tensors.values()] == [0, 1, 2]
    assert held.is_written_by_this_process


class Watched:
    """A `HostWeightMemory` whose memory another process may fill."""

    def __init__(self, inner: HostWeightMemory, is_written_by_this_process: bool) -> None:
        self.allocate_on_host, self.finish, self.is_written_by_this_process = (
            inner.allocate_on_host,
            inner.finish,
            is_written_by_this_process,
        )


def test_loras_are_merged_into_swapped_weights_and_one_that_fits_nothing_is_still_seen(
    tmp_path: Path,
) -> None:
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16, num_layers=5))
    write_lora(tmp_path / "lora.safetensors", path)

    def patch() -> LoraPatch:
        return LoraPatch([WeightedLora(read_lora(tmp_path / "lora.safetensors"))])

    expected = dict(load_dit(path, Placement(CPU, patch=patch())).named_parameters())
    plain = dict(load_dit(path, Placement(CPU)).named_parameters())
    for is_written_by_this_process in (True, False):
        host, used = host_weights(SwapPlan(DIT, 4), CPU), patch()
        assert host is not None
        found = load_dit(
            path, Placement(CPU, patch=used, host_weights=Watched(host, is_written_by_this_process))
        )
        used.check()
        assert unused(used) == []
        if is_written_by_this_process:
            assert all(torch.equal(expected[name], weight) for name, weight in found.named_parameters())
        else:  # left to another process
            assert not found.get_parameter("blocks.1.ffn.0.weight").any()
    assert any(not torch.equal(expected[name], plain[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="each process has its own elsewhere")
def test_processes_of_a_machine_share_one_copy(tmp_path: Path) -> None:
    """What one writes all read; it is one file without a name, so it cannot outlive them."""
    path = write_dit(tmp_path, tiny_state("t2v", num_layers=5))
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, path)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29633"]
    script = ROOT / "tests" / "modules" / "share_host_memory.py"

    done = run_python(*launch, script, path, lora, "cpu", environment={"PYTHONPATH": str(ROOT)})

    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, second = sorted(seen, key=lambda one: one["rank"])
    assert (first["fills"], second["fills"]) == (True, False)
    assert first["mark"] == second["mark"] == 1234
    assert first["files"] == second["files"]
    assert [ending for _, ending in first["files"]] == ["(deleted)"]
    assert first["unused"] == second["unused"] == []
    (expected,) = output_of(
        WAN, load_dit(path, Placement(CPU, patch=LoraPatch([WeightedLora(read_lora(lora))])))
    )
    assert first["output"] == second["output"] == expected.double().sum().item()


class Driver:
    """CUDA's runtime. It locks so many bytes in all; as the real one it keeps the error of a refused call for
    the thread, until a kernel is started: that reports it.
    """

    class cudaError:
        success = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.kept = room, 0
        self.locked: dict[int, int] = {}  # address -> bytes
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch, "ones", self.start_kernel)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size == 0 or size > self.room - sum(self.locked.values()):
            self.kept = 2
            return self.kept
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def start_kernel(self, *_: object, **__: object) -> Tensor:
        error, self.kept = self.kept, 0
        if error:
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(1)


MB = 1 << 20


def test_memory_is_locked_in_pieces_whose_borders_no_tensor_and_no_page_crosses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch, room=10_000 * MB)
    sizes = [700 * MB, 100 * MB + 5, 100 * MB, 100 * MB, 3, 700 * MB, 0]  # not touched: takes addresses only

    held = allocate({str(i): TensorInfo(torch.uint8, (size,)) for i, size in enumerate(sizes)}, pinned=True)

    ranges = [range(address, address + size) for address, size in sorted(driver.locked.items())]
    assert [len(each) >> 20 for each in ranges] == [700, 200, 100, 700]
    for tensor in filter(len, held.tensors.values()):
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
        assert sum(first in each and last in each for each in ranges) == 1
    pages = [range(each.start // 4096, (each.stop - 1) // 4096 + 1) for each in ranges]
    assert all(one.stop <= other.start for one, other in pairwise(pages))
    assert held.unpinned_bytes == 0

    del held, tensor
    gc.collect()
    assert not driver.locked


def test_what_the_driver_does_not_lock_serves_too_and_its_error_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(monkeypatch, room=500 * MB)
    infos = {name: TensorInfo(torch.uint8, (200 * MB,)) for name in "abcd"}

    held = allocate(infos, pinned=True)

    assert list(driver.locked.values()) == [200 * MB]  # and not 400: others need some too
    assert held.unpinned_bytes == 600 * MB
    assert "refused to lock 0.6 of 0.8 GB" in caplog.text
    driver.start_kernel()  # raises nothing
    held.tensors["c"][-1] = 3

    del held
    gc.collect()
    assert not driver.locked


def test_a_network_is_made_once_and_moves_until_it_is_freed() -> None:
    held, made = LoadedNetwork[nn.Linear, str](), list[torch.device]()

    def make(device: torch.device) -> tuple[nn.Linear, str]:
        made.append(device)
        return nn.Linear(2, 2, device=device), "beside"

    held.load(CPU, make)
    first, beside = weakref.ref(held.get()[0]), held.get()[1]
    held.load(torch.device("meta"), make)

    assert made == [CPU]
    assert beside == "beside"
    assert held.get()[0] is first()
    assert held.get()[0].weight.is_meta
    for _ in range(2):
        held.free()
    assert first() is None
    with pytest.raises(AssertionError, match="load"):
        held.get()
    held.load(CPU, make)
    assert made == [CPU, CPU]
