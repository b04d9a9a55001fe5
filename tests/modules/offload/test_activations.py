"""Inputs of blocks in host memory: through a transfer that copies as late as it may and spoils what nobody
may read any more.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from modules.offload.checkpointing import Offload, checkpoint_blocks
from modules.offload.host_memory import Pairs, Transfer
from tests.tiny.dits import DITS, TinyDit, gradients

SIZE, LARGER = (2, 4, 6, 9), (3, 6, 8, 11)


class LateTransfer(Transfer):
    """A copy happens when it is waited for; the source of a saved one is spoilt then, as memory that is used
    for something else.
    """

    def __init__(self) -> None:
        self.actions: list[str] = []
        self._names: dict[int, int] = {}  # of pieces of host memory, in the order of their making
        self._waiting: list[tuple[str, Tensor, Tensor]] = []

    def make(self, size_bytes: int) -> Tensor:
        piece = torch.full((size_bytes,), 255, dtype=torch.uint8)  # as numbers: NaN
        self._names[piece.data_ptr()] = len(self._names)
        return piece

    def memory(self, size_bytes: int) -> Tensor:
        raise AssertionError("such memory is held back by the stream of the copies")

    def mark(self) -> str:
        return "now"

    def copy(self, pairs: Pairs, after: Any) -> int:
        assert after == "now"
        ((target, source),) = pairs
        leaves = target.data_ptr() in self._names
        name = f"{'save' if leaves else 'fetch'} {self._names[(target if leaves else source).data_ptr()]}"
        self.actions.append(name)
        target.fill_(math.nan)
        self._waiting.append((name, target, source))
        return len(self._waiting)

    def wait(self, moment: int) -> None:
        name, target, source = self._waiting[moment - 1]
        self.actions.append(name.replace("save", "saved").replace("fetch", "fetched"))
        target.copy_(source)
        if name.startswith("save"):
            source.data.fill_(math.nan)

    def finish(self) -> None:
        raise AssertionError("nothing waits on the host")


def away() -> tuple[Offload, LateTransfer]:
    transfer = LateTransfer()
    return Offload(transfer, transfer.make), transfer


def dressed(
    tiny: TinyDit, offload: Offload | None, blocks: int = 3, **arguments: Any
) -> tuple[nn.Module, Any]:
    dit, network = tiny.with_lora(blocks, **arguments)
    checkpoint_blocks(dit.train(), tiny.spec, offload=offload)
    return dit, network


def test_inputs_leave_while_their_block_computes_and_come_back_one_block_ahead() -> None:
    tiny, (offload, transfer) = DITS[0], away()
    dit, network = dressed(tiny, offload, blocks=4)

    gradients(dit, network, tiny.inputs(SIZE, 1))

    assert transfer.actions == [
        *("save 0", "saved 0", "save 1", "saved 1", "save 2"),  # the input of the last block stays
        # the third block is differentiated while the second's input comes
        *("saved 2", "fetch 2", "fetched 2", "fetch 1"),
        *("fetched 1", "fetch 0"),
        "fetched 0",
    ]


def test_two_forward_passes_may_stand_before_their_backward_passes() -> None:
    tiny = DITS[0]
    results = []
    for offload in (None, away()[0]):
        dit, network = dressed(tiny, offload)
        losses = [dit(**tiny.inputs(size, 1)).square().mean() for size in (SIZE, LARGER)]
        losses[0].backward()
        losses[1].backward()
        results.append([parameter.grad for parameter in network.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_pass_that_is_given_up_gives_its_memory_back() -> None:
    tiny, (offload, _) = DITS[0], away()
    dit, network = dressed(tiny, offload)
    dit(**tiny.inputs(SIZE, 1))  # nothing is differentiated
    size = offload.memory.size_bytes

    gradients(dit, network, tiny.inputs(SIZE, 1))

    assert offload.memory.size_bytes == size


def test_what_was_sent_for_and_is_not_used_is_waited_for() -> None:
    """A backward pass that goes only half of the way: the memory of a copy may not be used for something else
    before its end.
    """
    offload, transfer = away()
    x = torch.ones(2, 2, requires_grad=True)
    with offload.hooks():
        first = x.square()
        second = first.clone().square()
    transfer.actions.clear()

    torch.autograd.grad(second.sum(), first)
    assert transfer.actions[-1] == "fetch 0"
    del first, second

    assert transfer.actions[-1] == "fetched 0"
