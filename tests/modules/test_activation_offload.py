"""Inputs of blocks in host memory: through a transfer that copies as late as it may and spoils what nobody may read any more."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.activation import checkpoint_blocks
from modules.activation_offload import ALIGNMENT, HostMemory, Offload, PlainTransfer, Wait, slab_of
from tests.tiny.dits import DITS, TinyDit, gradients

SIZE, LARGER = (2, 4, 6, 9), (3, 6, 8, 11)


class LateTransfer:
    """A copy happens when it is waited for; the source of a saved one is spoilt then, as memory that is used for something else."""

    def __init__(self) -> None:
        self.actions: list[str] = []
        self.names: dict[int, int] = {}  # of pieces of host memory, in the order of their first use

    def allocate(self, size_bytes: int) -> Tensor:
        self.actions.append("allocate")
        return torch.full((size_bytes,), 255, dtype=torch.uint8)  # as numbers: NaN

    def save(self, source: Tensor, host: Tensor) -> Wait:
        number = self.names.setdefault(host.data_ptr(), len(self.names))
        self.actions.append(f"save {number}")
        host.fill_(math.nan)

        def wait() -> None:
            self.actions.append(f"saved {number}")
            host.copy_(source)
            source.data.fill_(math.nan)

        return wait

    def fetch(self, host: Tensor, device: torch.device) -> tuple[Tensor, Wait]:
        number = self.names[host.data_ptr()]
        self.actions.append(f"fetch {number}")
        target = torch.full_like(host, math.nan)

        def wait() -> None:
            self.actions.append(f"fetched {number}")
            target.copy_(host)

        return target, wait


def dressed(tiny: TinyDit, offload: Offload | None, blocks: int = 3, **arguments: Any) -> tuple[nn.Module, Any]:
    dit, network = tiny.with_lora(blocks, **arguments)
    checkpoint_blocks(dit.train(), tiny.spec, offload=offload)
    return dit, network


def assert_equal(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(one, other) for one, other in zip(ours[1], theirs[1], strict=True))
    assert any(one.any() for one in ours[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [{"neuron_dropout": 0.3}, {"rank_dropout": "0.3"}, {"module_dropout": "0.4"}], ids=str)
@pytest.mark.parametrize("tiny", DITS, ids=lambda dit: dit.name)
def test_gradients_are_equal_to_the_bit(tiny: TinyDit, dropout: dict[str, Any], autocast: bool) -> None:
    transfer = LateTransfer()
    plain, ours = dressed(tiny, None, **dropout), dressed(tiny, Offload(transfer), **dropout)

    for step, size in enumerate((SIZE, LARGER, SIZE)):
        results = []
        for dit, network in (plain, ours):
            network.set_dropout_seed(step)
            results.append(gradients(dit, network, tiny.inputs(size, 2), autocast))
        assert_equal(results[1], results[0])
    assert transfer.actions


def test_inputs_leave_while_their_block_computes_and_come_back_one_block_ahead() -> None:
    tiny, transfer = DITS[0], LateTransfer()
    dit, network = dressed(tiny, Offload(transfer), blocks=4)

    gradients(dit, network, tiny.inputs(SIZE, 1))

    assert [action for action in transfer.actions if action != "allocate"] == [
        *("save 0", "saved 0", "save 1", "saved 1", "save 2"),  # the input of the last block stays
        *("saved 2", "fetch 2", "fetched 2", "fetch 1"),  # the third block is differentiated while the second's input comes
        *("fetched 1", "fetch 0"),
        "fetched 0",
    ]


def test_host_memory_is_used_again_and_grows_with_the_largest_size_only() -> None:
    tiny, transfer = DITS[0], LateTransfer()
    offload = Offload(transfer)
    dit, network = dressed(tiny, offload, blocks=4)

    sizes = []
    for size in (SIZE, SIZE, LARGER, SIZE, LARGER):
        gradients(dit, network, tiny.inputs(size, 1))
        sizes.append(offload.memory.size_bytes)

    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] == sizes[4]
    tokens, width, needed = 3 * 3 * 4, 128 * 4, 3  # of the larger size; bytes of a token; blocks but the last
    assert sizes[4] >= tokens * width * needed
    assert sizes[4] <= tokens * width * (needed + 15)


def test_two_forward_passes_may_stand_before_their_backward_passes() -> None:
    tiny = DITS[0]
    results = []
    for offload in (None, Offload(LateTransfer())):
        dit, network = dressed(tiny, offload)
        losses = [dit(**tiny.inputs(size, 1)).square().mean() for size in (SIZE, LARGER)]
        losses[0].backward()
        losses[1].backward()
        results.append([parameter.grad for parameter in network.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_pass_that_is_given_up_gives_its_memory_back() -> None:
    tiny, transfer = DITS[0], LateTransfer()
    offload = Offload(transfer)
    dit, network = dressed(tiny, offload)
    dit(**tiny.inputs(SIZE, 1))  # nothing is differentiated
    size = offload.memory.size_bytes

    gradients(dit, network, tiny.inputs(SIZE, 1))

    assert transfer.actions.count("allocate") == 1
    assert offload.memory.size_bytes == size


def test_without_gradients_nothing_leaves() -> None:
    tiny, transfer = DITS[0], LateTransfer()
    dit, _ = dressed(tiny, Offload(transfer))

    with torch.no_grad():
        dit(**tiny.inputs(SIZE, 1))
    dit.eval()(**tiny.inputs(SIZE, 1)).sum().backward()

    assert transfer.actions == []


def test_the_plain_transfer_copies_at_once() -> None:
    transfer = PlainTransfer()
    source, host = torch.arange(4.0), torch.zeros(4)

    transfer.save(source, host)()
    found, wait = transfer.fetch(host, torch.device("cpu"))
    wait()

    assert torch.equal(found, source)
    assert found.data_ptr() != host.data_ptr()


@pytest.mark.parametrize("size_bytes", [256, 512, 5120 * 32760 * 2, 5120 * 32760 * 4, 1 << 20, (1 << 20) + 256, 3 * 256])
def test_slabs_are_powers_of_two_that_pieces_fill_well(size_bytes: int) -> None:
    pieces, slab = slab_of(size_bytes)

    assert slab == 1 << (slab.bit_length() - 1)
    assert 1 <= pieces < 16
    assert 0 <= slab - pieces * size_bytes <= slab / 8


def test_pieces_are_aligned_and_the_smallest_that_fits_is_taken() -> None:
    memory = HostMemory(PlainTransfer().allocate)
    large, small = memory.take(10_000), memory.take(100)

    assert large.numel() % ALIGNMENT == small.numel() % ALIGNMENT == 0
    memory.put(large)
    memory.put(small)
    assert memory.take(90).numel() <= large.numel()
